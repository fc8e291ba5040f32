"""What a diagnosis needs of memory, counted in vectors of the weights before it starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch

from specdef.curvature.graph import default_memory_limit
from specdef.errors import SpecDefError
from specdef.fragility.subspace import BASES

# Gradient, metric and its inverse, what a product and an optimiser work with.
_WORKING = 9


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """What fits.

    Args:
        max_basis: Vectors Lanczos keeps before it restarts.
        vector_bytes: Bytes of all vectors at the peak.
        graph_limit: Bytes left for graphs; None where no limit was given.
    """

    max_basis: int
    vector_bytes: int
    graph_limit: int | None


def plan_memory(
    n: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    max_rank: int,
    krylov_steps: int,
    memory_limit: int | None,
    known: bool = False,
) -> MemoryPlan:
    """Choose the size of Lanczos' basis, or refuse.

    Args:
        n: Number of weights.
        dtype: Type of the vectors.
        device: Where they live.
        max_rank: Largest rank of the subspace.
        krylov_steps: Dimension of the path's Krylov space.
        memory_limit: Bytes for vectors and graphs; None for half of what is free for each of the two.
        known: Whether the subspace is there already, so that Lanczos has no part in it.

    Returns:
        The plan.

    Raises:
        SpecDefError: Not even the smallest basis fits.
    """
    limit = default_memory_limit(device) if memory_limit is None else memory_limit
    vector = n * torch.empty((), dtype=dtype).element_size()
    rank = min(max_rank, n)
    needed = 0
    for basis in BASES:
        max_basis = max(basis, rank + 3)
        rows = 0 if known else min(16 * -(-(max_basis + 1) // 16), n + 1)
        needed = vector * (rows + 2 * rank + min(krylov_steps, n) + 2 + _WORKING)
        if needed <= limit:
            graph = None if memory_limit is None else limit - needed
            return MemoryPlan(max_basis=max_basis, vector_bytes=needed, graph_limit=graph)
    raise SpecDefError(
        f"the diagnosis of {n:,} parameters needs {needed / 2**30:.3g} GiB for vectors, {limit / 2**30:.3g} GiB are allowed",
        hint="Select fewer parameters (--parameters), lower --max-rank, or allow more memory.",
    )
