"""Loss curves on a quadratic from Gauss quadrature: gradient descent, momentum and noise, for many rates at once.

With nodes l_j and weights w_j of the gradient's spectral measure (Lanczos started at g), gradient descent lowers the loss
(1/2) d^T H d + g^T d after t steps by

    sum_j w_j |g|^2 / (2 l_j) (1 - (1 - lr l_j)^(2 t)),        l -> 0: w |g|^2 lr t,

and every method with constant coefficients by sum_j w_j |g|^2 lr psi_j (1 - h_j psi_j / 2), h = lr l, where psi obeys its
recurrence (`LinearOptimizer.transition`). Powers of the recurrence are taken by squaring, with their size kept apart, so
that neither a thousand steps nor a divergence costs accuracy. Momentum matrices: Goh 2017, "Why momentum really works".
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from specdef.curvature.lanczos import LanczosRun
from specdef.rates.linear import SGD, LinearOptimizer

# Every step up to here is looked at when a target is searched; beyond, steps 1 % apart and then those between two of
# them. Oscillations have died out by then (0.9^256 = 2e-12), so nothing is passed over.
_EVERY_STEP = 512
# Budgets within which a target is looked for first.
_BUDGETS = (16, 128, 1024)
_NUMBERS = 2**19  # of a state: rates are taken a few at a time
# Learning rates tried, as shares of the stability limit: down to 2^-12 of it, eight to the octave.
_OCTAVES, _PER_OCTAVE = 12, 8


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Quadratic:
    """The quadratic model of a loss as its gradient sees it.

    Args:
        nodes: `[m]` float64 ascending, eigenvalues of H seen by the gradient (for a preconditioned method, of P^-1/2 H P^-1/2).
        weights: `[m]` float64, the share of |g|^2 at each; sum 1.
        gradient_norm: |g| (|P^-1/2 g|).
    """

    nodes: Tensor
    weights: Tensor
    gradient_norm: float

    def __post_init__(self) -> None:
        if self.nodes.ndim != 1 or self.nodes.shape != self.weights.shape:
            raise ValueError(
                f"nodes and weights must be [m] both, got {list(self.nodes.shape)} and {list(self.weights.shape)}."
            )
        if bool((self.weights < 0).any()):
            raise ValueError("weights must not be negative.")
        if not 0 < self.gradient_norm < math.inf:
            raise ValueError(f"gradient_norm must be positive, got {self.gradient_norm}.")

    @classmethod
    def from_run(cls, run: LanczosRun) -> Quadratic:
        """Return the model a Lanczos run from the gradient knows."""
        nodes, weights = run.nodes_and_weights()
        return cls(nodes=nodes, weights=weights, gradient_norm=run.start_norm)

    @property
    def reachable(self) -> float:
        """Decrease of the loss at the minimum along the directions of positive curvature: sum w |g|^2 / (2 l).

        Nodes below 1e-10 of the largest are rounding, and left out.
        """
        up = self.nodes > 1e-10 * float(self.nodes[-1])
        return float((self.weights[up] / self.nodes[up]).sum()) * self.gradient_norm**2 / 2


def decrease(
    quadratic: Quadratic,
    optimizer: LinearOptimizer,
    learning_rates: Tensor | float,
    steps: Tensor | int,
) -> Tensor:
    """Compute how far the loss has fallen, for every rate and number of steps.

    Cost: 2 log2(max steps) products of 3 x 3 matrices for each rate and node.

    Args:
        quadratic: The model.
        optimizer: A method with constant coefficients.
        learning_rates: `[r]` or a number, not negative.
        steps: `[s]` integers or a number, not negative.

    Returns:
        `[r, s]` float64 in the units of the loss, positive where it has fallen; -inf where it has outgrown float64
        (also where it falls without end in another direction meanwhile), +inf where it falls without end.

    Raises:
        ValueError: A rate or step count is negative or not finite.

    >>> one = torch.ones(1, dtype=torch.float64)
    >>> model = Quadratic(nodes=2 * one, weights=one, gradient_norm=2.0)
    >>> from specdef.rates.linear import GradientDescent
    >>> decrease(model, GradientDescent(), torch.tensor([0.25, 0.5]), 1)
    tensor([[0.7500],
            [1.0000]], dtype=torch.float64)
    """
    rates = torch.as_tensor(learning_rates, dtype=torch.float64).reshape(-1)
    counts = torch.as_tensor(steps, dtype=torch.int64).reshape(-1)
    if not bool((torch.isfinite(rates) & (rates >= 0)).all()):
        raise ValueError("learning_rates must be finite and not negative.")
    if bool((counts < 0).any()):
        raise ValueError("steps must not be negative.")
    seen = quadratic.weights > 0  # a direction of weight 0 is never entered, however unstable
    nodes, weights = quadratic.nodes[seen], quadratic.weights[seen]
    some = max(1, _NUMBERS // (len(counts) * len(nodes) or 1))
    parts = [_decrease(quadratic, optimizer, part, nodes, weights, counts) for part in torch.split(rates, some)]  # fmt: skip
    return torch.cat(parts) if parts else torch.zeros(0, len(counts), dtype=torch.float64)


def share_travelled(optimizer: LinearOptimizer, h: Tensor, steps: Tensor | int) -> Tensor:
    """Compute psi after some steps: the displacement along an eigenvector is -lr psi times the gradient's coordinate.

    Args:
        optimizer: A method with constant coefficients.
        h: `[m]` float64, learning rate times eigenvalue.
        steps: `[s]` or a number.

    Returns:
        `[s, m]`; infinite where it overflows.
    """
    counts = torch.as_tensor(steps, dtype=torch.int64).reshape(-1)
    return _powers(optimizer.transition(h), counts)


def steps_to_target(
    quadratic: Quadratic,
    optimizer: LinearOptimizer,
    learning_rates: Tensor | float,
    target: float,
    *,
    max_steps: int = 10_000,
) -> Tensor:
    """Find the first step at which the loss has fallen by a target.

    Args:
        quadratic: The model.
        optimizer: A method with constant coefficients.
        learning_rates: `[r]` or a number.
        target: Decrease of the loss wanted, in its units, positive.
        max_steps: Where the search ends.

    Returns:
        `[r]` float64: whole numbers, inf where the target is not met within `max_steps`.

    Raises:
        ValueError: The target or `max_steps` is not positive.
    """
    if not target > 0:
        raise ValueError(f"target must be positive, got {target}.")
    if max_steps < 1:
        raise ValueError(f"max_steps must be at least 1, got {max_steps}.")
    rates = torch.as_tensor(learning_rates, dtype=torch.float64).reshape(-1)
    looked_at = _search_steps(max_steps)
    met = decrease(quadratic, optimizer, rates, looked_at) >= target
    found = torch.full_like(rates, math.inf)
    for i in met.any(1).nonzero()[:, 0].tolist():
        at = int(met[i].int().argmax())
        before = int(looked_at[at - 1]) if at else 0
        between = torch.arange(before + 1, int(looked_at[at]) + 1)
        first = (decrease(quadratic, optimizer, rates[i], between)[0] >= target).int().argmax()
        found[i] = float(between[int(first)])
    return found


def best_rate_for_steps(
    quadratic: Quadratic, optimizer: LinearOptimizer, num_steps: int, largest: float
) -> tuple[float, float]:
    """Find the fixed rate that lowers the loss most in a number of steps.

    Args:
        quadratic: The model.
        optimizer: A method with constant coefficients.
        num_steps: Steps to be made.
        largest: Largest rate to consider, the stability limit.

    Returns:
        The rate, to 2 %, and the decrease it brings.
    """
    rates = _rates_below(largest)
    for _ in range(2):
        values = decrease(quadratic, optimizer, rates, num_steps)[:, 0]
        best = int(values.argmax())
        found = float(rates[best]), float(values[best])
        rates = _around(rates, best)
    return found


def best_rate_for_target(
    quadratic: Quadratic,
    optimizer: LinearOptimizer,
    target: float,
    largest: float,
    *,
    max_steps: int = 10_000,
) -> tuple[float, float]:
    """Find the fixed rate that brings the loss down by a target in the fewest steps.

    Args:
        quadratic: The model.
        optimizer: A method with constant coefficients.
        target: Decrease of the loss wanted, in its units, positive.
        largest: Largest rate to consider, the stability limit.
        max_steps: Where the search ends.

    Returns:
        The rate (of several with the same steps, the one that goes beyond the target furthest) and the steps; inf steps,
        with the rate best for `max_steps`, where no rate meets the target.
    """
    rates, budgets = _rates_below(largest), [b for b in _BUDGETS if b < max_steps] + [max_steps]
    for _ in range(2):
        fewest = math.inf
        while budgets and math.isinf(fewest):
            steps = steps_to_target(quadratic, optimizer, rates, target, max_steps=budgets[0])
            fewest = float(steps.min())
            budgets = budgets[math.isinf(fewest) :]
        if math.isinf(fewest):
            return best_rate_for_steps(quadratic, optimizer, max_steps, largest)[0], math.inf
        beyond = decrease(quadratic, optimizer, rates, int(fewest))[:, 0]
        best = int(torch.where(steps == fewest, beyond, -math.inf).argmax())
        found = float(rates[best]), fewest
        rates = _around(rates, best)
    return found


def _decrease(
    quadratic: Quadratic,
    optimizer: LinearOptimizer,
    rates: Tensor,
    nodes: Tensor,
    weights: Tensor,
    counts: Tensor,
) -> Tensor:
    """Return the decrease `[r, s]`."""
    rate = rates[:, None]
    h = rate * nodes
    psi = _powers(optimizer.transition(h), counts)
    size = weights * quadratic.gradient_norm**2
    total = (size * rate * psi * (1 - h * psi / 2)).sum(-1)
    if isinstance(optimizer, SGD) and optimizer.noise:
        # E d^2 gains lr^2 c sum_(s<t) (1 - h)^(2 s), c the noise along the eigenvector; its loss is l / 2 times that.
        row = torch.zeros(*h.shape, 3, 3, dtype=h.dtype)
        row[..., 0, 0], row[..., 0, 2], row[..., 2, 2] = (1 - h) ** 2, 1, 1
        total = total - (optimizer.noise * weights * rate * h / 2 * _powers(row, counts)).sum(-1)
    return torch.where(total.isnan(), -math.inf, total).T


def _powers(matrix: Tensor, counts: Tensor) -> Tensor:
    """Return the first entry of matrix^t (0, 0, 1) for every t `[s]`, `[s, ...]`; matrix `[..., 3, 3]`."""
    shape = matrix.shape[:-2]
    state = matrix.new_zeros(len(counts), *shape, 3, 1)
    state[..., 2, 0] = 1
    size = matrix.new_zeros(len(counts), *shape, 1, 1)
    power, power_size = matrix, matrix.new_zeros(*shape, 1, 1)
    for bit in range(int(counts.max()).bit_length() if len(counts) else 0):
        used = (counts >> bit & 1).bool()
        moved, grown = _scaled(power @ state[used])
        state[used], size[used] = moved, size[used] + power_size + grown
        power, grown = _scaled(power @ power)
        power_size = 2 * power_size + grown
    return torch.where(state == 0, 0, state * size.exp())[..., 0, 0]


def _scaled(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return matrices divided by their largest entries, and the logarithms of these."""
    largest = values.abs().amax((-2, -1), keepdim=True)
    largest = torch.where(largest > 0, largest, 1)
    return values / largest, largest.log()


def _search_steps(max_steps: int) -> Tensor:
    """Return the steps looked at first: every one at the beginning, then 1 % apart, and the last."""
    steps = list(range(1, min(max_steps, _EVERY_STEP) + 1))
    while steps[-1] < max_steps:
        steps.append(min(max_steps, math.ceil(steps[-1] * 1.01)))
    return torch.tensor(steps)


def _rates_below(largest: float) -> Tensor:
    """Return rates below a limit, ascending."""
    if not 0 < largest < math.inf:
        raise ValueError(f"largest must be positive and finite, got {largest}.")
    exponents = torch.arange(-_OCTAVES * _PER_OCTAVE, 0, dtype=torch.float64) / _PER_OCTAVE
    return largest * torch.cat([2**exponents, exponents.new_tensor([0.96, 0.99])])


def _around(rates: Tensor, index: int) -> Tensor:
    """Return finer rates between the neighbours of one, itself among them."""
    low, here = float(rates[max(0, index - 1)]), float(rates[index])
    high = float(rates[min(len(rates) - 1, index + 1)])
    finer = torch.linspace(low, high, 17, dtype=torch.float64)
    return torch.cat([finer, finer.new_tensor([here])]).sort().values
