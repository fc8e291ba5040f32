"""What an audit would run: attacks as the command line chooses them, the list of all, and the cost before it is paid."""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specdef.attacks.attack import Attack
from specdef.attacks.full import RECIPE, FullTraining
from specdef.attacks.optimizers import OPTIMIZERS
from specdef.attacks.registry import ATTACKS, find
from specdef.attacks.task import Budget, Precision, Setting, Task
from specdef.audit.suite import SUITES, Entry, Suite, entries, find_suite, with_key
from specdef.audit.verdict import TIERS
from specdef.cli.common import say
from specdef.cli.training_progress import duration
from specdef.errors import SpecDefError

if TYPE_CHECKING:
    from torch import nn

SEARCH = {"control": 9, "locked": 14}
"""Runs a search over learning rates usually takes: a lock diverges over more decades."""

AROUND = 4
"""Runs of a further seed, near the best rate of the first."""


def parse_tiers(text: str) -> tuple[int, ...]:
    """Read "1-5" or "1,3".

    Args:
        text: Comma-separated tiers and ranges of tiers.

    Returns:
        The tiers.

    Raises:
        ValueError: It is something else, or a tier there is none of.
    """
    out: list[int] = []
    for part in str(text).split(","):
        match = re.fullmatch(r"([1-6])(?:-([1-6]))?", part.strip())
        span = range(int(match[1]), int(match[2] or match[1]) + 1) if match else range(0)
        if not span:
            raise ValueError(f"--tiers takes tiers from 1 to {max(TIERS)}, like 1-5 or 1,3, got {text!r}.")  # fmt: skip
        out += span
    return tuple(dict.fromkeys(out))


def choose_suite(name: str, size: str | None) -> Suite:
    """Look a suite up by version and size."""
    return find_suite(f"{name}-{size}" if size else name)


def choose_attacks(
    suite: Suite,
    only: Sequence[str] | None,
    optimizers: Sequence[str] | None,
    key: Path | None,
) -> list[Attack] | None:
    """Return the attacks to be run where they are not the suite's as it stands.

    Args:
        suite: The suite.
        only: Names of attacks instead of the suite's.
        optimizers: What every attack is swept with; of the attacks that train all parameters and edit nothing, those with
            one of these stay.
        key: A lock's key: known-scale is run with it.

    Returns:
        The attacks; None for the suite's.

    Raises:
        SpecDefError: There is no such attack or optimiser, none is left, or the key cannot be read.
    """
    if only is None and optimizers is None and key is None:
        return None
    chosen = list(find(only or suite.attacks) if only or suite.attacks else ATTACKS.values())
    if key is not None:
        chosen = with_key(suite, chosen, key)
    if optimizers is not None:
        unknown = [name for name in optimizers if name not in OPTIMIZERS]
        if unknown or not optimizers:
            raise SpecDefError(
                f"--optimizers: no optimiser is called {', '.join(map(repr, unknown)) or 'nothing'}",
                hint=f"Optimisers: {', '.join(OPTIMIZERS)}.",
            )
        chosen = [b for a in chosen if (b := _with_optimizers(a, tuple(optimizers))) is not None]
    if not chosen:
        raise SpecDefError(
            "no attack is left", hint="--optimizers keeps attacks on all parameters only if they use one of its own."
        )  # fmt: skip
    return chosen


def _with_optimizers(attack: Attack, optimizers: tuple[str, ...]) -> Attack | None:
    if isinstance(attack, FullTraining):
        return attack if set(attack.optimizers) <= set(optimizers) else None
    changed = copy.copy(attack)
    changed.optimizers = optimizers
    return changed


def listing() -> dict[str, Any]:
    """Return every attack, optimiser and suite as JSON values."""
    return {
        "attacks": [
            {"name": a.name, "tier": a.tier, "optimizers": list(a.optimizers), "source": a.source, "summary": a.summary}
            for a in ATTACKS.values()
        ],
        "optimizers": [
            {
                "name": s.name, "tier": s.tier, "source": s.source, "learning_rates": list(s.learning_rates),
                "relative_cost": s.relative_cost,
            }
            for s in OPTIMIZERS.values()
        ],
        "suites": [
            {
                "name": s.name, "attacks": list(s.attacks) or list(ATTACKS), "recipes": [f"{a}, {r}" for a, r, _ in s.variants],
                "budget": asdict(s.budget), "seeds": s.seeds,
            }
            for s in SUITES.values()
        ],
    }  # fmt: skip


def say_listing(values: dict[str, Any]) -> None:
    """Say what `listing` returned."""
    for tier, name in TIERS.items():
        say(f"tier {tier}: {name}")
        for attack in (a for a in values["attacks"] if a["tier"] == tier):
            say(f"  {attack['name']:24} {attack['summary']} [{attack['source']}]")
    say(f"optimisers: {', '.join(o['name'] for o in values['optimizers'])}")
    for suite in values["suites"]:
        budget = suite["budget"]
        say(f"suite {suite['name']}: {len(suite['attacks'])} attacks, {budget['steps']} steps, {suite['seeds']} seed(s)")  # fmt: skip


def plan_audit(
    locked: nn.Module,
    task: Task,
    suite: Suite,
    attacks: Sequence[Attack] | None,
    *,
    tiers: Sequence[int],
    budget: Budget,
    seeds: int,
    dtype: Precision = "float32",
) -> dict[str, Any]:
    """Say what would be run, and what it would take.

    Args:
        locked: The locked model; left as it is.
        task: The task.
        suite: The suite.
        attacks: Instead of the suite's.
        tiers: Tiers to run.
        budget: Of a run.
        seeds: Per side.
        dtype: Precision both sides train in.

    Returns:
        `cells` (`attack, tier, optimizer, reason, runs, seconds`; `reason` says why an attack does not apply), `step_seconds`,
        `evaluation_seconds`, `seconds`.
    """
    step, evaluation = _times(locked, task, dtype)
    evaluations = len(budget.evaluated_after) + 1

    def cost(runs: int, relative: float) -> float:
        training = budget.steps * step * relative
        if budget.seconds is not None:
            training = min(training, budget.seconds)
        return runs * (training + evaluations * evaluation)

    cells: list[dict[str, Any]] = []
    for entry in entries(suite, attacks, tiers):
        reason = entry.attack.applies(locked)
        runs = 0 if reason else sum(_runs(entry, suite, side, seeds) for side in SEARCH)
        cells.append({
            "attack": entry.name, "tier": entry.tier, "optimizer": entry.optimizer, "reason": reason, "runs": runs,
            "seconds": cost(runs, OPTIMIZERS[entry.optimizer].relative_cost),
        })  # fmt: skip
    scratch = SEARCH["control"] + (seeds - 1) * AROUND
    return {
        "dry_run": True, "suite": suite.name, "budget": asdict(budget), "seeds": seeds, "dtype": dtype, "cells": cells, "step_seconds": step,
        "evaluation_seconds": evaluation, "seconds": cost(scratch, 1.0) + sum(cell["seconds"] for cell in cells),
    }  # fmt: skip


def say_dry_run(values: dict[str, Any]) -> None:
    """Say what `plan_audit` returned."""
    for cell in values["cells"]:
        what = f"does not apply: {cell['reason']}" if cell["reason"] else f"{cell['runs']} runs, {duration(cell['seconds'])}"  # fmt: skip
        say(f"  tier {cell['tier']}  {cell['attack']} with {cell['optimizer']}: {what}")
    budget = values["budget"]
    say(
        f"suite {values['suite']}: {budget['steps']} steps and {budget['evaluations']} evaluations a run, {values['seeds']} seed(s); "
        f"a step takes {duration(values['step_seconds'])}, an evaluation {duration(values['evaluation_seconds'])}"
    )
    say(
        f"time: about {duration(values['seconds'])}, if every tier holds; less where runs are pruned or share a control, or a "
        "tier is broken early, more where an attack's own edits take long"
    )
    say("dry run: nothing was written")


def _runs(entry: Entry, suite: Suite, side: str, seeds: int) -> int:
    rates = len(getattr(entry.attack, "learning_rates", None) or ())
    first = rates or min(SEARCH[side], suite.max_trials)
    further = first if rates or suite.whole_sweeps else min(AROUND, suite.max_trials)
    return first + (seeds - 1) * further


def _times(model: nn.Module, task: Task, dtype: Precision) -> tuple[float, float]:
    """Return the seconds of a step and of an evaluation."""
    began = time.perf_counter()
    run = RECIPE(
        model, task, Setting(learning_rate=1e-12, dtype=dtype), Budget(steps=2, evaluations=1)
    )
    whole = time.perf_counter() - began
    return run.seconds / 2, max(whole - run.seconds - run.prepare_seconds, 0.0) / 2
