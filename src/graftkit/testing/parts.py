"""What every preparation and every finisher promises the engine, as tests.

Used as `MethodConformance` is: a class derived from `PreparationConformance` or `FinisherConformance` names its `part`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import pytest

from graftkit.methods.composition import Part, get_part
from graftkit.methods.random import Keyed
from graftkit.testing import samples

if TYPE_CHECKING:
    from torch import Tensor

LONG = 5000
DTYPES = ("float32", "float64")


class PartConformance:
    """What preparations and finishers have in common. Derive from one of the two below."""

    kind: ClassVar[Literal["preparation", "finisher"]]
    part: ClassVar[str] = ""
    """The registered name."""
    knobs: ClassVar[Mapping[str, Any]] = {}
    """Knob values that all tests start from, where the defaults would hide what the part does."""

    @property
    def _part(self) -> Part:
        if not self.part:
            raise TypeError(f'{type(self).__name__} names no part: write `part = "..."` in its body')
        return get_part(self.kind, self.part)

    def _settings(self, knobs: Mapping[str, Any] | None = None) -> dict[str, Any]:
        return self._part.settings({**self.knobs, **(knobs or {})})

    def _given(self, shape: tuple[int, ...], kind: str = "random", dtype: str = "float64", **knobs: Any) -> Any:
        """Everything that the part may read, by name, with the statistics of the whole tensor."""
        import torch

        sample = samples.sample(self._part, shape, kind, dtype=dtype)
        deltas = sample.models - sample.base
        delta = deltas.sum(dim=0)
        given = {"deltas": deltas, "delta": delta, "rng": sample.rng, "norm": delta.double().norm()}
        with torch.no_grad():
            return given | self._part.measured(given, self._settings(knobs))

    def _run(self, given: Mapping[str, Any], **knobs: Any) -> Tensor:
        made = self._part.function(*(given[name] for name in self._part.reads), **self._settings(knobs))
        return made  # type: ignore[no-any-return]

    def _changed(self, given: Mapping[str, Any]) -> Any:
        return given[self._part.reads[0]]

    def _cases(self) -> Iterator[dict[str, Any]]:
        yield from (knobs for _, knobs in samples.extremes(self._part, 3))
        yield from samples.combinations(self._part)
        yield samples.distinct(self._part, 3)

    def test_what_it_says_of_itself(self) -> None:
        """Defaults lie in their ranges; the docstring begins with a sentence and has a line for every knob."""
        text = self._part.function.__doc__ or ""
        assert text.strip().partition("\n")[0].endswith("."), "the docstring does not begin with a sentence"
        for name, knob in self._part.knobs.items():
            knob.check(knob.default, name)
            assert f"{name}: " in text, f"the docstring says nothing of {name}"

    @pytest.mark.parametrize("shape", samples.SHAPES, ids=str)
    def test_shapes(self, shape: tuple[int, ...]) -> None:
        """Scalars, vectors, thin matrices, three dimensions and empty tensors keep their shape and dtype."""
        for dtype in DTYPES:
            given = self._given(shape, dtype=dtype)
            made = self._run(given)
            assert made.shape == self._changed(given).shape, f"got {tuple(made.shape)} for {shape}"
            assert made.dtype == self._changed(given).dtype, f"got {made.dtype} from {dtype}"
            assert bool(made.isfinite().all()), f"not finite: {made}"

    @pytest.mark.parametrize("kind", samples.KINDS)
    def test_values_and_knobs_are_finite(self, kind: str) -> None:
        """Tied, sparse, tiny and huge numbers give finite results, with every knob at its ends, alone and together."""
        for knobs in self._cases():
            made = self._run(self._given((4, 6), kind, **knobs), **knobs)
            assert bool(made.isfinite().all()), f"not finite with {knobs}: {made}"

    def test_zero_stays_zero(self) -> None:
        """What is not there does not come to be."""
        given = self._given((4, 6))
        given = {name: value * 0 if name in ("deltas", "delta", "norm") else value for name, value in given.items()}
        given |= self._part.measured(given, self._settings())
        assert not bool(self._run(given).any())

    def test_inputs_stay_unmodified(self) -> None:
        """The function writes into none of its inputs."""
        given = self._given((4, 6))
        before = {name: value.clone() for name, value in given.items() if name != "rng"}
        self._run(given)
        assert all(bool((given[name] == value).all()) for name, value in before.items())

    def test_float32_agrees_with_float64(self) -> None:
        """Float32 gives what float64 gives, to float32's rounding."""
        narrow, wide = (self._given((16, 16), dtype=dtype) for dtype in DTYPES)
        worst = float((self._run(narrow).double() - self._run(wide)).abs().max())
        assert worst <= 4e-6 * float(self._run(wide).abs().max()), f"{self.part} in float32 is off by {worst:.1e}"

    @pytest.mark.parametrize("kind", ["random", "tied", "zeros"])
    def test_gradients_are_finite(self, kind: str) -> None:
        """Gradients reach the deltas and are finite; statistics count as constants."""
        given = self._given((4, 6), kind)
        leaf = self._changed(given).clone().requires_grad_()
        self._run({**given, self._part.reads[0]: leaf}).square().sum().backward()
        assert leaf.grad is not None and bool(leaf.grad.isfinite().all())

    def test_blocks_are_exact(self) -> None:
        """In blocks, as its grain allows, it gives the same bits; statistics are those of the whole tensor."""
        if self._part.grain == "tensor":
            pytest.skip("needs its tensors whole")
        shape = (7, 6) if self._part.grain == "row" else (42,)
        for knobs in samples.variants(self._part):
            given = self._given(shape, **knobs)
            whole = self._run(given, **knobs).reshape(-1, 42)
            for start, stop in pairwise((0, 6, 24, 42)):
                part = self._run(_block(given, start, stop, shape[1:]), **knobs)
                same = part.reshape(len(whole), -1) == whole[:, start:stop]
                assert bool(same.all()), f"elements [{start}, {stop}) differ from the whole with {knobs}"


class PreparationConformance(PartConformance):
    """The promises of a preparation. Override a test to say that a promise does not hold, and why."""

    kind = "preparation"

    def test_models_do_not_see_each_other(self) -> None:
        """A model is prepared alike whoever stands beside it."""
        given = self._given((4, 6))
        alone = {n: v[1:2] if n == "deltas" else v for n, v in given.items()} | {"rng": Keyed(given["rng"].keys[1:2])}
        alone |= self._part.measured(alone, self._settings())
        assert bool((self._run(alone)[0] == self._run(given)[1]).all())

    @pytest.mark.parametrize("kind", samples.KINDS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_kernel_agrees(self, dtype: str, kind: str) -> None:
        """The compiled twin, whole and in blocks, gives what the function gives, to one rounding."""
        from graftkit.methods import kernel_of

        if self._part.kernel is None:
            pytest.skip(f"{self.part} has no compiled twin")
        for knobs in self._cases():
            given = self._given((LONG,), kind, dtype, **knobs)
            made = given["deltas"].numpy().copy()
            for start, stop in pairwise((0, 1, 2047, 2050, 4096, LONG)):
                block = _block(given, start, stop, ()) | {"deltas": np.ascontiguousarray(made[:, start:stop])}
                values = [block[name] for name in self._part.reads]
                flat = [value.numpy() if hasattr(value, "numpy") else value for value in values]
                kernel_of(self._part.kernel)(*flat, **self._settings(knobs))
                made[:, start:stop] = block["deltas"]
            wanted = self._run(given, **knobs).numpy()
            unit = np.finfo(dtype).eps * np.abs(wanted)
            assert (np.abs(made - wanted) <= unit).all(), f"the kernel of {self.part} differs with {knobs}"


class FinisherConformance(PartConformance):
    """The promises of a finisher. Override a test to say that a promise does not hold, and why."""

    kind = "finisher"

    def test_permuting_models_changes_nothing(self) -> None:
        """Models in another order give the same result up to rounding."""
        given = self._given((4, 6))
        moved = {**given, "deltas": given["deltas"][[2, 0, 1]]}
        moved |= self._part.measured(moved, self._settings())
        gap = (self._run(moved) - self._run(given)).abs().max()
        assert float(gap) <= 1e-12 * float(given["delta"].abs().max())

    def test_scaling_everything_scales_the_result(self) -> None:
        """Deltas twice as large give a result twice as large."""
        given = self._given((4, 6))
        larger = {**given, "deltas": 2 * given["deltas"], "delta": 2 * given["delta"], "norm": 2 * given["norm"]}
        larger |= self._part.measured(larger, self._settings())
        gap = (self._run(larger) - 2 * self._run(given)).abs().max()
        assert float(gap) <= 1e-12 * float(given["delta"].abs().max())


def _block(given: Mapping[str, Any], start: int, stop: int, row: tuple[int, ...]) -> dict[str, Any]:
    """Elements `[start, stop)` of all inputs, as the engine cuts them."""
    stack, delta = given["deltas"], given["delta"].reshape(-1)[start:stop]
    cut = stack.reshape(len(stack), -1)[:, start:stop].reshape(len(stack), -1, *row)
    return {**given, "deltas": cut, "delta": delta.reshape(-1, *row), "rng": Keyed(given["rng"].keys, start)}
