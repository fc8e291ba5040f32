"""(provisional: to be replaced) matrix views of weights."""

from __future__ import annotations

from torch import Tensor


def as_matrix(weight: Tensor, *, transposed: bool = False) -> Tensor:
    """View a weight as a matrix (out, in…)."""
    if weight.ndim not in (2, 4):
        raise ValueError(f"no matrix view of shape {tuple(weight.shape)}.")
    return weight.T if transposed else weight.flatten(1)


def from_matrix(matrix: Tensor, like: Tensor, *, transposed: bool = False) -> Tensor:
    """Undo `as_matrix`."""
    return matrix.T if transposed else matrix.reshape(like.shape)
