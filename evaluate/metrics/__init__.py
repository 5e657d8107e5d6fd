"""The metrics: one file each, all of the same shape."""
