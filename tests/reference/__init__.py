"""Slow references of the methods, in numpy float64, written from the papers and not from our code.

Loops over single elements, exact rational counts, full sorts: nothing here is fast, nothing here is shared with
`graftkit.methods`. `base` is [*shape], `models` a list of [*shape], and what is per model is a list.
"""
