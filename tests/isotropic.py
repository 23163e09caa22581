"""A method that commutes with rotations and is no weighted sum, for tests."""

import torch


def flattened(deltas: torch.Tensor, shape: tuple[int, ...], *, scale: float = 1.0) -> torch.Tensor:
    """The sum of the deltas with all singular values set to their mean over the dense rank.

    Knobs:
        scale: factor on the result.
    """
    u, s, v = torch.linalg.svd(deltas.sum(dim=0), full_matrices=False)
    real = (s > 1e-9 * s[0]).to(s.dtype)
    return scale * (u * (real * s.sum() / min(shape))) @ v
