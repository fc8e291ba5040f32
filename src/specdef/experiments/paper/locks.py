"""One model under every lock: the paper's deformation, the compensated form of its successor, and the strongest absorbed design."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from specdef.curvature.losses import Batch
from specdef.experiments.kept import Kept
from specdef.experiments.record import Progress
from specdef.lock.config import LockConfig
from specdef.lock.deformation.config import DeformationConfig
from specdef.lock.deformation.matrices import find_matrices, largest_singular_values
from specdef.lock.deformation.retain import measure_utility
from specdef.lock.in_memory import lock_model

DEFORMATION, COMPENSATED, ABSORBED = "deformation", "compensated", "absorbed max"
LOCKS = (DEFORMATION, COMPENSATED, ABSORBED)
"""Columns beside the unlocked model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipes:
    """How a model is locked.

    Args:
        deformation: Algorithm 1 of papers/001.
        compensated: Of arXiv 2602.18868; None where nothing of the model takes an inserted layer.
        absorbed: The strongest design.
        others: Further locks by name.
    """

    deformation: DeformationConfig
    compensated: LockConfig | None = field(default_factory=lambda: LockConfig(method="compensated"))
    absorbed: LockConfig = field(default_factory=LockConfig)
    others: Mapping[str, LockConfig] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the recipes as JSON values by lock."""
        plain = {COMPENSATED: self.compensated, ABSORBED: self.absorbed, **self.others}
        return {DEFORMATION: self.deformation.to_dict(), **{n: c.to_dict() for n, c in plain.items() if c}}  # fmt: skip


def lock_all(
    original: nn.Module,
    recipes: Recipes,
    *,
    retain: Sequence[Batch],
    heldout: Sequence[Batch],
    test: Sequence[Batch],
    kept: Kept,
    name: str,
    say: Progress,
    calibration: int = 8,
) -> tuple[dict[str, nn.Module], list[dict[str, Any]]]:
    """Lock copies of a model by every recipe; the deformation, which is trained, is kept and gone on from.

    Args:
        original: Unlocked; not changed.
        recipes: How.
        retain: Batches of the model's own task: the deformation trains on all, the absorbed lock is designed on the first.
        heldout: Batches that choose the state of the deformation.
        test: Batches of its own task its utility is measured on.
        kept: The state of the experiment.
        name: Of the model and seed, unique within the experiment.
        say: Told how it goes.
        calibration: Batches for the absorbed lock.

    Returns:
        (locked models by name, one entry of facts for each lock: utility on `test` before and after, growth of the largest
        singular values, seconds).
    """
    before = measure_utility(original, test)
    models: dict[str, nn.Module] = {}
    facts = []
    for lock, recipe in _recipes(recipes).items():
        victim = copy.deepcopy(original).eval()
        say(f"{name}: locking, {lock}")
        began = time.perf_counter()
        if isinstance(recipe, DeformationConfig):
            seconds = kept.trained(f"{name}, {lock}", victim, lambda m, r=recipe: _deform(m, r, retain, heldout, kept, name, say))["seconds"]  # type: ignore[misc]  # fmt: skip
        else:
            batches = retain[:calibration] if recipe.method == "absorbed" else None
            lock_model(victim, recipe, calibration=batches)
            seconds = time.perf_counter() - began
        after = measure_utility(victim, test)
        models[lock] = victim.eval()
        facts.append(
            {
                "model": name, "lock": lock, "utility_before": before.value, "utility_after": after.value, "metric": before.metric,
                "loss_before": before.loss, "loss_after": after.loss, "seconds": round(seconds, 2),
                **_growth(original, victim, recipe),
            }
        )  # fmt: skip
        say(f"{name}, {lock}: {before.metric} {before.value:.4f} before, {after.value:.4f} locked")
    return models, facts


def raised(facts: Sequence[Mapping[str, Any]], lock: str) -> str:
    """Say by how much a deformation raised the singular values.

    Args:
        facts: Of `lock_all`.
        lock: Its name.

    Returns:
        A note; empty for other locks.
    """
    growth = [
        fact["growth_median"] for fact in facts if fact["lock"] == lock and "growth_median" in fact
    ]
    return (
        f"the median matrix's largest singular value rose {sum(growth) / len(growth):.2f} times"
        if growth
        else ""
    )


def _recipes(recipes: Recipes) -> dict[str, DeformationConfig | LockConfig]:
    found: dict[str, DeformationConfig | LockConfig | None] = {
        DEFORMATION: recipes.deformation, COMPENSATED: recipes.compensated, ABSORBED: recipes.absorbed, **recipes.others,
    }  # fmt: skip
    return {name: recipe for name, recipe in found.items() if recipe is not None}


def _deform(
    model: nn.Module, recipe: DeformationConfig, retain: Sequence[Batch], heldout: Sequence[Batch], kept: Kept, name: str, say: Progress,
) -> dict[str, Any]:  # fmt: skip
    state = kept.file(f"{name}, unfinished")
    began = time.perf_counter()

    def told(step: Any) -> None:
        if found := step.snapshot:
            say(f"{name}: deformation, step {step.step} of {step.steps}, utility {found.utility:.4f}, sigma_max {found.sigma_max:.1f}")  # fmt: skip

    locked = lock_model(
        model, recipe, retain=retain, heldout=heldout, checkpoint=state, resume=state.exists(), training_progress=told
    )  # fmt: skip
    return {"seconds": time.perf_counter() - began, "training": {n: locked.certificate.training[n] for n in ("steps", "kept_step", "stopped")}}  # fmt: skip


def _growth(
    original: nn.Module, locked: nn.Module, recipe: DeformationConfig | LockConfig
) -> dict[str, Any]:
    """Return by how much the deformation raised the matrices' largest singular values; other locks state theirs."""
    if not isinstance(recipe, DeformationConfig):
        return {"scale": recipe.top}
    before, after = (largest_singular_values(find_matrices(m, recipe)) for m in (original, locked))
    ratios = sorted(after[name] / value for name, value in before.items())
    return {
        "sigma_max_before": max(before.values()), "sigma_max_after": max(after.values()),
        "growth_median": ratios[len(ratios) // 2], "growth_max": ratios[-1],
    }  # fmt: skip
