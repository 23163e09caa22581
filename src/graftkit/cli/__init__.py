"""The program `graft`: one function per command, each in the file of its name; heavy imports inside the functions.

A user's error ends with one message and status 2; an interrupt with status 130. Anything else is a bug and shows its
traceback.
"""

from __future__ import annotations

import errno
import gc
import os
import sys

import typer

from graftkit import __version__
from graftkit.cli import (
    adamerging,
    compatibility,
    convert,
    demo,
    evaluate,
    explain,
    extract,
    gates,
    inspect,
    merge,
    methods,
    report,
    search,
    soup,
    statistics,
    subsample,
)
from graftkit.errors import GraftError

app = typer.Typer(
    name="graft",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Merge language models, vision-language models and LoRA adapters by their weights.",
)
app.command("demo")(demo.demo)
app.command("merge")(merge.merge)
app.command("explain")(explain.explain)
app.command("inspect")(inspect.inspect)
app.command("convert")(convert.convert)
app.command("extract")(extract.extract)
app.command("methods")(methods.methods)
app.command("evaluate")(evaluate.evaluate)
app.command("compatibility")(compatibility.compatibility)
app.command("soup")(soup.soup)
app.command("search")(search.search)
app.command("adamerging")(adamerging.adamerging)
app.command("subsample")(subsample.subsample)
app.command("statistics")(statistics.statistics)
app.add_typer(gates.app, name="gates")
app.command("report")(report.report)


_FULL = "the disk is full; free some room"
_OUTSIDE = {errno.ENOSPC: _FULL, errno.EDQUOT: _FULL} | dict.fromkeys(
    (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP, errno.EIO), ""
)
"""Errors of the operating system that are no bugs of ours, and what to say of them besides its own words."""


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"graftkit {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version and stop."
    ),
) -> None:
    """Merge language models, vision-language models and LoRA adapters by their weights."""


def main() -> None:
    """Runs the program."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's products: workers are the parallelism
    gc.set_threshold(50_000)  # imports make many objects that stay; looking through them was a seventh of the start-up
    try:
        app()
    except GraftError as error:
        typer.echo(f"graft: {error}", err=True)
        sys.exit(2)
    except OSError as error:
        if error.errno not in _OUTSIDE:
            raise
        reason = _OUTSIDE[error.errno] or error.strerror
        typer.echo(f"graft: {str(error.filename or 'the output')[:200]}: {reason}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        typer.echo("graft: interrupted; what was finished is kept, the same command goes on from there", err=True)
        sys.exit(130)
