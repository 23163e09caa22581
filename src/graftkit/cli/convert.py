"""`graft convert GGUF OUT`: a checkpoint directory from a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def convert(
    gguf: Annotated[Path, typer.Argument(help="The GGUF file.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="The directory to make.", show_default=False)],
    dtype: Annotated[str, typer.Option(help="What to store: float32, bfloat16 or float16.")] = "float32",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output, whole.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print what was made as JSON.")] = False,
) -> None:
    """Make a checkpoint that transformers loads as it is from a GGUF file, with its tokenizer and chat template.

    The weights are de-quantised: they are what the GGUF holds, not the model that was quantised. Tested with SmolLM2
    (llama); the other architectures that transformers' GGUF loader knows are tried as they come.
    """
    from graftkit.checkpoints.gguf import convert_gguf
    from graftkit.cli import console

    made = _described(convert_gguf(gguf, out, dtype, overwrite=overwrite))
    if json:
        console.print_json(made)
        return
    size = f"{console.count_of(made['parameters'])} parameters as {dtype}, {console.size_of(made['bytes'])}"
    beside = "with" if made["chat_template"] else "without"
    typer.echo(f"{out}: {made['architecture']}, {made['tensors']} tensors, {size}, {beside} chat template")


def _described(out: Path) -> dict[str, Any]:
    """What stands in the directory, from headers."""
    from graftkit.checkpoints.sources import open_checkpoint

    made = open_checkpoint(out)
    return {
        "out": str(out),
        "architecture": ", ".join(made.config.get("architectures") or ["unknown"]),
        "tensors": len(made.tensors),
        "parameters": sum(info.elements for info in made.tensors.values()),
        "bytes": sum(info.nbytes for info in made.tensors.values()),
        "chat_template": (out / "chat_template.jinja").is_file(),
    }
