"""Search spaces and Ray Tune sweeps."""
