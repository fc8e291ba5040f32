"""Making the forecast: the optimiser's path on the quadratic model, through the whole Fisher matrix, and what is known of its error.

Nothing is trained. Where the model says the weights will be at the last step, the true alignment loss and the task's true
gradient are evaluated once; the band is made of how far they are from the model's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from specdef.curvature.linear import SymmetricOperator
from specdef.fragility.alignment import AlignmentLoss
from specdef.fragility.applicability import LARGEST_ERROR, LARGEST_RATIO, reasons_against
from specdef.fragility.forecast import Forecast, ModelError, TimeToThreshold
from specdef.fragility.law import QuarticLaw, within
from specdef.fragility.noise import Noise
from specdef.fragility.path import QuadraticPath, clocks, speed
from specdef.fragility.steps import crossing, further_steps, late_exponent, step_grid
from specdef.fragility.subspace import FisherSubspace
from specdef.fragility.task import Metric, TaskLoss
from specdef.rates.linear import Optimizer

SAFETY = 2.0
"""Width of the band in units of the errors measured."""
_QUARTIC, _QUADRATIC = 3.5, 2.5
_DROPPED = 2  # Lanczos steps left out to see what they matter
_ROUNDINGS = 10.0  # of a displacement, in units of its last digit


@final
class Forecaster:
    """The forecast of one run.

    Args:
        path: The optimiser's path.
        subspace: The sensitive subspace.
        law: Its quartic law.
        fisher: Hessian of the alignment loss, in the metric.
        optimizer: The method.
        learning_rate: Its rate.
        steps: Planned steps.
        noise: What the batches differ by.
        floor: Rounding floor of the alignment loss.
    """

    def __init__(
        self,
        *,
        path: QuadraticPath,
        subspace: FisherSubspace,
        law: QuarticLaw,
        fisher: SymmetricOperator,
        optimizer: Optimizer,
        learning_rate: float,
        steps: int,
        noise: Noise,
        floor: float,
    ) -> None:
        self.path, self.law, self.noise, self.floor = path, law, noise, floor
        self.optimizer, self.learning_rate, self.steps = optimizer, learning_rate, steps
        self.fisher, self.subspace = fisher, subspace
        self.inside = within(subspace, path)
        self.matrix = self._project()
        self.error = ModelError(
            path=math.nan, metric=math.nan, alignment_ratio=math.nan, gradient_change=math.nan, krylov=math.nan, at_step=steps
        )  # fmt: skip

    def _project(self) -> Tensor:
        """Return Q F Q^T `[m, m]` float64, by m products one at a time.

        Q = W^T U + R, so that it is W^T (U F U^T) W with its known eigenvalues, the cross terms, and R F R^T. A gradient that
        hardly enters the subspace would else drown in the rounding of the largest eigenvalue.
        """
        Q, U, W = self.path.basis, self.subspace.vectors, self.inside
        known = self.subspace.fisher == "ggn"  # else U diagonalises another matrix
        rest, cross = [], []
        for q in Q:
            image = self.fisher @ (q - (U @ q) @ U if known else q)
            rest.append((Q @ image).double().cpu())
            cross.append((U @ image).double().cpu())
        S, C = torch.stack(rest, 1), torch.stack(cross, 1)
        if known:
            S = (W.T * self.subspace.values) @ W + S + C.T @ W
        return (S + S.T) / 2

    def drift(self, steps: Sequence[int], *, drop: int = 0) -> Tensor:
        """Return 1/2 d^T F d on the quadratic path, `[s]` float64; inf where it diverges."""
        c = self.path.coordinates(self.optimizer, self.learning_rate, steps, drop=drop)
        return _finite(((c @ self.matrix) * c).sum(-1).clamp(min=0) / 2)

    def measure(self, alignment: AlignmentLoss, task: TaskLoss, metric: Metric) -> None:
        """Evaluate alignment loss and task gradient where the model leads; one product with F.

        The path's own equation is phi' = -(g + H phi + rho). With rho ~ phi^2, and damping left out, an error of rho at time
        t makes the displacement wrong by t rho / 3; its share of F^(1/2) phi is the error of sqrt(A). A preconditioner that
        moves makes steps wrong in proportion to t, and the displacement by t / 2 of the last.

        Args:
            alignment: The alignment loss.
            task: The task.
            metric: The metric.
        """
        N, lr = self.steps, self.learning_rate
        c = self.path.coordinates(self.optimizer, lr, [N])[0]
        modelled = float(self.drift([N])[0])
        if not (bool(torch.isfinite(c).all()) and math.isfinite(modelled)):
            return
        phi = self.path.displacement(c)
        d = metric.scale(phi)
        true = alignment(d)
        g = self.path.gradient_norm * self.path.basis[0]
        change = metric.scale(task.gradient_at(d)) - g
        t = lr * float(clocks(self.optimizer, [N])[0][0])
        size = math.sqrt(2 * max(modelled, self.floor))
        rest = change - self.path.hessian_product(c)
        self.error = ModelError(
            path=t / 3 * self._seminorm(rest) / size,
            metric=t / 2 * self._seminorm(metric.change(g, g + change, self.optimizer)) / size,
            alignment_ratio=(true + self.floor) / (modelled + self.floor),
            gradient_change=float(change.norm()) / self.path.gradient_norm,
            krylov=float(self._truncation([N])[0]),
            at_step=N,
        )

    def _seminorm(self, v: Tensor | None) -> float:
        """Return |F^(1/2) v| by one product; 0 for None, infinite where v is not finite."""
        if v is None:
            return 0.0
        if not bool(torch.isfinite(v).all()):
            return math.inf
        return math.sqrt(max(0.0, float((v.double() * (self.fisher @ v).double()).sum())))

    def band(self, steps: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return point, low, high, noise, and the two relative errors e_n and log r_n, each `[s]`.

        e_n = (e_path (n / N)^3 + e_metric (n / N)^2) sqrt(A_N / A_n), as the errors grow with time, and what Lanczos has cut off;
        log r grows as the displacement, n / N. The band is twice as wide as they are: to leading order each is the error itself.
        """
        n = torch.tensor(list(steps), dtype=torch.float64) / self.steps
        drift, last = self.drift(steps), float(self.drift([self.steps])[0])
        noise = self.noise.added(self.optimizer, self.learning_rate, steps)
        least = max(self.floor, 1e-300)
        e = (self.error.path * n**3 + self.error.metric * n**2) * ((last + least) / (drift + least)).sqrt()  # fmt: skip
        e = torch.nan_to_num(e + self._truncation(steps), nan=math.inf)
        log_r = n * _log(self.error.alignment_ratio)
        # Rounding of the products: the model is no better than that.
        within_rounding = math.sqrt(torch.finfo(self.path.basis.dtype).eps)
        wide, log_wide = SAFETY * e + within_rounding, SAFETY * log_r
        low = (1 - wide.clamp(max=1)) ** 2 * drift * log_wide.clamp(max=0).exp()
        high = _finite((1 + wide) ** 2) * drift * log_wide.clamp(min=0).exp()
        floor = self.floor + self._rounding(steps)
        low = torch.nan_to_num(low - floor, nan=0.0).clamp(min=0)
        high = _finite(high + floor) + 2 * noise
        return drift + noise, low, high, noise, e, log_r

    def _truncation(self, steps: Sequence[int]) -> Tensor:
        """Return the largest relative change of F^(1/2) d up to each step when one or two Lanczos steps are left out, `[s]`."""
        size, least = self.drift(steps).sqrt(), math.sqrt(max(self.floor, 1e-300))
        found = torch.zeros_like(size)
        if not self.path.run.exhausted:
            for drop in range(1, min(_DROPPED, self.path.run.num_steps - 1) + 1):
                fewer = self.drift(steps, drop=drop).sqrt()
                found = torch.maximum(found, (size - fewer).abs() / (size + least))
        return torch.nan_to_num(found, nan=math.inf).cummax(0).values

    def _rounding(self, steps: Sequence[int]) -> Tensor:
        """Return what rounding of the displacement alone makes of the alignment loss, `[s]`."""
        c = self.path.coordinates(self.optimizer, self.learning_rate, steps)
        eps = torch.finfo(self.path.basis.dtype).eps
        length = torch.linalg.vector_norm(c, dim=1)
        return _finite(float(self.subspace.values[0]) / 2 * (_ROUNDINGS * eps * length) ** 2)

    def forecast(self, threshold: float, reasons: Sequence[str] = ()) -> Forecast:
        """Put everything together.

        Args:
            threshold: Alignment loss that is too much.
            reasons: Further reasons why the forecast should not be believed.

        Returns:
            The forecast.
        """
        grid = step_grid(self.steps)
        point, low, high, noise, _, _ = self.band(grid)
        s, r = clocks(self.optimizer, grid)
        lr = self.learning_rate
        c = self.path.coordinates(self.optimizer, lr, grid)
        inside = _finite((c @ self.inside.T) ** 2 @ self.subspace.values / 2)
        onset = self.law.onset() / lr / speed(self.optimizer)
        valid = self._valid_steps()
        exponent = late_exponent(grid, self.drift(grid), s, r)
        against = reasons_against(
            self.error, self.optimizer, lr, self.path.lambda_max, self.subspace,
            noise=float(noise.max()), last=max(float(self.drift([self.steps])[0]), self.floor),
        )  # fmt: skip
        found = (*against, *reasons)
        quartic = (lr**2 * r * self.law.gamma) ** 2 / 2
        return Forecast(
            steps=tuple(grid),
            alignment=_tuple(point),
            low=_tuple(low),
            high=_tuple(high),
            taylor=_tuple(self.law.alignment(lr * s, lr**2 * r)),
            quartic=_tuple(quartic),
            in_subspace=_tuple(inside),
            stochastic=_tuple(noise),
            onset_steps=onset if math.isfinite(onset) else None,
            time_to_threshold=self._time(threshold, valid),
            exponent=exponent,
            regime="quartic" if exponent >= _QUARTIC else "quadratic" if exponent <= _QUADRATIC else "mixed",
            applicable=not found,
            reasons=found,
            learning_rate=lr,
            lambda_max=self.path.lambda_max,
            valid_steps=valid,
            model_error=self.error,
        )  # fmt: skip

    def quartic_over_quadratic(self) -> float:
        """Return the quartic term of the law over the quadratic one at the last step; inf where there is none."""
        s, r = (float(x[0]) for x in clocks(self.optimizer, [self.steps]))
        quadratic = s**2 * self.law.a
        return (self.learning_rate * r * self.law.gamma) ** 2 / quadratic if quadratic > 0 else math.inf  # fmt: skip

    def _valid_steps(self) -> float:
        """Return up to which step the errors, continued, stay within what is accepted."""
        steps = further_steps(self.steps)
        _, _, _, _, e, log_r = self.band(steps)
        ok = (e <= LARGEST_ERROR) & (log_r.abs() <= math.log(LARGEST_RATIO))
        bad = (~ok).nonzero()
        return float(steps[-1] if not len(bad) else steps[int(bad[0]) - 1] if int(bad[0]) else 0)

    def _time(self, threshold: float, valid: float) -> TimeToThreshold:
        steps = [n for n in further_steps(self.steps) if n <= valid]
        if not steps or self.learning_rate * self.path.lambda_max >= self.optimizer.stability_limit:
            return TimeToThreshold(threshold=threshold, steps=None, low=None, high=None)
        point, low, high = self.band(steps)[:3]
        return TimeToThreshold(
            threshold=threshold, steps=crossing(steps, point, threshold),
            low=crossing(steps, high, threshold), high=crossing(steps, low, threshold),
        )  # fmt: skip


def _finite(values: Tensor) -> Tensor:
    return torch.nan_to_num(values, nan=math.inf, posinf=math.inf)


def _log(ratio: float) -> float:
    return math.log(ratio) if 0 < ratio < math.inf else math.inf if ratio == math.inf else math.nan


def _tuple(values: Tensor) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
