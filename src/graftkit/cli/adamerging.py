"""`graft adamerging RECIPE OUT --data FILE...`: the weights of task arithmetic, by the entropy of what it says."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class Share(str, Enum):
    """What has a coefficient of its own."""

    model = "model"
    tensor = "tensor"


def adamerging(
    recipe: Annotated[Path, typer.Argument(help="A recipe by task_arithmetic.", show_default=False, metavar="RECIPE")],
    out: Annotated[Path, typer.Argument(help="The directory to write.", metavar="OUT", show_default=False)],
    data: Annotated[
        list[Path] | None,
        typer.Option("--data", "-d", help="Examples of a domain; once a model, in order.", show_default=False),
    ] = None,
    scope: Annotated[Share, typer.Option(help="One coefficient a model, or a model and tensor.")] = Share.tensor,
    steps: Annotated[int, typer.Option(min=1, help="Steps of Adam.")] = 100,
    rate: Annotated[float, typer.Option(min=0, help="Adam's rate.")] = 1e-2,
    start: Annotated[float, typer.Option(help="Every coefficient's first value.")] = 0.3,
    batch: Annotated[int, typer.Option(min=1, help="Examples of each domain in a step.")] = 4,
    clip: Annotated[bool, typer.Option(help="Keep coefficients within 0 and 1.")] = True,
    samples: Annotated[int, typer.Option(min=1, help="Examples of each domain, at most.")] = 200,
    seed: Annotated[int, typer.Option(min=0, help="Of the order of the examples.")] = 0,
    device: Annotated[str | None, typer.Option(help="Where the model runs; cuda where there is one.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; all cores by default.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")] = False,
) -> None:
    """Find the weights of task arithmetic under which the merged model is surest of what it says; no labels needed."""
    from dataclasses import asdict

    from graftkit.cli import console
    from graftkit.improving.adamerging import Settings
    from graftkit.improving.adamerging import adamerging as find
    from graftkit.measuring.loading import default_device

    console.quiet_libraries(threads)
    chosen = Settings(scope.value, steps, rate, start, batch, clip, samples, seed)
    with console.progress("steps") as bar:
        found = find(
            recipe, out, data=data or (), settings=chosen, device=device or default_device(),
            advance=lambda done, total, entropy: None if json else bar(f"entropy {entropy:.3f}", done, total),
        )  # fmt: skip
    if json:
        console.print_json({**asdict(found), "recipe": str(found.recipe)})
        return
    means = [sum(own) / len(own) for own in zip(*found.coefficients.values(), strict=True)]
    typer.echo(
        f"{found.recipe}: entropy {found.entropies[0]:.3f} -> {found.entropies[-1]:.3f}, mean coefficients "
        f"{', '.join(f'{mean:.3f}' for mean in means)}, in {found.seconds:.1f} s"
    )
