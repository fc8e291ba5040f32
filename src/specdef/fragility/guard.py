r"""A guard beside a fine-tune: watches the drift into the sensitive subspace, forecasts the time left, and can hold it back.

Of a path phi(t) = -t g + (t^2/2) H g + O(t^3) of gradient flow on the fine-tuning loss, the outputs f on aligned data move by

    f(t) - f(0) = -t J g + (t^2/2) (J H g + (f'' g) g) + O(t^3),         A(t) = 1/2 |f(t) - f(0)|_B^2,

with their Jacobian J, their second derivative f'' and the loss's output Hessian B; M is spanned by the leading eigenvectors
of F = J^T B J (arXiv 2602.15799, whose conclusion asks for curvature-aware methods; the rest is derived here). Three terms:

1. J g, of first order. A projection of the gradient, g <- (1 - Pi) g, removes it.
2. J H g, the coupling of arXiv 2602.15799. Whatever H is, it is gone when every *update* is orthogonal to M, since the
   displacement then is. Under SGD a projected gradient does that at every step. Adam divides by another number in each
   coordinate afterwards, and weight decay and momentum from before add to it: the update has to be projected, not the gradient.
3. (f'' g) g, of the same order and not in gamma: the rows of J turn as the weights move, and M with them. No fixed subspace
   removes it. Updates orthogonal to the M of the *present* weights do: then df = J(theta) dtheta = 0 all along.

Keeping out of the directions H U as well, from which the unguarded flow bends into M, adds nothing to 2, takes as many directions
away from the task again, and leaves 3 (measured: `specdef reproduce fragility-guard`); it is there as `extra`, for comparison.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Literal, final, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from specdef.curvature.operators import GGNOperator
from specdef.errors import SpecDefError
from specdef.fragility.drift import DriftRecord, DriftWarning, time_left
from specdef.fragility.hooks import StepHook
from specdef.fragility.rows import Rows
from specdef.fragility.subspace import FisherSubspace
from specdef.fragility.turning import AlignedData

Mode = Literal["monitor", "first-order", "second-order"]


@final
class DriftGuard(StepHook):
    """Watch a fine-tune drift into the sensitive subspace, forecast, warn, and hold it back.

    Cost of a step: a pass over U to watch; with a projection two more. Memory: U, the weights at the start, and with `aligned` in
    mode second-order a second U and one more copy of the weights. Every `every` steps, with `aligned`: a forward pass over the
    aligned data, and in mode second-order `rank` products with their Gauss-Newton matrix, about 4/3 of a gradient each.

    It guards against drift within the span of the rows it has: what the aligned behaviour loses through directions of smaller
    curvature, and between two looks at the aligned data, it does not see unless `aligned` measures it.

    Args:
        model: The model, at its aligned weights: they are what displacements are measured from.
        subspace: The sensitive subspace. For projections take it in the Euclidean metric, for Adam too.
        mode: monitor: the run stays what it was to the bit. first-order: g <- (1 - Pi) g before each step, in the metric.
            second-order: updates are projected after each step, and with `aligned` the subspace turns along with the weights.
        aligned: Gauss-Newton matrix of aligned data on the same model and parameters. The alignment loss is then measured, and it is
            what the forecast speaks of.
        every: Steps from one look at the aligned data to the next.
        threshold: Alignment loss that is too much, nats per term.
        warn_steps: Warn once as soon as fewer steps are left.
        on_warning: Called with the record instead of `warnings.warn`.
        extra: Further rows `[m, n]` that projections keep out of, see `coupled_directions`.
        dtype: Type U is kept in, for instance bfloat16; None for its own.

    Raises:
        ValueError: An argument is out of range.
        SpecDefError: The subspace or `aligned` is of other parameters than the model's.

    Example:
        >>> from specdef.curvature.losses import MSELoss
        >>> from specdef.fragility.subspace import fisher_subspace
        >>> net = nn.Linear(2, 1, bias=False)
        >>> aligned = [(torch.tensor([[3.0, 0.0]]), torch.tensor([[1.0]]))]  # only the first weight matters
        >>> guard = DriftGuard(net, fisher_subspace(net, aligned, MSELoss()), mode="second-order")
        >>> before, optimizer = net.weight.detach().clone(), torch.optim.AdamW(net.parameters())
        >>> with guard.attach(optimizer):
        ...     net(torch.ones(1, 2)).sum().backward()
        ...     optimizer.step()
        >>> (net.weight.detach() - before).abs().gt(1e-6).tolist()
        [[False, True]]
    """

    def __init__(
        self,
        model: nn.Module,
        subspace: FisherSubspace,
        *,
        mode: Mode = "monitor",
        aligned: GGNOperator | None = None,
        every: int = 20,
        threshold: float = 0.05,
        warn_steps: float = 50,
        on_warning: Callable[[DriftRecord], None] | None = None,
        extra: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if mode not in get_args(Mode):
            raise ValueError(f"mode must be one of {get_args(Mode)}, got {mode!r}.")
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}.")
        if not (threshold > 0 and warn_steps >= 0):
            raise ValueError(f"threshold must be positive and warn_steps not negative, got {threshold} and {warn_steps}.")  # fmt: skip
        if extra is not None and aligned is not None:
            raise ValueError("extra is for a fixed subspace: leave it or aligned out.")
        self.model, self.subspace, self.mode = model, subspace, mode
        self.threshold, self.warn_steps, self.every = threshold, warn_steps, every
        self.history: list[DriftRecord] = []
        self.warned = False
        self._known: list[tuple[float, float]] = []
        self._on_warning = on_warning
        self._parameters = _parameters(model, subspace)
        if aligned is not None and (aligned.model is not model or tuple(aligned.parameters) != subspace.parameters):  # fmt: skip
            raise SpecDefError(
                "aligned is on another model or on other parameters than the subspace",
                hint="Build it on the model that is trained, with params=list(subspace.parameters).",
            )
        self._aligned = None if aligned is None else AlignedData(aligned)
        self._dtype = dtype or subspace.vectors.dtype
        self._extra = extra
        self._start = {name: p.detach().clone() for name, p in self._parameters.items()}
        self._reference = self._start
        self._protected: Rows
        self._place()

    # --- what it knows -----------------------------------------------------------------------------------------------

    @property
    def last(self) -> DriftRecord | None:
        """The newest record; None before the first step."""
        return self.history[-1] if self.history else None

    @torch.no_grad()
    def coordinates(self) -> Tensor:
        """Return c = U (phi - phi_0) of the present weights, `[rank]` float64."""
        return self._watched.coordinates(self._moved(self._start))[0]

    # --- around a step -----------------------------------------------------------------------------------------------

    def _check(self, optimizer: Optimizer) -> None:
        if self._aligned and any(p.device != self._aligned.operator.device for p in self._parameters.values()):  # fmt: skip
            raise SpecDefError(
                "the model was moved to another device after `aligned` was built",
                hint="Move the model first, or build the Trainer first, which moves it.",
            )
        owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
        foreign = [name for name, p in self._parameters.items() if id(p) not in owned]
        # a projection would move weights that are meant to stay
        if foreign and self.mode != "monitor":
            raise SpecDefError(
                f"{len(foreign)} of {len(self._parameters)} parameters of the subspace are not the optimiser's, among them {foreign[0]}",
                hint="Take the subspace over the parameters that are trained: params=[…] of fisher_subspace.",
            )
        self._place()

    def _before_step(self) -> None:
        if self.mode != "first-order":
            return
        gradients = {name: p.grad for name, p in self._parameters.items() if p.grad is not None}
        if not gradients:
            return
        pieces = ((name, g.reshape(-1)) for name, g in gradients.items())
        c, _ = self._protected.coordinates(pieces, covector=True)
        for name, p in self._parameters.items():
            taken = self._protected.part(name, c, covector=True).view_as(p)
            if p.grad is None:
                # the projection is not diagonal: a weight the loss does not reach may have to move along
                p.grad = torch.zeros_like(p)
            p.grad.copy_(p.grad.to(taken.dtype) - taken)

    def _after_step(self, learning_rate: float) -> None:
        if self.mode == "second-order":
            self._project()
        step = len(self.history) + 1
        look = self._aligned is not None and step % self.every == 0
        alignment = self._aligned.loss() if self._aligned is not None and look else None
        if look and self.mode == "second-order":
            self._turn()
        c, distance = self._watched.coordinates(self._moved(self._start))
        in_subspace = float(self.subspace.values.double().cpu() @ c**2) / 2
        record = DriftRecord(
            step=step,
            time=(self.history[-1].time if self.history else 0.0) + learning_rate,
            in_subspace=in_subspace,
            drift=self._watched.within(c) / distance if distance else 0.0,
            distance=distance,
            alignment=alignment,
        )
        self.history.append(self._left(record, learning_rate))
        self._warn()

    def _project(self) -> None:
        """Remove from the weights what has moved within the protected rows since they were taken."""
        c, _ = self._protected.coordinates(self._moved(self._reference))
        for name, p in self._parameters.items():
            taken = self._protected.part(name, c).view_as(p)
            p.copy_(p.to(taken.dtype) - taken)

    def _turn(self) -> None:
        assert self._aligned is not None
        rows = self._aligned.turned(self._protected.flat(), self.subspace.metric)
        if rows is None:
            return
        self._protected = Rows(rows, self.subspace.metric, self._parameters, self._dtype)
        if self._reference is self._start:
            self._reference = {name: p.detach().clone() for name, p in self._parameters.items()}
        for name, p in self._parameters.items():
            self._reference[name].copy_(p)

    # --- forecast ----------------------------------------------------------------------------------------------------

    def _value(self, record: DriftRecord) -> float | None:
        """Return the loss that is forecast: the measured one where it is measured at all."""
        return record.alignment if self._aligned else record.in_subspace

    def _left(self, now: DriftRecord, learning_rate: float) -> DriftRecord:
        """Return the record of this step with its forecast."""
        if (value := self._value(now)) is not None:
            self._known.append((now.time, value))
            exponent, left = time_left(self._known, self.threshold)
            if left:
                left = left / learning_rate if learning_rate > 0 else math.inf
        elif (last := self.last) and last.steps_left is not None:
            exponent, left = last.exponent, max(0.0, last.steps_left - 1)
        else:
            return now
        return replace(now, exponent=exponent, steps_left=left)

    def _warn(self) -> None:
        record = self.history[-1]
        left = record.steps_left
        if self.warned or left is None or left >= self.warn_steps:
            return
        self.warned = True
        if self._on_warning:
            self._on_warning(record)
            return
        what = "the alignment loss" if self._aligned else "the alignment loss from drift into the sensitive subspace"  # fmt: skip
        when = f"is forecast to reach {self.threshold:g} in {left:.0f} steps" if left else f"has passed {self.threshold:g}"  # fmt: skip
        warnings.warn(f"step {record.step}: {what} {when}", DriftWarning, stacklevel=2)

    # --- private -----------------------------------------------------------------------------------------------------

    def _place(self) -> None:
        """Put everything where the parameters are now: a Trainer moves the model after the guard was made."""
        here = [p.device for p in self._parameters.values()]
        if getattr(self, "_devices", None) == here:
            return
        self._devices = here
        for name, p in self._parameters.items():
            self._start[name] = self._start[name].to(p.device)
        metric = self.subspace.metric
        self._watched = Rows(self.subspace.vectors, metric, self._parameters, self._dtype)
        self._protected = self._watched
        if self._extra is not None:
            wide = torch.cat([self.subspace.vectors, self._extra.to(self.subspace.vectors)])
            basis = torch.linalg.qr(wide.T)[0].T
            self._protected = Rows(basis, metric, self._parameters, self._dtype)

    def _moved(self, since: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield the displacement since given weights, a parameter at a time."""
        wide = self._watched.dtype
        for name, p in self._parameters.items():
            yield name, (p.to(wide) - since[name].to(wide)).reshape(-1)


def _parameters(model: nn.Module, subspace: FisherSubspace) -> dict[str, nn.Parameter]:
    """Return the subspace's parameters of a model, by any of their names."""
    every = dict(model.named_parameters(remove_duplicate=False))
    missing = [name for name in subspace.parameters if name not in every]
    if missing:
        raise SpecDefError(
            f"the subspace is of a parameter {missing[0]} that the model does not have",
            hint="Compute the subspace on the model that is trained, after adapters were put in.",
        )
    found = {name: every[name] for name in subspace.parameters}
    count = sum(p.numel() for p in found.values())
    if count != subspace.vectors.shape[1]:
        raise SpecDefError(
            f"the subspace lies in {subspace.vectors.shape[1]} dimensions, its parameters here have {count}",
            hint="Guard the whole parameters, not shards of them.",
        )
    return found
