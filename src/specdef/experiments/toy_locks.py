"""A small net under five locks, attacked by sixteen optimisers, each with every learning rate that does anything.

An MLP that reads digits is locked and trained on digits with permuted pixels, for five epochs. Every number is the best accuracy on
held-out rows over a sweep from where training diverges to where nothing moves, at any time of any run (runs that cannot
come to the lowest loss any more are given up on), and its mean over seeds: each seed has its own net, rows and
permutation. Beside it stand the same attack on the unlocked net, and the same net trained from fresh weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from specdef.attacks.task import Budget
from specdef.experiments.lock_table import (
    SCRATCH,
    UNLOCKED,
    Audited,
    Rows,
    audit_rows,
    forget,
    state_file,
    summarise,
    text_table,
    unique_rows,
)
from specdef.experiments.lock_table_plot import draw_accuracies
from specdef.experiments.record import Progress, claim, make_record, write_record
from specdef.experiments.toy_locks_setup import LOCKS, Net, locked, output_difference, problem

SEEDS = {"cpu": 5, "smoke": 1}
"""Seeds unless told otherwise."""

FIRST_ORDER = ("adamw", "momentum", "lion", "rmsprop", "adagrad", "adadelta", "adafactor", "lamb")
KFAC = ("kfac-1e-1", "kfac-1e-3", "kfac-1e-6", "kfac-relative")
OPTIMIZERS = (*FIRST_ORDER, "muon", *KFAC, "sophia", "xmat", "shampoo")

SIZES: dict[str, tuple[Net, tuple[str, ...], tuple[str, ...]]] = {
    "cpu": (Net(), OPTIMIZERS, tuple(LOCKS)),
    "smoke": (Net(hidden=16, depth=2, epochs=1, rows=512), ("adamw", "kfac-1e-1"), tuple(LOCKS)[:3:2]),
}  # fmt: skip
"""Net, optimisers and locks."""

UNIFORM, LOW, HIGH, EVERY, COMPENSATED = LOCKS

BEFORE: dict[str, tuple[str | None, ...]] = {
    "adamw": ("0.93", "0.47", "0.14–0.47", "0.21"),
    "momentum": ("0.89", "0.34", "0.12", None),
    "lion": ("0.82", "0.15", "0.18", "0.11"),
    "rmsprop": ("0.89", "0.49", "0.65", "0.27"),
    "adagrad": ("0.86", "0.36", "0.56", "0.26"),
    "adadelta": ("0.92", "0.52", "0.69", "0.15"),
    "adafactor": ("0.94", "0.47", "0.48", "0.29"),
    "lamb": ("0.89", "0.45", "0.49", "0.45"),
    "muon": ("0.96", "0.25", "0.14", "0.11"),
    "kfac-1e-1": ("0.95", "0.79", "0.88", "0.77"),
    "kfac-1e-3": ("0.90", "0.77", "0.90", "0.68"),
    "kfac-1e-6": ("0.87", "0.52", "0.64", "0.23"),
}
"""What was measured before this package existed, with one seed: unlocked and the first three locks."""

EARLIER: dict[tuple[str, str], str] = {
    (f"full-{name}", lock): value
    for name, values in BEFORE.items()
    for lock, value in zip((UNLOCKED, UNIFORM, LOW, HIGH), values, strict=True)
    if value is not None
}

SPREAD = 0.3
"""By how much a seed was seen to move a number of that table."""


def run(
    out: Path,
    *,
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    size: Literal["cpu", "smoke"] = "cpu",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Lock, attack and compare, and write toy-locks.json, toy-locks.md and toy-locks.png.

    Every run is kept in the cache as soon as it has ended; what was interrupted goes on from there.

    Args:
        out: Folder; made if absent.
        seeds: Of the nets, their data and permutations.
        size: smoke takes a smaller net, two optimisers and two locks.
        progress: Called with a line of text for every sweep.

    Returns:
        The record, as JSON values: command, versions, size, settings, seeds, seconds, claims, summary, table, data.
    """
    say = progress or (lambda _: None)
    net, optimizers, locks = SIZES[size]
    attacks = [f"full-{name}" for name in optimizers]
    steps = net.epochs * -(-net.rows // net.batch_size)
    budget = Budget(steps=steps, evaluations=min(22, steps))
    rows: Rows = []
    exact: Rows = []
    journals = [state_file("toy-locks", net, LOCKS, budget, seed) for seed in seeds]
    for seed, journal in zip(seeds, journals, strict=True):
        model, task = problem(net, seed)
        for name in locks:
            victim = locked(model, task, LOCKS[name])
            case = Audited(lock=name, seed=seed, locked=victim, original=model, task=task, attacks=attacks)  # fmt: skip
            found, start = audit_rows(case, budget, journal, say)
            rows += found
            difference = output_difference(model, victim, task)
            exact.append({"seed": seed, "lock": name, "output_difference": difference, **start})
    rows = unique_rows(rows)
    cells = summarise(rows)
    for cell in cells:
        cell["earlier"] = EARLIER.get((cell["attack"], cell["lock"]))
    columns = (UNLOCKED, *locks)
    scratch = next((c["accuracy"] for c in cells if c["lock"] == SCRATCH), None)
    shown = [c for c in cells if c["lock"] != SCRATCH]
    claims = _claims(shown, scratch, exact)
    record = make_record(
        "toy_locks", {"seeds": seeds, "size": size}, claims=claims,
        settings={"net": asdict(net), "locks": {n: asdict(LOCKS[n]) for n in locks}, "budget": asdict(budget)},
        table=text_table(shown, columns, "accuracy", EARLIER),
        seconds=sum(row["seconds"] for row in rows), data={"cells": cells, "locks": exact, "rows": rows},
    )  # fmt: skip
    write_record(out, "toy-locks", record, draw_accuracies(shown, columns, scratch, EARLIER))
    forget(journals)
    return record


def _claims(cells: Rows, scratch: Mapping[str, Any] | None, exact: Rows) -> list[dict[str, Any]]:
    means = {
        (c["attack"].removeprefix("full-"), c["lock"]): c["accuracy"]["mean"] for c in cells if c["accuracy"]
    }  # fmt: skip

    def of(lock: str, names: Sequence[str] = OPTIMIZERS) -> dict[str, float]:
        return {name: means[name, lock] for name in names if (name, lock) in means}

    unlocked = of(UNLOCKED)
    powers = [LOCKS[e["lock"]].compensated or e["output_difference"] == 0 for e in exact]
    claims = [
        claim("Scales of powers of two leave every output bit for bit (every seed).", all(powers), largest_difference={e["lock"]: e["output_difference"] for e in exact}),
        claim("Every optimiser learns the new task on the unlocked net: accuracy at least 0.8.", min(unlocked.values()) >= 0.8, accuracy=unlocked),
    ]  # fmt: skip

    def at_most(lock: str, limit: float, names: Sequence[str], who: str) -> None:
        if found := of(lock, names):
            claims.append(claim(f"{lock}: {who} {'stay' if len(names) > 1 else 'stays'} at or below {limit}.", max(found.values()) <= limit, accuracy=found))  # fmt: skip

    at_most(UNIFORM, 0.6, FIRST_ORDER, "all first-order optimisers")
    at_most(LOW, 0.5, ("adamw", "momentum", "lion"), "AdamW, momentum and Lion")
    if found := of(LOW, FIRST_ORDER):
        claims.append(claim(f"{LOW}: some first-order optimiser gets to 0.6, so the lock is that of a few optimisers.", max(found.values()) >= 0.6, accuracy=found))  # fmt: skip
    at_most(HIGH, 0.5, FIRST_ORDER, "all first-order optimisers")
    at_most(COMPENSATED, 0.6, ("adamw", "muon", "sophia"), "AdamW, Muon and Sophia")
    absorbed = [lock for lock in (UNIFORM, LOW, HIGH) if of(lock)]
    through = {lock: of(lock, KFAC) for lock in absorbed}
    damped = [part["kfac-1e-1"] for part in through.values() if "kfac-1e-1" in part]
    claims.append(claim("K-FAC with damping 0.1 gets through every absorbed lock: accuracy at least 0.7.", bool(damped) and min(damped) >= 0.7, accuracy=through))  # fmt: skip
    if "kfac-relative" in unlocked:
        # Where its control learns nothing it was not run on the lock: nan, which holds no claim.
        lost = {
            lock: unlocked["kfac-relative"] - part.get("kfac-relative", math.nan)
            for lock, part in through.items()
        }
        claims.append(claim("K-FAC with weights in the scales of their rows and columns learns on every absorbed lock what it learns without, to 0.05.", all(gap <= 0.05 for gap in lost.values()), falls_short_by=lost, unlocked=unlocked["kfac-relative"]))  # fmt: skip
    if found := of(EVERY):
        short = {name: unlocked[name] - value for name, value in found.items()}
        claims.append(claim("Scaling every channel alike is no lock: AdamW comes within 0.1 of its unlocked accuracy.", short["adamw"] <= 0.1, falls_short_by=short))  # fmt: skip
    if scratch:
        claims.append(claim("From scratch AdamW learns as much as from the unlocked net, to 0.03: on this task weights are no head start.", scratch["mean"] >= unlocked["adamw"] - 0.03, scratch=scratch, adamw=unlocked["adamw"]))  # fmt: skip
    off = {f"{name}, {lock}": gap for (name, lock), mean in means.items() if (gap := _gap(mean, EARLIER.get((f"full-{name}", lock)))) is not None}  # fmt: skip
    claims.append(claim(f"Every mean is within {SPREAD} of what one seed gave before.", max(off.values()) <= SPREAD, compared=len(off), beyond={n: g for n, g in off.items() if g > SPREAD}, beyond_half={n: g for n, g in off.items() if g > SPREAD / 2}))  # fmt: skip
    return claims


def _gap(mean: float, earlier: str | None) -> float | None:
    """Return how far a mean is from a number or a range measured before."""
    if earlier is None:
        return None
    ends = [float(x) for x in earlier.split("–")]
    return max(min(ends) - mean, mean - max(ends), 0.0)
