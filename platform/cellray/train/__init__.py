"""From batches to a checkpoint: engines, the loop, Ray Train, tracking and telemetry."""
