"""Measuring models: tables of values with intervals, scores on tasks, comparisons between models."""
