"""Weights on disk, in and out. Knows no merging method."""
