"""Configuration, errors, the registry, keyed randomness and cells in motion; imports nothing else of ours."""
