"""Where an optimiser would be after any number of steps on the quadratic model of its loss, in a Krylov basis.

Lanczos from the gradient gives an orthonormal basis Q of span{g, H g, H^2 g, …} in which the whole path on the quadratic
model lies; a step number costs nothing more. H g itself is |g| (T_00 q_0 + T_10 q_1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from specdef.curvature.lanczos import lanczos
from specdef.curvature.linear import SymmetricOperator
from specdef.rates.adaptive import Adam, AdamW
from specdef.rates.linear import HeavyBall, LinearOptimizer, Nesterov, Optimizer
from specdef.rates.quadratic import share_travelled

# Steps from a random start for the largest eigenvalue: the gradient may hardly see the steepest direction.
_STEEPEST = 10
# The bias correction of Adam's first moment is 1 to this accuracy when the recurrence is taken as constant.
_SETTLED = 1e-12


@final
class QuadraticPath:
    """The path on the quadratic model g^T phi + 1/2 phi^T H phi, in the metric's coordinates.

    Cost: `num_steps` products, and 10 for the largest eigenvalue. Memory: num_steps + 4 vectors.

    Args:
        operator: H.
        gradient: g `[n]`, finite and not zero.
        num_steps: Dimension of the Krylov space, at most n.
        seed: Of the random start for the largest eigenvalue.

    Raises:
        SpecDefError: A product is not finite.
    """

    def __init__(
        self, operator: SymmetricOperator, gradient: Tensor, num_steps: int, seed: int = 0
    ) -> None:
        n = operator.shape[0]
        self.run = lanczos(operator, gradient, min(num_steps, n), keep_basis=True)
        assert self.run.basis is not None
        self.basis: Tensor = self.run.basis
        self.gradient_norm = self.run.start_norm
        generator = torch.Generator().manual_seed(seed)
        start = torch.randn(n, generator=generator, dtype=operator.dtype).to(operator.device)
        other = lanczos(operator, start, min(_STEEPEST, n), reorthogonalize=False, keep_basis=False)
        self.lambda_max = max(0.0, *(float(run.ritz()[0].max()) for run in (self.run, other)))
        self.num_matvecs = self.run.num_matvecs + other.num_matvecs

    def coordinates(
        self, optimizer: Optimizer, learning_rate: float, steps: Sequence[int], *, drop: int = 0
    ) -> Tensor:
        """Return phi_n - phi_0 in the basis: -lr |g| C diag(psi_n) C^T e_1.

        Args:
            optimizer: The method.
            learning_rate: Its rate.
            steps: Step numbers.
            drop: Lanczos steps to leave out at the end, to see what they matter.

        Returns:
            `[s, m]` float64, zero in what is left out; not finite where the method diverges.
        """
        m = self.run.num_steps - drop
        T = self.tridiagonal()[:m, :m]
        values, C = torch.linalg.eigh(T)
        psi = share(optimizer, learning_rate * values, steps)
        found = torch.zeros(len(steps), self.run.num_steps, dtype=torch.float64)
        found[:, :m] = -learning_rate * self.gradient_norm * ((psi * C[0]) @ C.T)
        return found

    def tridiagonal(self) -> Tensor:
        """Return T = Q^T H Q `[m, m]`, float64."""
        off = self.run.off_diagonal
        return self.run.diagonal.diag() + off.diag(1) + off.diag(-1)

    def coupling(self) -> Tensor:
        """Return H g in the basis, `[m]` float64, and exactly so unless m = 1 < n."""
        return self.gradient_norm * self.tridiagonal()[:, 0]

    def displacement(self, coordinates: Tensor) -> Tensor:
        """Return a vector `[n]` from its coordinates `[m]`."""
        return coordinates.to(self.basis) @ self.basis

    def hessian_product(self, coordinates: Tensor) -> Tensor:
        """Return H times a vector of the Krylov space, `[n]`, without a product: Q T c + beta q_(m+1) c_m."""
        image = self.displacement(self.tridiagonal() @ coordinates)
        if self.run.tail is not None:
            image = image + self.run.residual_norm * float(coordinates[-1]) * self.run.tail[-1]
        return image


def share(optimizer: Optimizer, h: Tensor, steps: Sequence[int]) -> Tensor:
    """Compute psi: the displacement along an eigenvector is -lr psi times the gradient's coordinate.

    Adam is taken with its preconditioner held at P: m <- beta m + (1 - beta)(1 - h psi), psi <- psi + m / (1 - beta^t).

    Args:
        optimizer: A method with constant coefficients, or Adam.
        h: `[m]` float64, learning rate times eigenvalue in the metric.
        steps: Step numbers.

    Returns:
        `[s, m]`; not finite where it overflows.

    Raises:
        ValueError: The optimiser is of another kind.

    Example:
        >>> from specdef.rates.linear import GradientDescent
        >>> share(GradientDescent(), torch.tensor([0.5], dtype=torch.float64), [1, 2])
        tensor([[1.0000],
                [1.5000]], dtype=torch.float64)
    """
    if isinstance(optimizer, LinearOptimizer):
        return share_travelled(optimizer, h, torch.tensor(list(steps)))
    if not isinstance(optimizer, Adam | AdamW):
        raise ValueError(f"no path is known for {optimizer.name}.")
    beta = optimizer.beta1
    settled = math.ceil(math.log(_SETTLED) / math.log(beta)) if beta else 1
    found: dict[int, Tensor] = {0: torch.zeros_like(h)}
    psi, moment = torch.zeros_like(h), torch.zeros_like(h)
    for t in range(1, min(settled, max(steps, default=0)) + 1):
        moment = beta * moment + (1 - beta) * (1 - h * psi)
        psi = psi + moment / (1 - beta**t)
        found[t] = psi
    late = [n for n in steps if n > settled]
    if late:
        step = torch.zeros(len(h), 3, 3, dtype=h.dtype)
        step[:, 1] = torch.stack([(beta - 1) * h, torch.full_like(h, beta), torch.full_like(h, 1 - beta)], -1)  # fmt: skip
        step[:, 0] = step[:, 1]
        step[:, 0, 0] += 1
        step[:, 2, 2] = 1
        state = torch.stack([psi, moment, torch.ones_like(h)], -1)[..., None]
        for n in late:
            found[n] = (torch.linalg.matrix_power(step, n - settled) @ state)[:, 0, 0]
    return torch.stack([found[n] for n in steps])


def clocks(optimizer: Optimizer, steps: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Compute s and r of d = -lr s g + lr^2 r H g + O(lr^3): how far time has come, to first and second order.

    Gradient flow has s = t / lr and r = s^2 / 2; gradient descent s = n and r = n (n - 1) / 2.

    Args:
        optimizer: The method.
        steps: Step numbers.

    Returns:
        s and r, each `[len(steps)]` float64.

    Example:
        >>> from specdef.rates.linear import GradientDescent
        >>> [c.round(decimals=6).tolist() for c in clocks(GradientDescent(), [1, 4])]
        [[1.0, 4.0], [0.0, 6.0]]
    """
    # A central difference in h: h n = 1e-4 at the last step leaves an error of 1e-9 and rounding of 1e-12.
    h = 1e-4 / max(1, *steps) / speed(optimizer)
    psi = share(optimizer, torch.tensor([0.0, h, -h], dtype=torch.float64), steps)
    r = (psi[:, 2] - psi[:, 1]) / (2 * h)
    # The first step does not know H at all; what is left there is rounding.
    return psi[:, 0], torch.where(torch.tensor(list(steps)) < 2, 0.0, r)


def speed(optimizer: Optimizer) -> float:
    """Return how many steps of gradient descent a step is worth in the long run: 1 / (1 - beta) with momentum.

    Args:
        optimizer: The method.

    Returns:
        The factor; 1 for Adam, whose moment is an average.
    """
    return 1 / (1 - optimizer.beta) if isinstance(optimizer, HeavyBall | Nesterov) else 1.0
