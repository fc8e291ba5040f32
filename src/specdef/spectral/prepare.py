"""What a matrix needs before its singular values are computed: a check, a safe magnitude, full precision."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# Norms outside this range are rescaled by a power of two (exact), so that no square over- or underflows in float32.
_SAFE = (2.0**-20, 2.0**40)


def check_matrix(matrix: Tensor) -> None:
    """Raise ValueError unless the argument is a floating-point matrix with at least one entry."""
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise ValueError(f"matrix must be 2-D and not empty, got shape {tuple(matrix.shape)}.")
    if not matrix.is_floating_point():
        raise ValueError(f"matrix must be floating point, got {matrix.dtype}.")


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Switch off autocast and TF32 / bfloat16 products: a residual measured with them would be noise at 1e-3."""
    before = torch.get_float32_matmul_precision()
    if before != "highest":
        torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if before != "highest":
            torch.set_float32_matmul_precision(before)


def rescale(A: Tensor) -> tuple[Tensor, int | None]:
    """Return A / 2^e and e, with a norm no square of which over- or underflows; e is None for the zero matrix."""
    norm = float(torch.linalg.vector_norm(A))
    if _SAFE[0] <= norm <= _SAFE[1]:
        return A, 0
    # The norm itself may have overflowed or vanished: only the entries tell.
    low, high = A.aminmax()
    peak = max(-float(low), float(high))
    if not math.isfinite(peak):
        raise ValueError("matrix must be finite, got NaN or infinity.")
    if peak == 0.0:
        return A, None
    exponent = math.frexp(peak)[1]
    # Two factors: 2^-e alone overflows float32 when the entries are subnormal.
    half = exponent // 2
    return A * 2.0**-half * 2.0 ** -(exponent - half), exponent
