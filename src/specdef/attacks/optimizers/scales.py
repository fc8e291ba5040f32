"""The scale every row and every column of a matrix has: units in which a lock of channels cannot be seen."""

from __future__ import annotations

import torch
from torch import Tensor

from specdef.attacks.optimizers.base import wide

_PASSES = 20
"""Over rows and columns; without zeros the first is exact."""


def row_and_column_scales(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return r and c whose product r_i c_j is nearest to |W_ij|: least squares of the logarithms, zeros left out.

    Whatever scales row i or column j of W scales r_i c_j by as much. Rows and columns of zeros have the scale of the others.

    Args:
        matrix: `[m, n]`, any floating type.

    Returns:
        `[m]` and `[n]`, positive, in float64.

    >>> r, c = row_and_column_scales(torch.tensor([[1.0, -8.0], [2.0, 16.0]]))
    >>> torch.outer(r, c).round(decimals=4).tolist()
    [[1.0, 8.0], [2.0, 16.0]]
    """
    sizes = matrix.detach().double().abs()
    seen = (sizes > 0).double()
    logs = torch.where(sizes > 0, sizes, 1.0).log()
    r, c = logs.new_zeros(len(logs)), logs.new_zeros(logs.shape[1])
    for _ in range(_PASSES):
        r = _means((logs - c) * seen, seen)
        c = _means(((logs - r[:, None]) * seen).mT, seen.mT)
    return r.exp(), c.exp()


def scales(parameter: Tensor) -> Tensor:
    """Return the scale of every number of a tensor, shaped like it: r_i c_j of a matrix, |w| of a vector.

    Args:
        parameter: A tensor of more dimensions is a matrix of its first by the others.

    Returns:
        In float64 if the tensor is, otherwise in float32.

    >>> scales(torch.tensor([-2.0, 0.5]))
    tensor([2.0000, 0.5000])
    """
    if parameter.ndim < 2:
        return wide(parameter.detach()).abs()
    r, c = row_and_column_scales(parameter.flatten(1))
    return torch.outer(r, c).view_as(parameter).to(wide(parameter).dtype)


def _means(values: Tensor, seen: Tensor) -> Tensor:
    """Return the mean of what is seen of every row; where nothing is, the mean of the other rows'."""
    counts = seen.sum(1)
    means = values.sum(1) / counts.clamp(min=1)
    others = means.sum() / (counts > 0).sum().clamp(min=1)
    return torch.where(counts > 0, means, others)
