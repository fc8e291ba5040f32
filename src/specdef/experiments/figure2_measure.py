"""The measurements of figure 2: bounds and curvature while a singular value grows, steps of Adam, and the compensated form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from specdef.curvature.factors import dense_hessian, lambda_max, network_bounds
from specdef.experiments.batched_adam import train
from specdef.experiments.tiny_nets import MLP, Task, compensate, make_task, scale_top

PAPER_RATE = 1e-3
"""Adam's learning rate in Appendix B.1."""

GOAL = 0.5
"""Convergence: this share of what the unlocked net gains with PAPER_RATE in the whole budget."""

Inserted = Literal["none", "trainable", "frozen"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How much is measured.

    Args:
        scales: Factors of the top singular value for the steps; 1 first.
        bound_scales: The same for curvature and bounds.
        rates: Learning rates; PAPER_RATE is one of them.
        budget: Steps after which a run counts as not converged.
    """

    scales: tuple[float, ...]
    bound_scales: tuple[float, ...]
    rates: tuple[float, ...]
    budget: int


def curvature_rows(architecture: str, seed: int, scales: Sequence[float]) -> list[dict[str, Any]]:
    """Measure lambda_max(H) and every bound while the task's weight is scaled.

    Args:
        architecture: "mlp", "cnn" or "transformer".
        seed: Of weights and data.
        scales: Factors of the top singular value.

    Returns:
        Per scale: lambda_max, and per kind of bound (name/law) the best over the pairs: value, ratio truth / bound, pair, the
        part of it due to the Gauss-Newton matrix; or the reason why all are vacuous.
    """
    rows = []
    for scale in scales:
        task = make_task(architecture, seed)
        _scale(task, task.scaled, scale)
        truth = _lambda_max(task.model, task)
        kinds: dict[str, Any] = {}
        for bound in network_bounds(task.model, task.inputs, task.targets, pairs=task.pairs):
            key = f"{bound.name}/{bound.law}"
            if bound.vacuous:
                kinds.setdefault(key, {"value": 0.0, "vacuous": bound.vacuous})
            elif bound.value > kinds.get(key, {"value": 0.0})["value"]:
                kinds[key] = {
                    "value": bound.value, "ratio": bound.tightness(truth), "rigorous": bound.rigorous,
                    "block": bound.block, "through": bound.through, "gauss_newton": bound.factors["gauss_newton"],
                }  # fmt: skip
        rows.append({"architecture": architecture, "seed": seed, "scale": scale, "lambda_max": truth, "bounds": kinds})  # fmt: skip
    return rows


def by_matrix(architecture: str, seed: int, scales: Sequence[float]) -> list[dict[str, Any]]:
    """Measure lambda_max(H) while each weight matrix in turn is scaled.

    Args:
        architecture: "mlp", "cnn" or "transformer".
        seed: Of weights and data.
        scales: Factors of the top singular value.

    Returns:
        Per matrix: its name and lambda_max at each scale.
    """
    rows = []
    for name, _ in make_task(architecture, seed).model.named_parameters():
        found = []
        for scale in scales:
            task = make_task(architecture, seed)
            _scale(task, name, scale)
            found.append(_lambda_max(task.model, task))
        rows.append({"architecture": architecture, "seed": seed, "matrix": name, "scales": list(scales), "lambda_max": found})  # fmt: skip
    return rows


def remark_rows(seed: int, scales: Sequence[float]) -> list[dict[str, Any]]:
    """Evaluate Remark A.3's bound on the MLP while the 1 or all 4 largest singular values of its last weight are scaled.

    Args:
        seed: Of weights and data.
        scales: Factors.

    Returns:
        Per k: the bound at each scale.
    """
    rows = []
    for k in (1, 4):
        found = []
        for scale in scales:
            task = make_task("mlp", seed)
            _scale(task, task.scaled, scale, k=k)
            bounds = network_bounds(task.model, task.inputs, task.targets, pairs=task.pairs)
            found.append(max(b.value for b in bounds if b.name == "remark-A.3"))
        rows.append({"seed": seed, "k": k, "scales": list(scales), "bound": found})
    return rows


def compensated_rows(seed: int, scales: Sequence[float]) -> list[dict[str, Any]]:
    """Measure lambda_max(H) of the compensated MLP with the inserted layer trainable and frozen.

    Args:
        seed: Of weights and data.
        scales: Factors.

    Returns:
        Per scale: the original's lambda_max, the two of the lock, and the largest change of an output.
    """
    task = make_task("mlp", seed)
    assert isinstance(task.model, MLP)
    original, rows = _lambda_max(task.model, task), []
    for scale in scales:
        lock = compensate(task.model, scale)
        with torch.no_grad():
            change = float((lock(task.inputs) - task.model(task.inputs)).abs().max())
        trainable = _lambda_max(lock, task)
        lock.inserted.requires_grad_(False)
        rows.append(
            {"seed": seed, "scale": scale, "original": original, "trainable": trainable,
             "frozen": _lambda_max(lock, task), "output_change": change}
        )  # fmt: skip
    return rows


def step_rows(
    architecture: str, seeds: Sequence[int], size: Size, *, inserted: Inserted = "none"
) -> list[dict[str, Any]]:
    """Count Adam's steps to the goal for every seed, scale and learning rate, in one batch (float32).

    Args:
        architecture: "mlp", "cnn" or "transformer".
        seeds: Of weights and data.
        size: Scales, rates and budget.
        inserted: For the MLP: compensate the scaled weight, with the inserted layer trainable or frozen.

    Returns:
        Per run: seed, scale, rate, steps (None: not within the budget), whether the loss overflowed, the starting loss and the goal.
    """
    tasks = [make_task(architecture, seed) for seed in seeds]
    start = [float((t.model(t.inputs) - t.targets).square().mean().detach()) for t in tasks]
    reference = _train(
        [t.model for t in tasks], tasks, [PAPER_RATE] * len(tasks), [-math.inf] * len(tasks), size
    )
    goals = [s - GOAL * (s - float(low)) for s, low in zip(start, reference.lowest, strict=True)]
    runs = [(i, scale, rate) for i in range(len(tasks)) for scale in size.scales for rate in size.rates]  # fmt: skip
    models: list[nn.Module] = []
    for i, scale, _ in runs:
        task = make_task(architecture, seeds[i])
        if inserted == "none":
            _scale(task, task.scaled, scale)
            models.append(task.model)
        else:
            assert isinstance(task.model, MLP)
            models.append(compensate(task.model, scale))
    found = _train(
        models, [tasks[i] for i, _, _ in runs], [rate for _, _, rate in runs], [goals[i] for i, _, _ in runs], size,
        frozen=("inserted.weight",) if inserted == "frozen" else (),
    )  # fmt: skip
    return [
        {"architecture": architecture, "inserted": inserted, "seed": seeds[i], "scale": scale, "rate": rate,
         "steps": int(steps) if steps >= 0 else None, "diverged": bool(diverged), "goal": goals[i], "unlocked_start": start[i]}
        for (i, scale, rate), steps, diverged in zip(runs, found.steps, found.diverged, strict=True)
    ]  # fmt: skip


def _train(models: Sequence[nn.Module], tasks: Sequence[Task], rates: Sequence[float], goals: Sequence[float], size: Size, *, frozen: Sequence[str] = ()) -> Any:  # fmt: skip
    names = [name for name, _ in models[0].named_parameters()]
    return train(
        models[0],
        {n: torch.stack([m.get_parameter(n).detach() for m in models]).float() for n in names},
        torch.stack([t.inputs for t in tasks]).float(),
        torch.stack([t.targets for t in tasks]).float(),
        learning_rate=torch.tensor(rates, dtype=torch.float64),
        goal=torch.tensor(goals, dtype=torch.float64),
        budget=size.budget,
        frozen=frozen,
    )


def _scale(task: Task, name: str, scale: float, *, k: int = 1) -> None:
    weight = task.model.get_parameter(name)
    with torch.no_grad():
        weight.copy_(scale_top(weight, scale, k=k))


def _lambda_max(model: nn.Module, task: Task) -> float:
    H: Tensor = dense_hessian(model, task.inputs, task.targets)[0]
    return lambda_max(H)
