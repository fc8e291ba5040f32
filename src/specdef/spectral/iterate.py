"""Leading singular triplets of an operator: power steps where they are enough, a Krylov space where not."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from specdef.spectral.golub_kahan import GolubKahan
from specdef.spectral.power import Operator, Power, Triplets


def iterate(
    op: Operator,
    start: Tensor,
    *,
    rows: int,
    k: int,
    tol: float,
    max_passes: int,
    basis: int,
    restart: bool,
) -> Triplets | None:
    """Power steps while they converge fast, then the Krylov space of the block they leave; None if out of budget."""
    power = Power(op, torch.linalg.qr(start)[0], side=0, k=k)
    # Before any measurement a residual is of order one.
    before = 1 / tol
    while op.num_passes < max_passes:
        power.step(ritz=op.num_passes > 0)
        if power.measured is None:
            continue
        error = power.error / tol
        # A fast decay inside the block is what makes power steps safe: on a flat spectrum with one value slightly above
        # it their residual is small long before they have found that value.
        decays = bool(power.S[-1] <= 0.7 * power.S[k - 1])
        if error <= 1 and decays:
            return power.triplets()
        rate, before = error / before, error
        # If the pair just formed should pass, measure it with few columns rather than with a whole step.
        if decays and error * rate <= 0.3 and 2 * k <= start.shape[1]:
            power.measure()
            if power.error <= tol:
                return power.triplets()
        # From here a Krylov space takes five products at least and dearer ones: not worth it where six power steps do.
        soon = decays and rate < 1 and math.log(max(error, 1.0)) <= -6 * math.log(max(rate, 1e-9))
        if op.num_passes >= 3 and power.side == 0 and not soon:
            break
    krylov = GolubKahan(op, power.block, rows=rows, k=k, tol=tol, max_basis=basis, restart=restart)
    for candidate in krylov.candidates(max_passes):
        # The first product moves one side half a step further and the second measures: both sides are then known from
        # products with the matrix itself.
        polish = Power(op, candidate.block, side=candidate.side, k=k)
        polish.step()
        polish.measure()
        if polish.error <= tol:
            return polish.triplets()
        if candidate.certain:
            return None
    return None
