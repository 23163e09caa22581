"""What is wanted, and what will be done. Reads headers only; imports neither torch nor numba."""
