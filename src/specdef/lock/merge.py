"""The inverse of W~ = (I + (scale - 1) U U^T) W, the same to the last bit on every machine.

A matrix product may sum in any order, so two BLAS libraries differ in the last bits, and rounding to the stored dtype
then differs in rare entries. Elementwise IEEE operations in a fixed order do not: the sums here are written out.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from specdef.lock.plan import Projection
from specdef.spectral.views import as_matrix, from_matrix
from specdef.weights.tensor_bytes import TORCH_DTYPES

_ROWS = 64
"""Rows corrected at a time, so that the temporaries stay in cache."""

Array = np.ndarray[Any, np.dtype[np.float64]]


def merge(locked: Tensor, projection: Projection) -> Tensor:
    """Return W = W~ - (1 - 1/scale) U (U^T W~), rounded to the original's dtype.

    Args:
        locked: W~ as stored: (out, in), (in, out) if transposed, or (out, in, kh, kw).
        projection: Basis and scale of the lock.

    Returns:
        Same shape as `locked`.
    """
    matrix: Array = as_matrix(locked, transposed=projection.transposed).double().numpy()
    basis: Array = projection.basis.numpy()
    inner = np.zeros((basis.shape[1], matrix.shape[1]))
    for i in range(matrix.shape[0]):  # U^T W~, one row of W~ after the other
        inner += basis[i][:, None] * matrix[i][None, :]
    inner *= 1 - 1 / projection.scale
    out = np.empty_like(matrix)
    for start in range(0, matrix.shape[0], _ROWS):
        rows = matrix[start : start + _ROWS].copy()
        for j in range(basis.shape[1]):  # minus U (…), one rank after the other
            rows -= basis[start : start + _ROWS, j][:, None] * inner[j][None, :]
        out[start : start + _ROWS] = rows
    result = from_matrix(torch.from_numpy(out), locked, transposed=projection.transposed)
    return result.to(TORCH_DTYPES[projection.dtype]).contiguous()
