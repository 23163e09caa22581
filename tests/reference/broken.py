"""Methods that break one promise each, and the test of the conformance suite that must say so; and some sound ones.

Not collected from here: `test_methods.py` runs it as a test module of its own.
"""

from typing import Annotated

import numpy as np
import torch

from graftkit.methods import PerModel, Range, method, parts
from graftkit.methods.random import Keyed
from graftkit.testing import MethodConformance

Weight = Annotated[PerModel, Range(search=(0, 1))]
BREAKS: dict[str, str] = {}
SOUND: list[str] = []


def breaks(promise, **options):
    """Registers a method and a suite that runs it, which is to fail at `promise`."""

    def register(function):
        function.__doc__ = function.__doc__ or "Merges.\n\nweight: any.\nshare: any."
        method(source="-", grain=options.pop("grain", "element"), **options)(function)
        suite = f"Test_{function.__name__}"
        globals()[suite] = type(suite, (MethodConformance,), {"method": function.__name__, "__module__": __name__})
        if promise:
            BREAKS[suite] = promise
        else:
            SOUND.append(suite)
        return function

    return register


@breaks(None, kernel=f"{__name__}:sound_kernel")
def sound(deltas, *, weight: Weight = 1.0):
    return parts.weighted_sum(deltas, weight)


def sound_kernel(deltas, *, weight, out):
    weights = np.broadcast_to(np.asarray(weight, deltas.dtype), len(deltas))
    out[:] = 0
    for w, delta in zip(weights, deltas, strict=True):
        out += w * delta


@breaks(None, grain="row")
def sound_by_rows(deltas, *, weight: Weight = 1.0):
    rows = deltas if deltas.ndim > 1 else deltas.unsqueeze(1)
    sizes = rows.abs().flatten(2).sum(dim=(0, 2)) if rows.ndim > 2 else rows.abs().sum(dim=0)
    return parts.weighted_sum(deltas, weight) * sizes.reshape((*deltas.shape[1:2], *[1] * (deltas.ndim - 2)))


@breaks(None, grain="tensor")
def sound_on_the_whole(deltas, *, weight: Weight = 1.0):
    return parts.weighted_sum(deltas, weight) * deltas.abs().sum()


@breaks(None, base_optional=True)
def sound_without_a_base(deltas, norms, *, weight: Weight = 1.0):
    return parts.weighted_sum(deltas, weight) * norms.amax().to(deltas.dtype)


@breaks(None)
def sound_by_threshold(deltas, threshold, *, density: Annotated[PerModel, Range(0, 1)] = 0.5):
    """Merges.

    density: any.
    """
    return parts.trim(deltas, threshold).sum(dim=0)


@breaks("test_zero_deltas_return_the_base")
def forgets_the_base(deltas, *, weight: Weight = 1.0):
    return parts.weighted_sum(deltas, weight) + 1e-3


@breaks("test_permuting_models_changes_nothing")
def counts_the_first_twice(deltas, *, weight: Weight = 1.0):
    return parts.weighted_sum(deltas, weight) + deltas[0]


@breaks("test_inputs_stay_unmodified")
def writes_into_its_inputs(deltas, *, weight: Weight = 1.0):
    return deltas.mul_(2).sum(dim=0)


@breaks("test_shapes")
def flattens(deltas, *, weight: Weight = 1.0):
    return parts.weighted_sum(deltas, weight).reshape(-1)


@breaks("test_shapes")
def is_always_float32(deltas, *, weight: Weight = 1.0):
    return parts.weighted_sum(deltas, weight).float()


@breaks("test_constants_are_finite")
def divides_by_the_norm(deltas, *, weight: Weight = 1.0):
    return parts.weighted_sum(deltas, weight) / deltas.norm()


@breaks("test_blocks_are_exact")
def looks_at_its_neighbours(deltas, *, weight: Weight = 1.0):
    return parts.weighted_sum(deltas, weight) * deltas.abs().amax()


@breaks("test_knob_extremes")
def ends_in_infinity(deltas, *, share: Annotated[float, Range(0, 1)] = 0.5):
    return deltas.sum(dim=0) / share


@breaks("test_same_seed_same_result")
def draws_for_itself(deltas, *, weight: Weight = 1.0):
    return parts.weighted_sum(deltas, weight) * torch.rand(deltas.shape[1:], dtype=deltas.dtype)


@breaks("test_streams_differ")
def shares_its_stream(deltas, rng, *, weight: Weight = 1.0):
    uniform = Keyed(rng.keys[:1] * len(rng.keys), rng.start).uniform(deltas)
    return parts.weighted_sum(parts.drop(deltas, uniform, 0.5, True), weight)


@breaks("test_blocks_are_exact")
def forgets_where_it_is(deltas, rng, *, weight: Weight = 1.0):
    return parts.weighted_sum(parts.drop(deltas, Keyed(rng.keys).uniform(deltas), 0.5, True), weight)


@breaks("test_gradients_are_finite")
def stops_gradients(deltas, *, weight: Weight = 1.0):
    return parts.weighted_sum(deltas.detach(), weight)


@breaks("test_gradients_are_finite")
def has_a_gradient_of_infinity(deltas, *, weight: Weight = 1.0):
    return parts.weighted_sum(deltas.abs().sqrt(), weight) + 0 * deltas.sum(dim=0)


@breaks("test_float32_agrees_with_float64")
def loses_digits(deltas, *, weight: Weight = 1.0):
    return parts.weighted_sum((deltas + 1000) - 1000, weight)


@breaks("test_every_knob_is_documented")
def says_nothing(deltas, *, weight: Weight = 1.0):
    """Merges."""
    return parts.weighted_sum(deltas, weight)


@breaks("test_defaults_lie_in_their_ranges")
def starts_outside(deltas, *, share: Annotated[float, Range(0, 1)] = 2.0):
    return deltas.sum(dim=0) * share


@breaks("test_an_element_needs_no_neighbours")
def depends_on_the_shape(deltas, *, weight: Weight = 1.0):
    return parts.weighted_sum(deltas, weight) * (2 if deltas.ndim == 3 else 1)


@breaks("test_blocks_are_exact", grain="row")
def looks_at_other_rows(deltas, *, weight: Weight = 1.0):
    return parts.weighted_sum(deltas, weight) * deltas.abs().amax()


@breaks("test_counts_of_models")
def takes_three_at_most(deltas, *, weight: Weight = 1.0):
    return parts.weighted_sum(deltas, weight) / (5 - len(deltas))


@breaks("test_kinds_of_values_are_finite")
def overflows(deltas, *, weight: Weight = 1.0):
    return parts.weighted_sum(deltas, weight) * (deltas[0] ** 12).exp().clamp(max=2) / (1 + 0 * deltas[0] ** 12)


@breaks("test_knob_extremes_together")
def has_a_bad_corner(deltas, *, share: Annotated[float, Range(0, 1)] = 0.5, square: bool = False):
    """Merges.

    share: any. square: any.
    """
    return deltas.sum(dim=0) / (1.0 if share == 0 and not square else 1.0 - (square and share == 0))


@breaks("test_kernel_agrees", kernel=f"{__name__}:kernel_off_by_a_little")
def has_a_kernel_off_by_a_little(deltas, *, weight: Weight = 1.0):
    return parts.weighted_sum(deltas, weight)


def kernel_off_by_a_little(deltas, *, weight, out):
    sound_kernel(deltas, weight=weight, out=out)
    out *= 1 + 2.0**-5


@breaks("test_kernel_agrees", kernel=f"{__name__}:kernel_that_leaves_the_last")
def has_a_kernel_that_leaves_the_last(deltas, *, weight: Weight = 1.0):
    return parts.weighted_sum(deltas, weight)


def kernel_that_leaves_the_last(deltas, *, weight, out):
    sound_kernel(deltas[:, :-1], weight=weight, out=out[:-1])


@breaks("test_kernel_blocks_are_exact", kernel=f"{__name__}:kernel_that_looks_around")
def has_a_kernel_that_looks_around(deltas, *, weight: Weight = 1.0):
    return parts.weighted_sum(deltas, weight)


def kernel_that_looks_around(deltas, *, weight, out):
    sound_kernel(deltas, weight=weight, out=out)
    out *= 1 + 1e-6 * out.max()
