"""Which matrix a stored weight stands for: 2-D views without copies, and the way back."""

from __future__ import annotations

import torch
from torch import Tensor


def as_matrix(weight: Tensor, *, transposed: bool = False) -> Tensor:
    """View a weight as the matrix (out, in) whose singular values the theory speaks of.

    linear (out, in): as it is. Conv1D of GPT-2, stored (in, out): its transpose (`transposed=True`). Convolution
    (out, in, kh, kw) or (out, in, kt, kh, kw): (out, in * kh * kw), the matrix that multiplies unfolded patches; a
    compensation C (out, out) on its left is then a 1 x 1 convolution behind it. Its singular values are not those of
    the convolution as a map between images, which depend on the image size and the padding.

    A vector (norm gain) stands for diag(weight): use `diagonal_sigma_max`, which builds no matrix.

    Cost: none; the result shares the memory of `weight`.

    Args:
        weight: (out, in), or (out, in, ...) with two or three kernel axes.
        transposed: Whether a 2-D weight is stored (in, out).

    Returns:
        (out, in * prod(kernel)), a view of `weight`.

    Raises:
        ValueError: If the weight is a scalar or a vector, has three axes (stacked experts), or has no 2-D view.

    >>> as_matrix(torch.zeros(8, 3, 5, 5)).shape
    torch.Size([8, 75])
    """
    shape = tuple(weight.shape)
    if weight.ndim == 2:
        return weight.T if transposed else weight
    if transposed:
        raise ValueError(f"transposed=True needs a weight with 2 axes, got shape {shape}.")
    if weight.ndim == 1:
        raise ValueError(f"a vector {shape} stands for diag(weight): use diagonal_sigma_max.")
    if weight.ndim == 3:
        # A 1-D convolution has three axes too; guessing wrong would multiply experts that never meet.
        raise ValueError(
            f"three axes {shape} are read as stacked experts: take one expert, weight[e] "
            "(for a 1-D convolution pass weight.flatten(1))."
        )
    if weight.ndim not in (4, 5):
        raise ValueError(f"weight must have 2, 4 or 5 axes, got shape {shape}.")
    try:
        return weight.view(shape[0], -1)
    except RuntimeError:
        # channels_last weights: a silent copy would swallow in-place edits.
        raise ValueError(
            f"a weight {shape} with strides {weight.stride()} has no 2-D view: pass weight.contiguous()."
        ) from None


def from_matrix(matrix: Tensor, like: Tensor, *, transposed: bool = False) -> Tensor:
    """Return a matrix in the shape a weight is stored in; undoes `as_matrix`.

    Cost: none where strides allow a view, one copy otherwise.

    Args:
        matrix: (out, in * prod(kernel)); its dtype and device are kept.
        like: The stored weight, for its shape.
        transposed: Whether a 2-D weight is stored (in, out).

    Returns:
        `matrix` with the shape of `like`.

    Raises:
        ValueError: If `like` is no weight that `as_matrix` takes, or the shapes do not match.

    >>> weight = torch.arange(36.0).reshape(2, 2, 3, 3)
    >>> torch.equal(from_matrix(as_matrix(weight), weight), weight)
    True
    """
    if like.ndim not in (2, 4, 5) or (transposed and like.ndim != 2):
        raise ValueError(
            f"like must have 2, 4 or 5 axes (2 if transposed), got shape {tuple(like.shape)}."
        )
    rows, columns = (like.shape[0], like[0].numel()) if not transposed else like.shape[::-1]
    if tuple(matrix.shape) != (rows, columns):
        raise ValueError(
            f"matrix must have shape ({rows}, {columns}) for a weight {tuple(like.shape)}, "
            f"got {tuple(matrix.shape)}."
        )
    return matrix.T if transposed else matrix.reshape(like.shape)


def diagonal_sigma_max(gain: Tensor) -> float:
    """Compute the largest singular value of diag(gain), max |gain_i|.

    Args:
        gain: (d,), a norm gain, finite.

    Returns:
        The value, in the units of the gain.

    Raises:
        ValueError: If `gain` is not a finite, non-empty vector.

    >>> diagonal_sigma_max(torch.tensor([0.5, -2.0, 1.0]))
    2.0
    """
    if gain.ndim != 1 or gain.numel() == 0:
        raise ValueError(f"gain must be a non-empty vector, got shape {tuple(gain.shape)}.")
    peak = gain.detach().abs().max()
    if not bool(torch.isfinite(peak)):
        raise ValueError("gain must be finite, got NaN or infinity.")
    return float(peak)
