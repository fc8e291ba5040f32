"""The language model of the `limits` experiment: relearning a text under the compensated and the absorbed lock, and utility against scale."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from specdef.attacks.attack import Attack
from specdef.attacks.full import FullTraining
from specdef.attacks.partial.lora import LoRA
from specdef.attacks.registry import ATTACKS
from specdef.attacks.run import Pruned
from specdef.attacks.structural.edits import expand_inserted
from specdef.attacks.task import Budget, Setting, Task
from specdef.experiments.kept import Kept
from specdef.experiments.limits_setup import EVERYWHERE, LM, SCALE, Language, decompose, lock_at
from specdef.experiments.lock_table import UNLOCKED
from specdef.experiments.paper.locks import ABSORBED, COMPENSATED
from specdef.experiments.record import Progress
from specdef.experiments.smollm2_locks import Settings as Texts
from specdef.experiments.smollm2_locks import problem
from specdef.lock.config import LockConfig
from specdef.lock.deformation.retain import measure_utility
from specdef.lock.in_memory import lock_model
from specdef.lock.plan import Projection

BLOWN_UP = 1.0
"""Nats above the start at which a run of the sweep ends: it cannot become the best."""

Rows = list[dict[str, Any]]


def language_part(
    settings: Language, seed: int, kept: Kept, say: Progress, device: str
) -> dict[str, Rows]:
    """Lock the model, attack it and measure its utility at every scale; what was made before is not made again.

    Args:
        settings: How much.
        seed: Of the texts drawn and the order of the batches.
        kept: The state of the experiment.
        say: Told of every run.
        device: Where attacks train.

    Returns:
        "runs": one row for every attack, model and learning rate; "utility": one for every precision and scale.
    """
    needed = _Lazy(lambda: _problem(settings, seed, device, say))
    runs: Rows = []

    def attack(lock: str, attack: Attack, rates: Sequence[float], part: str) -> None:
        for rate in rates:
            name = f"{LM}, seed {seed}, {lock}: {attack.name} at {rate:g}"

            def run(rate: float = rate, name: str = name) -> dict[str, Any]:
                say(name)
                return one_run(attack, needed.model(lock), rate, settings, seed, needed.value)

            runs.append(
                {"seed": seed, "part": part, "lock": lock, "attack": attack.name, **kept.once(name, run)}
            )  # fmt: skip

    full = FullTraining()
    for lock in (UNLOCKED, COMPENSATED, ABSORBED):
        attack(lock, full, settings.paper_rates, "paper")
        attack(lock, full, settings.sweep.get(lock, ()), "sweep")
    for lock in (UNLOCKED, COMPENSATED, EVERYWHERE):
        attack(lock, LoRA(targets="all"), (settings.lora_rate,), "paper")
        attack(lock, LoRA(targets="all"), settings.lora_sweep.get(lock, ()), "sweep")
    best = min((r for r in runs if (r["lock"], r["attack"]) == (UNLOCKED, full.name)), key=lambda r: _number(r["loss"]))  # fmt: skip
    for name in ("merge", "freeze-inserted"):
        attack(COMPENSATED, ATTACKS[name], (best["learning_rate"],), "limit")
    attack(COMPENSATED, ATTACKS["layer-injection"], settings.limit_rates, "limit")
    utility = _utility(settings, seed, kept, say, needed)
    return {"runs": runs, "utility": utility}


def one_run(
    attack: Attack, model: nn.Module, rate: float, settings: Language, seed: int, known: Problem
) -> dict[str, Any]:
    """Attack once; a run whose loss has risen by `BLOWN_UP` ends there.

    Args:
        attack: What trains.
        model: Not changed.
        rate: AdamW's.
        settings: Steps and evaluations.
        seed: Of the order of the batches.
        known: What is learned, and the original.

    Returns:
        JSON values; the loss is the lowest, the accuracy that of the last evaluation, and steps those to the lowest loss.
    """

    def watch(_: int, loss: float) -> None:
        if loss > known.start + BLOWN_UP:
            raise Pruned

    began = time.perf_counter()
    run = attack(
        model, known.task, Setting(learning_rate=rate), Budget(steps=settings.steps, evaluations=settings.evaluations), seed=seed,
        original=known.original, watch=watch,
    )  # fmt: skip
    accuracies = [a for a in run.accuracies if not math.isnan(a)]
    low = min(range(len(run.losses)), key=lambda i: run.losses[i])
    return {
        "learning_rate": rate, "start_loss": run.start, "start_accuracy": accuracies[0], "loss": run.best, "final_loss": run.losses[-1],
        "accuracy": accuracies[-1], "steps": run.steps[low], "last_step": run.steps[-1],
        "status": "diverged" if run.status in ("pruned", "diverged") else run.status,
        "seconds": round(time.perf_counter() - began, 2), "prepare_seconds": round(run.prepare_seconds, 3),
        "added_parameters": run.added_parameters, "parameters": sum(p.numel() for p in model.parameters()),
        "curve": [list(point) for point in zip(run.steps, run.losses, run.accuracies, strict=True)],
    }  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """The original and what is done with it.

    Args:
        original: Unlocked, where attacks train.
        task: The text to be relearned.
        start: Its held-out loss before any attack; locks leave it as it is.
        calibration: Batches of another text, for the absorbed lock.
        utility: Batches utility is measured on.
        projections: Of the matrices that are locked.
    """

    original: nn.Module
    task: Task
    start: float
    calibration: Sequence[Any]
    utility: Sequence[Any]
    projections: Mapping[str, Projection]


class _Lazy:
    """The problem and its locks, made when a run needs them: a resumed experiment may need none."""

    def __init__(self, make: Callable[[], Problem]) -> None:
        self._make = make
        self._value: Problem | None = None
        self._locked: dict[str, nn.Module] = {}

    @property
    def value(self) -> Problem:
        """The problem."""
        if self._value is None:
            self._value = self._make()
        return self._value

    def model(self, lock: str) -> nn.Module:
        """Return a locked model; one beside the original is kept at a time, as each takes half a gigabyte."""
        known = self.value
        if lock == UNLOCKED:
            return known.original
        if lock not in self._locked:
            self._locked.clear()
            if lock == ABSORBED:
                made = copy.deepcopy(known.original).cpu()
                lock_model(made, LockConfig(), calibration=known.calibration)
                made = made.to(next(known.original.parameters()).device)
            else:
                made = lock_at(known.original, known.projections, SCALE)
                if lock == EVERYWHERE:
                    expand_inserted(made)
            self._locked[lock] = made
        return self._locked[lock]


def _problem(settings: Language, seed: int, device: str, say: Progress) -> Problem:
    say(f"{LM}: loading and decomposing")
    texts = Texts(
        steps=settings.steps, evaluations=settings.evaluations, train=settings.train,
        heldout=settings.heldout + settings.utility, calibration=settings.calibration, batch_size=settings.batch_size,
        length=settings.length, tiny=settings.tiny,
    )  # fmt: skip
    model, drawn, calibration = problem(texts, seed)
    projections = decompose(model, k=settings.k, num_layers=settings.num_layers)
    model = model.to(device)
    heldout, utility = drawn.heldout[: settings.heldout], drawn.heldout[settings.heldout :]
    task = Task(name=drawn.name, train=drawn.train, heldout=_joined(heldout))
    return Problem(
        original=model, task=task, start=measure_utility(model, task.heldout).loss, calibration=calibration,
        utility=_joined(utility), projections=projections,
    )  # fmt: skip


def _joined(batches: Sequence[Any], rows: int = 4) -> list[dict[str, Any]]:
    """Put batches of equal rows together, a few at a time: one pass over the weights serves them all."""
    parts = [batches[i : i + rows] for i in range(0, len(batches), rows)]
    return [{name: torch.cat([b[name] for b in part]) for name in part[0]} for part in parts]


def _utility(settings: Language, seed: int, kept: Kept, say: Progress, needed: _Lazy) -> Rows:
    rows: Rows = []
    for dtype, scales in settings.scales.items():
        for scale in (1.0, *scales):
            name = f"{LM}, seed {seed}: utility in {dtype} at scale {scale:g}"

            def measure(dtype: str = dtype, scale: float = scale, name: str = name) -> dict[str, Any]:  # fmt: skip
                say(name)
                known = needed.value
                model = known.original
                if dtype != "float32":
                    model = copy.deepcopy(model).to(getattr(torch, dtype))
                if scale != 1:
                    model = lock_at(model, known.projections, scale)
                found = measure_utility(model, known.utility)
                return {"loss": found.loss, "accuracy": found.value, "tokens": found.rows}

            rows.append({"seed": seed, "dtype": dtype, "scale": scale, **kept.once(name, measure)})
    return rows


def _number(value: float | None) -> float:
    return math.inf if value is None else value
