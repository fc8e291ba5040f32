"""The small nets of the `limits` experiment: locked, attacked in every way the paper names, and what undoes the lock; and lambda_max against scale."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from specdef.attacks.registry import ATTACKS
from specdef.attacks.task import Budget, Setting, Task
from specdef.curvature.factors import dense_hessian, lambda_max, network_bounds
from specdef.experiments.figure2_measure import compensated_rows
from specdef.experiments.kept import Kept
from specdef.experiments.limits_nets import (
    Modality,
    make_modality,
    read_all,
    train_own,
)
from specdef.experiments.limits_setup import (
    MODALITIES,
    OPTIMIZERS,
    SCALE,
    VIT,
    Pictures,
    decompose,
    lock_at,
    scaled_name,
)
from specdef.experiments.lock_table import SCRATCH
from specdef.experiments.paper.locks import COMPENSATED, Recipes, lock_all
from specdef.experiments.paper.runs import Case, Plan, Recipe, attack_case, summarise
from specdef.experiments.record import Progress
from specdef.experiments.tiny_nets import MLP, compensate, make_task
from specdef.lock.deformation.config import DeformationConfig
from specdef.lock.deformation.retain import measure_utility

Rows = list[dict[str, Any]]

TASKS = {MODALITIES[0]: "other pictures", MODALITIES[1]: "another style", VIT: "other classes"}


def picture_part(
    settings: Pictures, seed: int, kept: Kept, say: Progress, device: str
) -> dict[str, Rows]:
    """Train, lock and attack the net of every modality.

    Args:
        settings: How much.
        seed: Of nets, pictures and the order of the batches.
        kept: The state of the experiment.
        say: Told of every run.
        device: Where everything trains.

    Returns:
        "rows" of all attacks, "locks": facts on every lock, "edits": what the structural attacks add and take.
    """
    splits = read_all(settings, seed)
    found: dict[str, Rows] = {"rows": [], "locks": [], "edits": []}
    for name in MODALITIES:
        modality = make_modality(name, settings, splits, seed)
        original = modality.model.to(device)
        epochs = settings.vit_epochs if name == VIT else settings.epochs

        def train(model: nn.Module, modality: Modality = modality, epochs: int = epochs) -> Mapping[str, Any]:  # fmt: skip
            began = time.perf_counter()
            say(f"{modality.name}: training the original")
            train_own(modality, model, epochs, seed)
            return {"seconds": round(time.perf_counter() - began, 2)}

        kept.trained(f"{name}, seed {seed}", original, train)
        locked = _locks(modality, original, settings, seed, kept, say)
        found["locks"] += locked.facts
        found["edits"] += kept.once(f"{name}, seed {seed}: edits", lambda m=modality, k=locked: _edits(m, k.compensated[COMPENSATED], settings, seed))  # type: ignore[misc]  # fmt: skip
        found["rows"] += _attacks(modality, original, locked, settings, seed, kept, say)
    return found


def curvature_part(scales: tuple[float, ...], seed: int) -> Rows:
    """Measure lambda_max of a small MLP under the compensated lock, and the best of the papers' bounds linear in the scale.

    Args:
        scales: Multipliers.
        seed: Of weights and data.

    Returns:
        Per scale: the original's lambda_max, the lock's with C trainable and with C frozen, and the bound.
    """
    task = make_task("mlp", seed)
    assert isinstance(task.model, MLP)
    rows = compensated_rows(seed, scales)
    for row in rows:
        lock = compensate(task.model, row["scale"])
        bounds = network_bounds(lock, task.inputs, task.targets)
        row["bound"] = max((b.value for b in bounds if b.rigorous and b.law == "linear"), default=0.0)  # fmt: skip
        row["inserted_block"] = _block(lock, task.inputs, task.targets, "inserted.weight")
    return rows


def shares(cells: Rows, models: Sequence[str]) -> dict[tuple[str, ...], float | None]:
    """Return the share of the unlocked gain by model, attack, optimiser, way and lock.

    Args:
        cells: Of `summarise`, of each model in its own quantity.
        models: Whose cells count.

    Returns:
        The means; None where the unlocked model gained nothing.
    """
    return {
        (c["model"], c["attack"], c["optimizer"], c["at"], c["lock"]): c["recovered"]["mean"] if c["recovered"] else None
        for c in cells
        if c["model"] in models and c["lock"] != SCRATCH
    }  # fmt: skip


def cells_of(rows: Rows) -> Rows:
    """Put seeds together, the ViT's rows by accuracy and the others' by loss.

    Args:
        rows: Of `picture_part`.

    Returns:
        The cells.
    """
    by_loss = summarise([r for r in rows if r["model"] != VIT], "loss")
    return by_loss + summarise([r for r in rows if r["model"] == VIT], "accuracy")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Locked:
    """Locked models: the compensated ones by column, others, and facts on all."""

    compensated: dict[str, nn.Module]
    others: dict[str, nn.Module]
    facts: Rows


def _locks(
    modality: Modality, original: nn.Module, settings: Pictures, seed: int, kept: Kept, say: Progress
) -> _Locked:  # fmt: skip
    name = f"{modality.name}, seed {seed}"
    deformation = DeformationConfig(epochs=settings.deformation_epochs, max_utility_loss=None, seed=seed)  # fmt: skip
    device = next(original.parameters()).device
    others, facts = lock_all(
        original, Recipes(deformation=deformation, compensated=None), retain=modality.own[: settings.deformation_batches],
        heldout=modality.own_test, test=modality.own_test, kept=kept, name=name, say=say,
    )  # fmt: skip
    projections = decompose(original, k=settings.k, num_layers=settings.blocks, target_modules=modality.locked)  # fmt: skip
    before = measure_utility(original, modality.own_test)
    compensated = {}
    for scale in (SCALE, *settings.scales):
        column = COMPENSATED if scale == SCALE else scaled_name(scale)
        began = time.perf_counter()
        compensated[column] = lock_at(original, projections, scale).to(device)
        seconds = round(time.perf_counter() - began, 2)
        after = measure_utility(compensated[column], modality.own_test)
        facts.append(
            {
                "model": name, "lock": column, "utility_before": before.value, "utility_after": after.value, "metric": before.metric,
                "loss_before": before.loss, "loss_after": after.loss, "seconds": seconds, "scale": scale,
            }
        )  # fmt: skip
    for fact in facts:
        fact |= {"modality": modality.name, "seed": seed}
    return _Locked(compensated=compensated, others=others, facts=facts)


def _attacks(
    modality: Modality, original: nn.Module, locked: _Locked, settings: Pictures, seed: int, kept: Kept, say: Progress
) -> Rows:  # fmt: skip
    name = modality.name
    task = Task(name=TASKS[name], train=modality.new, heldout=modality.new_test)
    budget = Budget(steps=settings.steps, evaluations=settings.evaluations)
    others = settings.optimizers.get(name, ())

    def usual(optimizer: str) -> Recipe:
        return Recipe(setting=Setting(optimizer=optimizer, learning_rate=OPTIMIZERS[optimizer]), budget=budget)  # fmt: skip

    lora = ("lora-all",) if settings.lora and name == VIT else ()
    plan = Plan(
        recipes=[usual(o) for o in ("adamw", *others)],
        sweeps=("full-adamw", *(f"full-{o}" for o in others), *lora, *settings.limits.get(name, ())), budget=budget,
    )  # fmt: skip
    first = {COMPENSATED: locked.compensated[COMPENSATED]}
    rest = {**{n: m for n, m in locked.compensated.items() if n != COMPENSATED}, **locked.others}
    sweep = name in settings.swept
    rows = attack_case(Case(model=name, task=task, original=original, locks=first, seed=seed, sweep=sweep), plan, kept, say)  # fmt: skip
    only = Plan(recipes=plan.recipes[:1], sweeps=("full-adamw",), budget=budget)
    rows += attack_case(Case(model=name, task=task, original=original, locks=rest, seed=seed, sweep=sweep), only, kept, say)  # fmt: skip
    keys = ("model", "task", "seed", "lock", "attack", "optimizer", "at")
    return list({tuple(row[k] for k in keys): row for row in rows}.values())


def _edits(modality: Modality, locked: nn.Module, settings: Pictures, seed: int) -> Rows:
    """Make the edits of the structural attacks once, for their size and time."""
    rows = []
    size = sum(p.numel() for p in locked.parameters())
    task = Task(name="", train=modality.new, heldout=modality.new_test)
    for attack in settings.limits.get(modality.name, ()):
        began = time.perf_counter()
        victim = copy.deepcopy(locked)
        prepared = ATTACKS[attack].prepare(victim, task, original=None, generator=torch.Generator().manual_seed(seed))  # fmt: skip
        after = sum(p.numel() for p in prepared.model.parameters())
        rows.append(
            {"model": modality.name, "seed": seed, "attack": attack, "parameters": size, "added_share": after / size - 1,
             "seconds": round(time.perf_counter() - began, 3)}
        )  # fmt: skip
    return rows


def _block(model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor, name: str) -> float:
    H, slices = dense_hessian(model, inputs, targets)
    return lambda_max(H[slices[name], slices[name]])
