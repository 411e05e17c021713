"""One tokenizer a file: blocks of cells to ragged tokens, vectorised, never importing torch."""
