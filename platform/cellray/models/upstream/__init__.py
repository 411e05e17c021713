"""One adapter a family: published weights to a cellray checkpoint, every key accounted for."""
