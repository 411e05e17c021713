"""Loading checkpoints, embedding and annotating cells."""
