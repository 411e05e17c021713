"""Configuration, errors, registry, keyed draws, cells in motion; imports nothing of ours."""
