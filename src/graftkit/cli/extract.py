"""`graft extract BASE TUNED OUT`: the adapter that best explains a fine-tuned model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def extract(
    base: Annotated[str, typer.Argument(help="What the model was fine-tuned from.", show_default=False)],
    tuned: Annotated[str, typer.Argument(help="The fine-tuned model.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="The directory to make.", show_default=False)],
    rank: Annotated[int | None, typer.Option(min=1, help="Directions to keep of each matrix.")] = None,
    energy: Annotated[
        float | None, typer.Option(help="Or: the share of each change's squared norm to keep, such as 0.9.")
    ] = None,
    outside: Annotated[
        str, typer.Option(help="What LoRA does not reach (norms, embeddings): save it whole, drop or refuse.")
    ] = "save",
    dtype: Annotated[str, typer.Option(help="What to store: float32, bfloat16 or float16.")] = "float32",
    workers: Annotated[
        int | None, typer.Option(min=1, help="Threads; all cores by default. Changes no byte of the result.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="Memory to stay within, such as 1GB. Changes no byte of the result.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output, whole.")] = False,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read pickle checkpoints, with weights-only loading.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the record as JSON.")] = False,
) -> None:
    """Write the LoRA adapter of BASE that comes nearest to TUNED, and say how near that is.

    Of each matrix the best directions of the change are found by subspace iteration; what they leave out is measured.
    """
    from graftkit.cli import console
    from graftkit.cli.merge import summary
    from graftkit.cli.options import memory_bytes
    from graftkit.execution.extraction import extract as make

    with console.progress("bytes") as bar:
        record = make(
            base, tuned, out, rank=rank, energy=energy, outside=outside, dtype=dtype, workers=workers,
            memory=memory_bytes(memory), overwrite=overwrite, allow_pickle=allow_pickle, progress=bar,
        )  # fmt: skip
    console.print_json(record) if json else summary(record, out)
