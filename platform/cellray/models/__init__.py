"""One family a file: its configuration, its module and its ``FAMILY``."""
