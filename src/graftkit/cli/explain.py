"""`graft explain RECIPE`: what a merge would do, from headers alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from graftkit.recipes.plan import Plan


def explain(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.", show_default=False)],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read pickle checkpoints, with weights-only loading.")
    ] = False,
    as_recipe: Annotated[
        bool, typer.Option("--as-recipe", help="Print the recipe in full: mergekit's as ours, short forms written out.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Say what a merge would do, tensor by tensor, and refuse what it could not. Reads no weights."""
    from graftkit.cli import console
    from graftkit.recipes.explain import as_yaml, summary
    from graftkit.recipes.plan import plan
    from graftkit.recipes.recipe import load

    if as_recipe:
        written = load(recipe)
        return console.print_json(written.to_dict()) if json else typer.echo(as_yaml(written), nl=False)
    made = plan(recipe, allow_pickle=allow_pickle)
    told = summary(made, tensors=tensors or json)
    console.print_json(told) if json else _print(made, told)


def _print(made: Plan, told: dict[str, Any]) -> None:
    from graftkit.cli.console import count_of, size_of

    out = told["output"]
    if made.backbone:
        from graftkit.recipes.explain import as_yaml

        typer.echo("the recipe, written out:\n" + "".join(f"  {line}\n" for line in as_yaml(made.recipe).splitlines()))
    typer.echo(f"plan {told['hash']}")
    typer.echo(
        f"output: {_form(out)}{count_of(out['parameters'])} parameters as {', '.join(out['dtypes'])}, "
        f"{size_of(out['bytes'])} in {out['files']} file{'s' * (out['files'] > 1)}"
    )
    typer.echo(
        f"work: read {size_of(told['bytes_read'])}, stages {', '.join(told['stages'])}, "
        f"{size_of(told['worker_bytes'])} of scratch a worker"
    )
    for source in told["inputs"]:
        typer.echo(f"  {source['role']:6} {source['kind']:10} {source['source']}  ({source['directory']})")
    if "gates" in told:
        typer.echo("  gates  {kind}, one a {granularity}, {matrices} matrices  ({file})".format(**told["gates"]))
    for held in told.get("statistics", []):
        typer.echo("  {kind} {form}, {samples} examples of {examples}, {tokens} tokens  ({file})".format(**held))
    for group in told["groups"]:
        knobs = _knobs(group["knobs"])
        typer.echo(
            f"{group['method'] or 'copied'}: {group['tensors']} tensors, "
            f"{count_of(group['parameters'])} parameters ({group['where']}){PATHS[group.get('factors', '')]}"
        )
        for applied in group.get("prepare", []):
            typer.echo(f"    after {applied['name']}: {_knobs(applied['knobs'])}")
        if knobs:
            typer.echo(f"    {knobs}")
        for applied in group.get("finish", []):
            typer.echo(f"    then {applied['name']}: {_knobs(applied['knobs'])}")
    if "vocabulary" in told:
        _print_vocabulary(told["vocabulary"])
    if "backbone" in told:
        _print_backbone(told["backbone"])
    for note in told["notes"]:
        typer.echo(f"note: {note}")
    for step in told.get("tensors", []):
        typer.echo(
            f"  {step['name']}  {step['shape']} {step['dtype']}  "
            f"{step['method'] or 'copied'}  from {', '.join(step['from'])}"
        )


def _print_vocabulary(told: dict[str, Any]) -> None:
    typer.echo(f"vocabulary: {told['source']}, {told['tokens']} tokens")
    for tensor in told["tensors"]:
        typer.echo(f"  {', '.join(tensor['names'])}: {tensor['rows']} rows")
        for kind in tensor["kinds"]:
            named = [token for token in kind["tokens"] if token is not None]
            whose = f" ({', '.join(kind['models'])})" if kind["models"] else ""
            shown = _some(named) if kind["kind"] != "merged" else ""
            typer.echo(f"    {kind['kind']}{whose}: {len(kind['rows'])}{shown}")
    for name, tokens in told["left_out"].items():
        typer.echo(f"  left out of {name}: {len(tokens)}{_some(tokens)}")


def _print_backbone(told: dict[str, Any]) -> None:
    from graftkit.recipes.mapping import shifts

    typer.echo(f"backbone of {told['like']}: {told['stack']}*")
    typer.echo(f"  mapped: {_groups_of(told['mapped'])}")
    typer.echo(f"  kept as the VLM has it: {_groups_of(told['kept'])}")
    for tensor in told["rows"]:
        typer.echo(f"  {tensor['name']}: {tensor['shared']} rows of shared tokens mapped, {tensor['kept']} kept")
    for model in told["models"]:
        typer.echo(f"  {model['role']} {model['source']}: {', '.join(_of_model(model, shifts(model['layers'])))}")
    for kin in told["ancestry"]:
        typer.echo(
            "  ancestry of {source} and {of}: median cosine {cosine:.3f} (lowest {lowest:.3f}; refused below {least}), "
            "distance {distance:.3f}; {matrices} matrices, {values} values".format(**kin)
        )


def _of_model(model: dict[str, Any], shifted: str) -> list[str]:
    """What is to be said of a model's part in a backbone."""
    layers = f"{len(model['layers'])} layers of {model['stack']}*" if model["layers"] else model["kind"]
    found = [layers, *([f"layers {shifted}"] if shifted else [])]
    found += [f"{model['fused']} tensors kept fused by one and apart by the other"] if model["fused"] else []
    unused = ", ".join(f"{g['group']} ({g['tensors']})" if g["tensors"] > 1 else g["group"] for g in model["unused"])
    return [*found, f"unmapped: {unused}" if unused else "nothing unmapped"]


def _groups_of(groups: list[dict[str, Any]]) -> str:
    from graftkit.cli.console import count_of

    return "; ".join(f"{g['group']} {g['tensors']} ({count_of(g['parameters'])})" for g in groups) or "nothing"


def _some(tokens: list[str]) -> str:
    shown = ", ".join(repr(token) for token in tokens[:5])
    return f" ({shown}{', ...' if len(tokens) > 5 else ''})" if tokens else ""


PATHS = {
    "": "",
    "stack": ", from the adapters' factors",
    "core": ", in the adapters' core",
    "frame": ", in the adapters' outputs",
    "rows": ", as factors of dense rows that go by",
    "apart": ", each factor by itself, with all their cross terms",
}
"""How deltas become factors (`recipes/adapters.py`), in words."""


def _form(out: dict[str, Any]) -> str:
    return f"an adapter of {out['like']}, at most " if out["as"] == "adapter" else f"like {out['like']}, "


def _knobs(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {_shown(value)}" for key, value in values.items())


def _shown(value: Any) -> str:
    return (
        "[" + ", ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in value) + "]"
        if isinstance(value, tuple)
        else str(value)
    )
