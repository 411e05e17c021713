"""One baseline a file: what every table shows beside the models."""
