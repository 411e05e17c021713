"""Job submission, estimates and the environment check."""
