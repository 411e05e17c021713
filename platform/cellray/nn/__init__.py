"""Layers shared by the families; torch only."""
