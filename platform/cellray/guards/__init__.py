"""Checks that keep a table of results honest: splits, duplicates, confounding, answers."""
