"""Carrying out a plan: read, compute a precision above the output, cast once, write."""
