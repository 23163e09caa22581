"""A method's page, made from its docstring and signature: for the terminal, and as a file of `docs/methods`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from graftkit.cli import measured
from graftkit.errors import OutputError
from graftkit.methods import Method, get, names
from graftkit.methods.composition import Part, finishers, get_part, preparations
from graftkit.recipes.steps import BLOCK

SECTIONS = ("Use it when", "Formula", "Shapes", "Knobs", "Source", "Deviations", "Example")
MADE = "<!-- Made by `make pages` from the method's docstring and signature: edit those. -->\n\n"
START = """>>> import torch
>>> from graftkit.{}
>>> base = torch.tensor([1.0, 1.0, 1.0, 1.0])
>>> models = torch.tensor([[3.0, 0.5, 1.25, 1.0], [2.0, 2.0, 1.0, 0.0]])
"""
TENSORS = "The tensors are those of all these pages; the deltas are [2, -0.5, 0.25, 0] and [1, 1, 0, -1]."
THEMES = {
    "averages": "Of weights",
    "spheres": "Of directions",
    "arithmetic": "Of deltas",
    "sparse": "Of sparse deltas",
    "masks": "By masks",
    "competition": "By competition",
    "graft": "By gates",
    "spectral": "By singular directions",
    "wudi": "By interference",
    "curvature": "By examples of each domain",
    "factors": "Of adapters' factors",
    "unified": "One model, and masks that take it apart",
    "preparation": "Before a method: `prepare:`",
    "finisher": "After a method: `finish:`",
}
"""Headings of the index, by the module in which a method stands, or by the kind of part."""

ABOUT = (
    "One page each: when to use it, formula, knobs, cost, an example. Passes are counted at the default knobs, for "
    "large tensors; those of what stands before and after a method come on top of its own."
)

PASSES = {
    "threshold": ("one pass finds the thresholds (two where the tensor is small, or a sample of it misled)", 1),
    "norms": ("one pass adds up inner products", 1),
    "dots": ("one pass adds up inner products", 1),
    "band": ("one pass for each end of the band (two where the tensor is small, or a sample of it misled)", 2),
    "signals": ("one pass finds the ranges of values and one puts them into bins", 2),
    "overlap": ("one pass counts what models change together", 1),
    "energies": ("one pass adds up squares", 1),
    "norm": ("one pass measures the merged delta", 1),
}
"""What passes over the inputs a statistic needs at the default knobs, and how many."""

WHOLE = {"two passes over all tensors come first, in a stage of their own, and find the thresholds": 2}
"""The same for thresholds of scope `model`."""

MORE = {
    "variation": "Three passes more with `select_topk` below 1.",
    "signals": "With `global_signal: spectral` one pass for each step of Lanczos (9 to 44 on six matrices of "
    "SmolLM2-135M); with `none`, no pass. A tensor of which all models together hold at most 4,194,304 values is read "
    "once, and kept for all passes.",
    "of": "With `of: factors` the inputs are the adapters' factors.",
    "retained": "One pass more where norms are restored by their L1 norm.",
    "gram": "Beside them a float32 matrix of inputs by inputs for each model, from `graft statistics`.",
    "merged_gram": "Beside them a float32 matrix of inputs by inputs for each model, from `graft statistics`.",
    "core_gram": "Beside them k x k numbers for each model from `graft statistics`, k the measured directions.",
    "fisher": "Beside them as many float32 numbers for each model, from `graft statistics`.",
}
"""What values of knobs change."""

GRAINS = {
    "element": f"blocks of {BLOCK:,} entries of each input, whatever the size of the tensor",
    "row": f"as many whole rows of each input as fit in {BLOCK:,} entries",
    "tensor": "the whole tensor of each input",
}


def entries() -> dict[str, Method]:
    """All methods, and as `prepare.NAME` and `finish.NAME` what stands around them."""
    found = {name: get(name) for name in names()}
    found |= {f"prepare.{name}": get_part("preparation", name) for name in preparations()}
    return found | {f"finish.{name}": get_part("finisher", name) for name in finishers()}


def built_in(method: Method) -> bool:
    """Whether it came with graftkit and not with a plug-in."""
    return method.function.__module__.startswith("graftkit.")


def sections(method: Method) -> dict[str, str]:
    """The parts of a method's docstring by their names; the sentence that opens it is `""`."""
    parts = re.split(rf"^({'|'.join(SECTIONS)}):", inspect.getdoc(method.function) or "", flags=re.MULTILINE)
    return {"": parts[0].strip()} | {
        name: text.strip("\n") for name, text in zip(parts[1::2], parts[2::2], strict=True)
    }


def page(method: Method) -> str:
    """The page in Markdown."""
    told = sections(method)
    code = told.get("Example", "")
    prose, _, lines = code.partition(">>>")
    parts = [
        ("Use it when", _capital(told.get("Use it when", ""))),
        ("Formula", _capital(told.get("Formula", ""))),
        ("Knobs", _knobs(method, told.get("Knobs", ""))),
        ("Measured", _measured(method.name) if built_in(method) and not isinstance(method, Part) else ""),
        ("Cost", cost(method)),
        ("Example", _example(method, prose, ">>>" + lines) if lines else ""),
        ("Recipe", f"With every knob at its default:\n\n```yaml\n{recipe(method)}```"),
        ("Shapes", f"{_brackets(told.get('Shapes', ''))} {_reads(method)}".strip()),
        ("Source", _flat(told.get("Source", method.source))),
        ("Deviations", _capital(told.get("Deviations", ""))),
    ]
    body = "".join(f"\n## {title}\n\n{text}\n" for title, text in parts if text)
    kind = {"preparation": "prepare: ", "finisher": "finish: "}[method.kind] if isinstance(method, Part) else ""
    return f"# {kind}{method.name}\n\n{_flat(told[''])}\n{body}"


def _measured(name: str) -> str:
    """What the method kept of the experts' gains, where that was measured."""
    rows = measured.rows().get(name, ())
    if not rows:
        return ""
    pages = dict.fromkeys(row.page for row in rows)
    lines = [f"| {row.experts} | {row.row} | {row.kept:.2f} [{row.low:.2f}, {row.high:.2f}] |" for row in rows]
    return "\n".join(
        [
            "The share of what experts gain over SmolLM2 that their merge keeps (0 the base, 1 the experts), with 95 %",
            f"intervals, on small tests: {', '.join(f'[how](../{page})' for page in pages)}.\n",
            "| experts | row | kept |\n|---|---|---|",
            *lines,
        ]
    )


def _flat(text: str) -> str:
    return " ".join(text.split())


def _capital(text: str) -> str:
    flat = _flat(text)
    return flat[:1].upper() + flat[1:]


def _brackets(text: str) -> str:
    """Shapes as code: Markdown takes their stars for emphasis."""
    return re.sub(r"\[[^\]]*\]", r"`\g<0>`", _flat(text))


def _reads(method: Method) -> str:
    if isinstance(method, Part):
        return "For recipes with a base."
    low, high = method.model_count
    models = f"exactly {low}" if low == high else f"at least {low}"
    base = "needed" if method.needs_base else "used where the recipe names one" if method.uses_base else "not used"
    order = " The order of the models matters." if method.ordered else ""
    return f"Models: {models}. Base: {base}.{order}"


def _knobs(method: Method, text: str) -> str:
    """A table of the knobs: what the signature says of each, and what the docstring says."""
    if not method.knobs:
        return _capital(text) or "None."
    told = re.split(r"^ {4}(\w+): ", text, flags=re.MULTILINE)
    words = {name: _flat(about) for name, about in zip(told[1::2], told[2::2], strict=True)}
    rows = [(k.name, _shown(k.default), k.describe, words.get(k.name, "")) for k in method.knobs.values()]
    return "| knob | default | takes | what it does |\n|---|---|---|---|\n" + "\n".join(
        f"| `{name}` | {default} | {_range(takes)} | {about} |" for name, default, takes, about in rows
    )


def _range(takes: str) -> str:
    return takes.replace(" | ", " or ").replace("number in (-inf, inf)", "any number")


def _shown(value: Any) -> str:
    return yaml.safe_dump(value).partition("\n")[0]


def _before(method: Method) -> dict[str, int]:
    """The passes over the inputs beside the one that merges, at the default knobs, where tensors are large."""
    if method.scope({name: knob.default for name, knob in method.knobs.items()}) == "model":
        return WHOLE
    found = dict(PASSES[name] for name in method.reads if name in PASSES)
    found |= {"one pass makes the masks, of one bit an entry and model": 1} if method.masks else {}
    again = {"delta", "deltas"} <= set(method.reads)
    return found | ({"for the models' deltas, beside the merge": 1} if again else {})


def passes(method: Method) -> int:
    """How often each input is read at the default knobs, where tensors are large: for a part, beside the merge."""
    return sum(_before(method).values()) + (not isinstance(method, Part))


def cost(method: Method) -> str:
    """What a merge by this method reads, holds in memory and runs on, in words."""
    before, many = _before(method), passes(method)
    times = {0: "not once", 1: "once", 2: "twice"}.get(many, f"{many} times")
    if isinstance(method, Part):
        told = [f"Each input is read {times} more than without it" + (f": {', '.join(before)}." if before else ".")]
    else:
        told = [f"Each input is read {times}" + (f": {', '.join(before)}, and one merges." if before else ".")]
    told += [MORE[name] for name in (*method.measured_with_examples, *method.statistics, *method.knobs) if name in MORE]
    if "scope" in method.knobs and before is not WHOLE:
        told.append("With `scope: model` " + next(iter(WHOLE)) + ".")
    told.append(f"A worker holds {GRAINS[method.grain]}.")
    return " ".join([*told, "Compiled, without torch." if method.compiled else "Runs as a torch function."])


def _example(method: Method, prose: str, code: str) -> str:
    start = START.format("methods.composition import run" if isinstance(method, Part) else "methods import get")
    lines = "\n".join(line.removeprefix("    ") for line in code.splitlines())
    return f"{_capital(prose)} {TENSORS}\n\n```pycon\n{start}{lines}\n```"


def recipe(method: Method) -> str:
    """A recipe of two models that says every default; of one where only one is used."""
    told: dict[str, Any] = {"method": method.name}
    if method.needs_base:
        told["base"] = "base"
    told["models"] = ["math", "code"][: 1 if "take" in method.knobs else method.model_count[1]]
    told |= {"gates": "gates.safetensors"} if method.gates else {}
    if not isinstance(method, Part) and method.measured_with_examples:
        told["models"] = [{"model": name, "data": f"{name}.jsonl"} for name in told["models"]]
    knobs = {name: knob.default for name, knob in method.knobs.items()}
    if isinstance(method, Part):
        told = {"method": "task_arithmetic", "base": "base", "models": ["math", "code"]}
        told["prepare" if method.kind == "preparation" else "finish"] = [{method.name: knobs}]
    elif knobs:
        told["knobs"] = knobs
        told |= {"output": {"as": "adapter"}} if knobs.get("of") == "factors" or "core_gram" in method.reads else {}
    return yaml.safe_dump(told, sort_keys=False)


def index(listed: Mapping[str, Method]) -> str:
    """The page that lists all methods and parts, by theme."""
    rows: dict[str, list[str]] = {}
    for name, method in listed.items():
        base = "yes" if method.needs_base or isinstance(method, Part) else "optional" if method.uses_base else "no"
        theme = method.kind if isinstance(method, Part) else method.function.__module__.rpartition(".")[2]
        line = f"| [{method.name}]({name}.md) | {_flat(sections(method)[''])} | {base} | {passes(method)} |"
        rows.setdefault(theme, []).append(line)
    head = "| name | what it does | base | passes over the inputs |\n|---|---|---|---|\n"
    order = sorted(rows, key=list({**THEMES, **rows}).index)
    tables = "".join(f"\n## {THEMES.get(theme, theme)}\n\n{head}" + "\n".join(rows[theme]) + "\n" for theme in order)
    return f"# Methods\n\n{ABOUT}\n{tables}"


def write(directory: Path) -> list[Path]:
    """Writes the pages of all that came with graftkit, and their index. Raises OutputError where it cannot."""
    listed = {name: method for name, method in entries().items() if built_in(method)}
    pages = {f"{name}.md": page(method) for name, method in listed.items()} | {"README.md": index(listed)}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in pages.items():
            (directory / name).write_text(MADE + text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{error.filename or directory}: cannot be written ({error.strerror})") from error
    return [directory / name for name in pages]
