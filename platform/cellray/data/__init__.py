"""From files to a stream of cells: ingest, stores, vocabularies, plans, pipelines, batches."""
