"""One task a file: what it needs of a model, how it is split, fitted and scored."""
