"""Running one method on one block: its compiled twin where it has one, else its torch function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from graftkit.errors import GraftError, RecipeError
from graftkit.execution.blocks import Workspace
from graftkit.methods import Method, kernel_of


def apply(
    method: Method,
    given: Mapping[str, Any],
    knobs: Mapping[str, Any],
    shape: tuple[int, ...],
    device: str,
    space: Workspace,
) -> np.ndarray:
    """The method's result for a block, flat [n].

    `given` holds flat blocks; a torch function sees them as [models, *shape], with `shape` the block's.
    """
    arguments = [given[name] for name in method.reads]
    if method.compiled and device == "cpu":
        stack = given.get("deltas", given.get("models"))
        assert stack is not None
        out = space.take("result", stack.shape[1], stack.dtype)
        run_compiled(method, given, knobs, out)
        return out
    import torch

    torch.set_num_threads(1)

    def tensor(name: str, value: Any) -> Any:
        if not isinstance(value, np.ndarray):
            return value
        moved = torch.from_numpy(value).to(device)
        return (
            moved.reshape(len(value), *shape)
            if name in ("models", "deltas")
            else moved.reshape(shape)
            if name == "base"
            else moved
        )

    with torch.inference_mode():
        values = [tensor(n, v) for n, v in zip(method.reads, arguments, strict=True)]
        result = refusing(method, lambda: method.function(*values, **knobs))
    stack = next(given[name] for name in ("deltas", "models", "base") if given.get(name) is not None)
    if result.numel() != stack.shape[-1]:
        raise GraftError(
            f"method {method.name!r} returned {result.numel()} elements for {stack.shape[-1]}; a method keeps the shape"
        )
    return np.ascontiguousarray(result.reshape(-1).cpu().numpy(), stack.dtype)


def run_compiled(method: Method, given: Mapping[str, Any], knobs: Mapping[str, Any], out: np.ndarray) -> None:
    """Fills `out` [n] by a method's compiled twin, or by the factors that it declares."""
    if method.kernel:
        arguments, kernel = [given[name] for name in method.reads], kernel_of(method.kernel)
        return refusing(method, lambda: kernel(*arguments, **knobs, out=out))  # type: ignore[no-any-return]
    stack = given["deltas" if "deltas" in method.reads else "models"]
    factors = (
        given["factors"]
        if "factors" in given
        else refusing(method, lambda: method.factors_of(given, knobs, len(stack)))
    )
    return kernel_of("graftkit.methods.kernels:weighted_sum")(stack, factors, out)


def numbers_of(method: Method, given: Mapping[str, Any], knobs: Mapping[str, Any], count: int) -> dict[str, Any]:
    """A method's factors or ballot for `count` models, under that name, for `blending.fused_of`; or nothing."""
    if method.factors:
        return {"factors": refusing(method, lambda: method.factors_of(given, knobs, count))}
    if method.ballot:
        return {"ballot": refusing(method, lambda: method.ballot_of(given, knobs, count))}
    return {}


def refusing(method: Method, run: Callable[[], Any]) -> Any:
    """A method says by ValueError that it cannot do what its knobs ask."""
    try:
        return run()
    except ValueError as error:
        raise RecipeError(f"{method.name}: {error}") from error
