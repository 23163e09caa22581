"""What every method promises the engine, as tests. See `graftkit.testing` for how to run them on your own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pytest

from graftkit import methods
from graftkit.errors import RecipeError
from graftkit.methods import Method
from graftkit.methods.random import Keyed
from graftkit.testing import evaluation, samples
from graftkit.testing.rounding import beyond_one_unit, rounded
from graftkit.testing.samples import Sample

if TYPE_CHECKING:
    from torch import Tensor

LONG = 5000  # elements: more than two of the chunks that compiled twins work through
OUTPUTS = {"float32": "bfloat16", "float64": "float32"}
"""The widest output dtype that the engine computes in float32, and in float64."""


class MethodConformance:
    """The promises of a method, as a class to derive from; pytest collects the derived class, named `Test...`.

    Override a test to say that a promise does not hold, and why.
    """

    method: ClassVar[str] = ""
    """The registered name."""

    knobs: ClassVar[Mapping[str, Any]] = {}
    """Knob values that all tests start from, where the defaults would hide what the method does."""

    close: ClassVar[float] = 1e-12
    """Largest error, relative to the largest input, that counts as rounding in float64."""

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Gives `test_knob_extremes` its cases, one per end of each knob."""
        if "extreme" in metafunc.fixturenames:
            cases = dict(samples.extremes(self._method, max(samples.counts(self._method, 3))))
            metafunc.parametrize("extreme", list(cases.values()), ids=list(cases))

    @property
    def _method(self) -> Method:
        if not self.method:
            raise TypeError(f'{type(self).__name__} names no method: write `method = "..."` in its body')
        return methods.get(self.method)

    def _sample(self, shape: tuple[int, ...], kind: str = "random", **options: Any) -> Sample:
        return samples.sample(self._method, shape, kind, **options)

    def _given(self, sample: Sample, knobs: Mapping[str, Any] | None = None) -> dict[str, Any]:
        return evaluation.inputs(self._method, sample, {**self.knobs, **(knobs or {})})

    def _run(self, sample: Sample, knobs: Mapping[str, Any] | None = None) -> Tensor:
        return self._on(self._given(sample, knobs), knobs)

    def _on(self, given: Mapping[str, Any], knobs: Mapping[str, Any] | None = None) -> Tensor:
        return evaluation.weights(self._method, given, {**self.knobs, **(knobs or {})})

    def _distinct(self, sample: Sample) -> dict[str, Any]:
        return samples.distinct(self._method, sample.count)

    # What it says of itself

    def test_defaults_lie_in_their_ranges(self) -> None:
        """Every knob accepts its own default, and the values that the tests start from."""
        for name, knob in self._method.knobs.items():
            knob.check(knob.default, name)
        for name, value in self.knobs.items():
            self._method.knobs[name].check(value, name)

    def test_every_knob_is_documented(self) -> None:
        """The docstring begins with a sentence and has a line `name: ...` for every knob: the help is made of it."""
        text = self._method.function.__doc__ or ""
        first = text.strip().partition("\n")[0]
        assert first.endswith("."), f"the docstring of {self.method} does not begin with a sentence"
        missing = [name for name in self._method.knobs if f"{name}: " not in text]
        assert not missing, f"the docstring of {self.method} says nothing of {', '.join(missing)}"

    def test_planning_needs_no_torch(self) -> None:
        """Importing the module that defines the method leaves torch and numba alone."""
        module = self._method.function.__module__
        if module == type(self).__module__:
            pytest.skip("the method is defined in the test itself")
        heavy = _heavy_imports(module)
        assert not heavy, f"importing {module} imports {heavy}; import it inside functions"

    # What it computes

    def test_zero_deltas_return_the_base(self) -> None:
        """Models that equal the base merge to the base, whatever the weights."""
        sample = self._sample((4, 6))
        same = Sample(sample.base, sample.base.expand_as(sample.models).clone(), sample.rng)
        for knobs in ({}, self._distinct(sample)):
            result = self._run(same, knobs)
            if self._method.returns_delta:
                assert bool((result == sample.base).all()), f"{self.method} changes the base for deltas of zero"
            else:
                self._assert_close(result, sample.base, "merging copies of one model does not return it")

    def test_a_base_of_zero_is_no_base(self) -> None:
        """Where it can do without a base, zeros in its place give what no base gives."""
        if self._method.needs_base or not self._method.uses_base:
            pytest.skip("needs its base" if self._method.needs_base else "looks at no base")
        sample = self._sample((4, 6))
        measured = evaluation.of_examples(self._method, sample, self.knobs)
        alone = self._method.run(models=sample.models, rng=sample.rng, **self.knobs, **measured)
        self._assert_close(alone, self._run(replace(sample, base=sample.base * 0)), "a base of zero is not no base")

    def test_permuting_models_changes_nothing(self) -> None:
        """Models in another order, with their knobs and streams, give the same result up to rounding."""
        if self._method.ordered:
            pytest.skip(f"{self.method} is declared ordered")
        sample = self._sample((4, 6))
        order = [*range(1, sample.count), 0]
        knobs = self._distinct(sample)
        moved = {name: tuple(values[k] for k in order) for name, values in knobs.items()}
        result = self._run(sample.permuted(order), moved)
        self._assert_close(result, self._run(sample, knobs), f"{self.method} depends on the order of its models")

    def test_inputs_stay_unmodified(self) -> None:
        """The function writes into none of its inputs."""
        for knobs in samples.variants(self._method):
            given = self._given(self._sample((4, 6)), knobs)
            before = {name: given[name].clone() for name in self._method.reads if hasattr(given[name], "clone")}
            self._on(given, knobs)
            changed = [name for name, value in before.items() if not bool((given[name] == value).all())]
            assert not changed, f"{self.method} writes into {', '.join(changed)} with {knobs}"

    @pytest.mark.parametrize("shape", samples.SHAPES, ids=str)
    def test_shapes(self, shape: tuple[int, ...]) -> None:
        """Scalars, vectors, thin matrices, three dimensions and empty tensors keep their shape and dtype."""
        for dtype in OUTPUTS:
            sample = self._sample(shape, dtype=dtype)
            result = evaluation.result(self._method, self._given(sample), self.knobs)
            assert tuple(result.shape) == shape, f"got shape {tuple(result.shape)}"
            assert result.dtype == sample.base.dtype, f"got {result.dtype} from {sample.base.dtype}"
            assert bool(result.isfinite().all()), f"not finite: {result}"

    @pytest.mark.parametrize("count", [1, 2, 3, 5])
    def test_counts_of_models(self, count: int) -> None:
        """Any number of models that it says it takes, as one value of each knob or as one a model."""
        if count not in samples.counts(self._method):
            pytest.skip(f"{self.method} takes {self._method.model_count} models")
        sample = self._sample((4, 6), count=count)
        for knobs in ({}, self._distinct(sample)):
            assert bool(self._run(sample, knobs).isfinite().all())

    @pytest.mark.parametrize("values", ["zero", "one", "a zero base", "one changed model"])
    def test_constants_are_finite(self, values: str) -> None:
        """Zero and constant tensors give finite results: no division by a norm, a range or a spread of zero."""
        sample = self._sample((4, 6))
        fill = 0.0 if values == "zero" else 1.0
        base, stack = sample.base.clone().fill_(fill), sample.models.clone().fill_(fill)
        if values == "a zero base":
            base = base * 0
        elif values == "one changed model":
            stack[0] = sample.models[0]
        for knobs in samples.variants(self._method):
            result = self._run(Sample(base, stack, sample.rng), knobs)
            assert bool(result.isfinite().all()), f"not finite with {knobs}: {result}"

    @pytest.mark.parametrize("kind", samples.KINDS)
    def test_kinds_of_values_are_finite(self, kind: str) -> None:
        """Tied, sparse, tiny and huge numbers give finite results."""
        result = self._run(self._sample((4, 6), kind))
        assert bool(result.isfinite().all()), f"not finite: {result}"

    def test_knob_extremes(self, extreme: dict[str, Any]) -> None:
        """A knob at an end of its range, or at any choice, gives a finite result or a ValueError that says why not."""
        self._assert_finite_or_refused(extreme)

    def test_knob_extremes_together(self) -> None:
        """All knobs at their ends, in every combination."""
        for knobs in samples.combinations(self._method):
            self._assert_finite_or_refused(knobs)

    # What the engine does with it

    def test_blocks_are_exact(self) -> None:
        """Computed in blocks, as its grain allows, it gives the same bits; statistics are those of the whole tensor."""
        grain = self._method.grain
        if grain == "tensor":
            pytest.skip("needs its tensors whole")
        shape = (7, 6) if grain == "row" else (42,)
        cuts = (0, 6, 24, 42) if grain == "row" else (0, 1, 7, 12, 30, 42)
        for knobs in samples.variants(self._method):
            sample = self._sample(shape)
            given = self._given(sample, knobs | self._distinct(sample))
            blocks = (evaluation.block(given, *ends, shape[1:]) for ends in pairwise(cuts))
            parts = [self._on(part, knobs | self._distinct(sample)).reshape(-1) for part in blocks]
            whole = self._on(given, knobs | self._distinct(sample)).reshape(-1)
            _assert_same_bits(parts, whole, f"{self.method} in blocks {cuts} differs from the whole with {knobs}")

    def test_an_element_needs_no_neighbours(self) -> None:
        """A method of grain `element` gives the same bits whatever the shape of its tensors."""
        if self._method.grain != "element":
            pytest.skip("sees more than single elements")
        sample = self._sample((4, 6))
        flat = Sample(sample.base.reshape(-1), sample.models.reshape(sample.count, -1), sample.rng)
        message = f"{self.method} depends on the shape of its tensors"
        _assert_same_bits([self._run(flat)], self._run(sample).reshape(-1), message)

    def test_the_engine_agrees(self, tmp_path: Path) -> None:
        """Merged from files, it gives what the function gives, within one unit of a float32's last place.

        With a base, and without one where it can do without: deltas are then the models themselves.
        """
        count = samples.counts(self._method, 3)[-1]
        self._merge_files(tmp_path / "with", count, True)
        if not self._method.needs_base:
            self._merge_files(tmp_path / "without", count, False)

    def _merge_files(self, directory: Path, count: int, with_base: bool) -> None:
        large = (20, 15) if self._method.grain == "tensor" else (600, 450)  # more than the engine handles at once
        shapes = {"layers.0.weight": large, "layers.0.bias": (5,), "scale": ()}
        tensors = {n: self._sample(shape, count=count, seed=k) for k, (n, shape) in enumerate(shapes.items())}
        if not with_base:
            tensors = {name: replace(sample, base=sample.base * 0) for name, sample in tensors.items()}
        merged = evaluation.through_files(self._method, directory, tensors, self.knobs, with_base)
        for name, (got, rng) in merged.items():
            given = self._given(replace(tensors[name], rng=rng))
            self._assert_within_one_unit(got, self._on(given), given, name)

    def test_same_seed_same_result(self) -> None:
        """Two runs on the same inputs give the same bits."""
        for knobs in samples.variants(self._method):
            first, second = self._run(self._sample((4, 6)), knobs), self._run(self._sample((4, 6)), knobs)
            assert bool((first == second).all()), f"{self.method} differs from run to run with {knobs}"

    def test_streams_differ(self) -> None:
        """Another seed, another tensor, and a model that is listed twice get other random numbers."""
        if "rng" not in self._method.reads:
            pytest.skip("draws no random numbers")
        sample = self._sample((8, 8), count=max(samples.counts(self._method, 2)))
        equal = Sample(sample.base, sample.models[:1].expand_as(sample.models).clone(), sample.rng)

        def drawn(keyed: Keyed) -> Tensor:
            return self._run(Sample(equal.base, equal.models, keyed))

        first, seed, tensor = (
            Keyed.of(seed=s, models=equal.count, tensor=t) for s, t in ((0, "a"), (1, "a"), (0, "b"))
        )
        assert not bool((drawn(first) == drawn(seed)).all()), "seeds change nothing"
        assert not bool((drawn(first) == drawn(tensor)).all()), "two tensors share their random numbers"
        twice = Keyed((first.keys[0],) * equal.count)
        if equal.count > 1:
            assert not bool((drawn(first) == drawn(twice)).all()), "a model listed twice shares its random numbers"

    @pytest.mark.parametrize("kind", ["random", "tied", "zeros"])
    def test_gradients_are_finite(self, kind: str) -> None:
        """Gradients reach the models and every per-model knob named `weight`, and are finite."""
        import torch

        sample = self._sample((4, 6), kind)
        stack = sample.models.clone().requires_grad_()
        knobs = self._distinct(sample)
        if "weight" in knobs:
            knobs["weight"] = torch.tensor(knobs["weight"], dtype=torch.float64, requires_grad=True)
        self._run(Sample(sample.base, stack, sample.rng), knobs).square().sum().backward()
        for name, leaf in (("models", stack), ("weight", knobs.get("weight"))):
            if leaf is not None:
                assert leaf.grad is not None, f"no gradient reaches {name}"
                assert bool(leaf.grad.isfinite().all()), f"the gradient of {name} is not finite"

    def test_float32_agrees_with_float64(self) -> None:
        """Float32 gives what float64 gives, to float32's rounding."""
        for knobs in samples.variants(self._method):
            narrow, wide = (self._sample((16, 16), dtype=dtype) for dtype in ("float32", "float64"))
            result = self._run(narrow, knobs | self._distinct(narrow)).double()
            expected = self._run(wide, knobs | self._distinct(wide))
            worst = float((result - expected).abs().max()) / float(wide.models.abs().max())
            assert worst <= 2e-6, f"{self.method} in float32 is off by {worst:.1e} of the largest weight with {knobs}"

    def test_a_gpu_agrees(self) -> None:
        """On CUDA it gives what the CPU gives, within one unit of a bfloat16 output's last place."""
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device here")
        for kind in samples.KINDS:
            for knobs in samples.variants(self._method):
                given = self._given(self._sample((300,), kind, dtype="float32"), knobs)
                moved = {n: value.cuda() if isinstance(value, torch.Tensor) else value for n, value in given.items()}
                here = evaluation.kernel_weights if self._method.compiled else evaluation.weights
                expected = here(self._method, given, {**self.knobs, **knobs})
                self._assert_within_one_unit(self._on(moved, knobs), expected, given, f"{kind}, {knobs}")

    # Its compiled twin

    @pytest.mark.parametrize("kind", samples.KINDS)
    @pytest.mark.parametrize("dtype", list(OUTPUTS))
    def test_kernel_agrees(self, dtype: str, kind: str) -> None:
        """The compiled twin gives what the function gives, within one unit of the output's last place, for 1..5 models.

        In float32 the output is bfloat16, in float64 it is float32, as in the engine.
        """
        self._needs_kernel()
        for count in samples.counts(self._method):
            sample = self._sample((300,), kind, count=count, dtype=dtype, seed=count)
            for knobs in self._kernel_knobs(count):
                try:
                    given = self._given(sample, knobs)
                    expected = self._on(given, knobs)
                except ValueError:
                    continue
                result = evaluation.kernel_weights(self._method, given, {**self.knobs, **knobs})
                self._assert_within_one_unit(result, expected, given, f"{count} models, {knobs}")

    @pytest.mark.parametrize("dtype", list(OUTPUTS))
    def test_kernel_blocks_are_exact(self, dtype: str) -> None:
        """The compiled twin in blocks gives the bits that it gives on the whole."""
        self._needs_kernel()
        cuts = (0, 1, 2047, 2050, 4096, LONG)
        for knobs in samples.variants(self._method):
            sample = self._sample((LONG,), dtype=dtype)
            chosen = {**self.knobs, **knobs, **self._distinct(sample)}
            given = evaluation.inputs(self._method, sample, chosen)
            blocks = (evaluation.block(given, *ends) for ends in pairwise(cuts))
            parts = [evaluation.kernel_weights(self._method, part, chosen) for part in blocks]
            whole = evaluation.kernel_weights(self._method, given, chosen)
            _assert_same_bits(parts, whole, f"the kernel of {self.method} in blocks {cuts} differs with {knobs}")

    def _kernel_knobs(self, count: int) -> Iterable[dict[str, Any]]:
        for knobs in samples.variants(self._method):
            yield knobs
            yield knobs | samples.distinct(self._method, count)
            yield knobs | samples.distinct(self._method, count) | samples.negative(self._method, count)
        for _, knobs in samples.extremes(self._method, count):
            yield knobs

    def _needs_kernel(self) -> None:
        if not self._method.compiled:
            pytest.skip(f"{self.method} has no compiled twin")

    def _assert_close(self, got: Tensor, want: Tensor, message: str) -> None:
        worst = float((got - want).abs().max())
        assert worst <= self.close * float(want.abs().max()), f"{message}: off by {worst:.2e}"

    def _assert_finite_or_refused(self, knobs: Mapping[str, Any]) -> None:
        for dtype in OUTPUTS:
            try:
                result = self._run(self._sample((4, 6), dtype=dtype), knobs)
            except (RecipeError, ValueError) as refusal:
                assert str(refusal), f"{self.method} refuses {knobs} without a word"
            else:
                assert bool(result.isfinite().all()), f"{self.method} is not finite with {knobs}: {result}"

    def _assert_within_one_unit(self, got: Tensor, want: Tensor, given: Mapping[str, Any], case: str) -> None:
        dtype = OUTPUTS[str(given["base"].dtype).removeprefix("torch.")]
        largest = given["models"].abs().amax(dim=0).maximum(given["base"].abs()).double().numpy()
        here, there = rounded(got, dtype), rounded(want, dtype)
        bad = np.flatnonzero(beyond_one_unit(here, there, dtype, largest))
        shown = ", ".join(f"[{i}] {here.flat[i]} instead of {there.flat[i]}" for i in bad[:3])
        assert not bad.size, f"{self.method} is beyond one unit of {dtype} in {bad.size} entries ({case}): {shown}"


def _assert_same_bits(parts: list[Tensor], whole: Tensor, message: str) -> None:
    import torch

    joined = torch.cat(parts)
    different = int((joined != whole).sum())
    assert not different, f"{message}: {different} of {whole.numel()} elements"


@lru_cache
def _heavy_imports(module: str) -> str:
    """Which of torch and numba a fresh interpreter has loaded after importing the module."""
    program = f"import sys, {module}; print(*sorted({{'torch', 'numba', 'transformers'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return done.stdout.strip()
