"""One training run of a prepared model: steps, evaluations, and what the numbers did."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from specdef.attacks.optimizers import OPTIMIZERS
from specdef.attacks.run import Pruned, Status
from specdef.attacks.task import Budget, Setting, Task
from specdef.curvature.losses import Batch
from specdef.lock.deformation.data import batches_from
from specdef.lock.deformation.optimizers import falling
from specdef.lock.deformation.retain import measure_utility, task_loss, task_mean, to_device

SAMPLE = 1 << 16
"""Numbers of a tensor that are looked at for how many of them moved."""

Watch = Callable[[int, float], None]
"""Told (step, held-out loss) after every evaluation; may raise `Pruned`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A model ready to be trained by an attacker.

    Args:
        model: The edited copy; may be another object than what was given.
        groups: What trains: parameter groups as torch's optimisers take them. `rate_scale` multiplies the learning rate
            of a group.
        relative_cost: FLOPs per step over those of plain full training, estimated.
        notes: Sentences the reader should see.
    """

    model: nn.Module
    groups: list[dict[str, Any]]
    relative_cost: float = 1.0
    notes: tuple[str, ...] = field(default=())


class Trial:
    """One training run of a prepared model.

    Args:
        prepared: The model and what trains.
        task: What is learned and judged.
        setting: How it trains.
        budget: What it may cost.
        seed: Of the order of the batches.
        idle: Batches pass through the model, but no step is taken.
    """

    def __init__(
        self, prepared: Prepared, task: Task, setting: Setting, budget: Budget, seed: int, *, idle: bool = False
    ) -> None:  # fmt: skip
        self.model, self.task, self.setting, self.budget = prepared.model, task, setting, budget
        self.seed, self.idle = seed, idle
        self.parameters: list[nn.Parameter] = [p for g in prepared.groups for p in g["params"]]
        moving = {id(p) for p in self.parameters}
        for parameter in self.model.parameters():
            parameter.requires_grad_(id(parameter) in moving)
        self.before = [p.detach().clone() for p in self.parameters]
        spec = OPTIMIZERS[setting.optimizer]
        self.closed = spec.closure
        self.scales = [group.get("rate_scale", 1.0) for group in prepared.groups]
        groups = [{n: v for n, v in g.items() if n != "rate_scale"} for g in prepared.groups]
        self.optimizer = spec.build(self.model, groups, setting)
        self.steps: list[int] = []
        self.losses: list[float] = []
        self.accuracies: list[float] = []
        self.seconds = 0.0

    def run(self, watch: Watch | None) -> Status:
        """Train to the end of the budget, or of the run.

        Args:
            watch: Told how it goes; may end it.

        Returns:
            How it ended.
        """
        self._evaluate(0)
        self.model.train()
        try:
            for step, (_, batch) in enumerate(
                batches_from(self.task.train, self.seed, 0, self.budget.steps), start=1
            ):
                began = time.perf_counter()
                finite = self._step(step, batch)
                self.seconds += time.perf_counter() - began
                if not finite:
                    self._record(step, math.inf, math.nan)
                    return "diverged"
                if step in self.budget.evaluated_after:
                    loss = self._evaluate(step)
                    if not math.isfinite(loss):
                        return "diverged"
                    if watch:
                        watch(step, loss)
                    if self.budget.seconds is not None and self.seconds > self.budget.seconds:
                        return "finished" if step == self.budget.steps else "out of time"
        except Pruned:
            return "pruned"
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # of a preconditioner, on numbers that are hardly finite
            return "failed"
        finally:
            self.model.eval()
        return "finished"

    def change(self) -> tuple[float, float]:
        """Measure how far the weights went.

        Returns:
            Norm of the change over the norm of the start, inf where it is not finite; and the share of numbers with a gradient
            whose value is what it was at the start, by up to `SAMPLE` evenly spaced numbers of every tensor.
        """
        norms: list[float] = []
        still = total = 0
        with torch.no_grad():
            for parameter, before in zip(self.parameters, self.before, strict=True):
                moved = parameter - before
                norms.append(_norm(moved))
                if parameter.grad is not None:
                    every = max(1, -(-moved.numel() // SAMPLE))
                    pushed = parameter.grad.flatten()[::every] != 0
                    total += int(pushed.sum())
                    still += int((pushed & (moved.flatten()[::every] == 0)).sum())
            size = math.hypot(*map(_norm, self.before))
        change = math.hypot(*norms)
        relative = change / size if size and math.isfinite(change) else math.inf
        return relative, still / total if total else 0.0

    def _step(self, step: int, batch: Batch) -> bool:
        """Take one step; return whether its loss and the weights' gradients were finite."""
        own = to_device(
            _shortened(cast_batches([batch], self.setting)[0], self.setting), self.model
        )
        factor = rate_factor(self.setting, step - 1, self.budget.steps)
        for group, scale in zip(self.optimizer.param_groups, self.scales, strict=True):
            group["lr"] = self.setting.learning_rate * scale * factor

        def loss() -> Tensor:
            kind = task_loss(self.model, own, self.task.loss)
            return task_mean(kind, kind.outputs(self.model, own), own)

        def closure() -> Tensor:
            self.optimizer.zero_grad(set_to_none=True)
            value = loss()
            value.backward()  # type: ignore[no-untyped-call]
            if self.setting.max_grad_norm is not None:
                nn.utils.clip_grad_norm_(self.parameters, self.setting.max_grad_norm)
            return value

        if self.idle:
            with torch.no_grad():
                return bool(loss().isfinite())
        value: Any
        if self.closed == "graph":  # the optimiser differentiates the loss itself, twice
            value = self.optimizer.step(loss)  # type: ignore[arg-type]
        elif self.closed == "gradient":
            value = self.optimizer.step(closure)  # type: ignore[arg-type]
        else:
            value = closure()
            self.optimizer.step()
        return bool(torch.as_tensor(value).detach().isfinite())

    def _evaluate(self, step: int) -> float:
        utility = measure_utility(
            self.model, cast_batches(self.task.heldout, self.setting), self.task.loss
        )
        accuracy = math.nan if utility.metric == "negative loss" else utility.value
        self._record(step, utility.loss if math.isfinite(utility.loss) else math.inf, accuracy)
        return self.losses[-1]

    def _record(self, step: int, loss: float, accuracy: float) -> None:
        self.steps.append(step)
        self.losses.append(loss)
        self.accuracies.append(accuracy)


def has_running_statistics(model: nn.Module) -> bool:
    """Tell whether batches change a model that merely pass through it in training mode, as those of batch norms do."""
    return any(
        isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None
        for module in model.modules()
    )


def _norm(tensor: Tensor) -> float:
    rows = tensor.flatten(1) if tensor.ndim > 1 else tensor.reshape(1, -1)
    norm = float(torch.linalg.vector_norm(torch.linalg.vector_norm(rows, dim=1).double()))
    if 0 < norm < math.inf:
        return norm
    return float(
        torch.linalg.vector_norm(tensor, dtype=torch.float64)
    )  # squares leave float32's range first


def rate_factor(setting: Setting, step: int, steps: int) -> float:
    """Return what the learning rate is multiplied by in a step.

    Args:
        setting: Its schedule and warm-up are used.
        step: 0 for the first.
        steps: Steps in all.

    Returns:
        A factor in [0, 1].

    >>> [rate_factor(Setting(schedule="linear", warmup=0.5), step, 4) for step in range(4)]
    [0.5, 1.0, 1.0, 0.5]
    """
    warm = round(setting.warmup * steps)
    if step < warm:
        return (step + 1) / warm
    return falling(setting.schedule, (step - warm) / (steps - warm))


def _shortened(batch: Batch, setting: Setting) -> Batch:
    """Return the first rows of a batch, as many as `batch_fraction` says, one at least."""
    if setting.batch_fraction == 1:
        return batch

    def first(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.ndim == 0:
            return value
        return value[: max(1, round(len(value) * setting.batch_fraction))]

    if isinstance(batch, dict):
        return {name: first(value) for name, value in batch.items()}
    return [first(value) for value in batch]


def cast_batches(batches: Any, setting: Setting) -> list[Batch]:
    """Return batches with floating inputs in the precision of the model.

    Args:
        batches: Any batches.
        setting: Its dtype is used.

    Returns:
        The batches; regression targets are cast by the loss.
    """
    dtype = getattr(torch, setting.dtype)

    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return [
        {n: cast(x) for n, x in batch.items()}
        if hasattr(batch, "items")
        else [cast(x) for x in batch]
        for batch in batches
    ]
