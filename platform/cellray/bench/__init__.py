"""Method x dataset x seed: tables, statistics, pictures."""
