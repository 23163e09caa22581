"""What methods kept of the orchard's experts' gains: made by `examples/orchard/measured_methods.py`."""

from typing import NamedTuple


class Measured(NamedTuple):
    """A row: which experts, what it is called there, the share that it kept with its interval, and the page."""

    experts: str
    row: str
    kept: float
    low: float
    high: float
    page: str


ROWS: dict[str, tuple[Measured, ...]] = {
    "average": (
        Measured("math, code, medicine, languages", "average", 0.596, 0.567, 0.629, "experiment-graft.md"),
        Measured("math, medicine (full fine-tunes)", "average", 0.872, 0.848, 0.898, "experiment-graft.md"),
        Measured("math, languages", "average", 0.915, 0.891, 0.94, "experiment-graft.md"),
    ),
    "core_regmean": (
        Measured("math, code, medicine, languages", "core RegMean", 0.958, 0.932, 0.983, "experiment-graft.md"),
        Measured(
            "math, code, medicine, languages", "core RegMean, 8 samples", 0.955, 0.93, 0.98, "experiment-graft.md"
        ),
        Measured(
            "math, code, medicine, languages", "core RegMean, not balanced", 0.953, 0.925, 0.979, "experiment-graft.md"
        ),
        Measured(
            "math, code, medicine, languages", "core RegMean, no probes", 0.944, 0.919, 0.969, "experiment-graft.md"
        ),
        Measured(
            "math, code, medicine, languages",
            "core RegMean, no probes, not balanced",
            0.935,
            0.909,
            0.963,
            "experiment-graft.md",
        ),
        Measured("math, medicine (full fine-tunes)", "core RegMean", 0.974, 0.964, 0.985, "experiment-graft.md"),
    ),
    "dare": (
        Measured(
            "math, code, medicine, languages", "DARE, density 0.5, scale 0.5", 0.69, 0.643, 0.738, "experiment-graft.md"
        ),
        Measured(
            "math, medicine (full fine-tunes)",
            "DARE, density 0.5, scale 0.8",
            0.948,
            0.932,
            0.965,
            "experiment-graft.md",
        ),
    ),
    "fisher": (Measured("math, code, medicine, languages", "Fisher", 0.657, 0.626, 0.693, "experiment-graft.md"),),
    "graft": (
        Measured(
            "math, code, medicine, languages",
            "graft, solved convex, squashed",
            0.601,
            0.572,
            0.634,
            "experiment-graft.md",
        ),
        Measured("math, code, medicine, languages", "graft, global only", 0.596, 0.567, 0.629, "experiment-graft.md"),
        Measured("math, code, medicine, languages", "graft, local only", 0.593, 0.564, 0.627, "experiment-graft.md"),
        Measured("math, code, medicine, languages", "graft, both", 0.593, 0.564, 0.627, "experiment-graft.md"),
        Measured("math, languages", "graft, sharpness 20, phi channelwise", 0.971, 0.938, 1.004, "experiment-graft.md"),
        Measured("math, languages", "graft, sharpness 20", 0.957, 0.929, 0.986, "experiment-graft.md"),
        Measured("math, languages", "graft, both", 0.922, 0.898, 0.948, "experiment-graft.md"),
    ),
    "graft_convex": (
        Measured("math, code, medicine, languages", "graft, solved convex", 0.656, 0.624, 0.694, "experiment-graft.md"),
        Measured(
            "math, medicine (full fine-tunes)", "graft, solved convex", 0.875, 0.852, 0.901, "experiment-graft.md"
        ),
    ),
    "graft_free": (
        Measured(
            "math, code, medicine, languages", "graft, free, then trained", 0.874, 0.836, 0.915, "experiment-graft.md"
        ),
        Measured("math, code, medicine, languages", "graft, solved free", 0.81, 0.774, 0.85, "experiment-graft.md"),
        Measured("math, medicine (full fine-tunes)", "graft, solved free", 0.95, 0.935, 0.965, "experiment-graft.md"),
    ),
    "regmean": (
        Measured("math, code, medicine, languages", "RegMean", 0.959, 0.941, 0.977, "experiment-graft.md"),
        Measured("math, code, medicine, languages", "RegMean, sketch:64", 0.946, 0.928, 0.966, "experiment-graft.md"),
        Measured("math, code, medicine, languages", "RegMean, block:64", 0.881, 0.854, 0.909, "experiment-graft.md"),
        Measured("math, medicine (full fine-tunes)", "RegMean", 0.964, 0.951, 0.977, "experiment-graft.md"),
    ),
    "task_arithmetic": (
        Measured(
            "math, code, medicine, languages", "task arithmetic, scale 0.5", 0.687, 0.639, 0.736, "experiment-graft.md"
        ),
        Measured(
            "math, medicine (full fine-tunes)", "task arithmetic, scale 1.0", 0.951, 0.935, 0.967, "experiment-graft.md"
        ),
    ),
    "ties": (
        Measured(
            "math, code, medicine, languages",
            "TIES, density 0.5, scale 1.0",
            0.635,
            0.583,
            0.687,
            "experiment-graft.md",
        ),
        Measured(
            "math, medicine (full fine-tunes)",
            "TIES, density 0.5, scale 1.5",
            0.973,
            0.96,
            0.987,
            "experiment-graft.md",
        ),
    ),
    "tsv": (Measured("math, code, medicine, languages", "TSV, scale 0.5", 0.766, 0.73, 0.806, "experiment-graft.md"),),
    "wudi": (
        Measured("math, code", "steps 3", 0.919, 0.823, 1.003, "methods/wudi.md"),
        Measured("math, code", "the plain sum", 0.898, 0.738, 1.048, "methods/wudi.md"),
        Measured("math, code", "steps 10", 0.878, 0.767, 0.961, "methods/wudi.md"),
        Measured("math, languages", "steps 3", 0.944, 0.886, 0.994, "methods/wudi.md"),
        Measured("math, languages", "the plain sum", 0.904, 0.829, 0.974, "methods/wudi.md"),
        Measured("math, languages", "steps 10", 0.874, 0.798, 0.912, "methods/wudi.md"),
    ),
}
