"""One training objective a file: what is hidden from the model and what the loss counts."""
