"""Choosing what to merge and how, by scores: each function decides something and returns a recipe."""
