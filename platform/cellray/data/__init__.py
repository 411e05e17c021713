"""From files to a stream of cells: ingest, stores, vocabularies, plans, Ray Data pipelines and batches."""
