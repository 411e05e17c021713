"""Metrics with versioned ids: arrays in, floats out."""
