"""An absorbed lock on top of a deformation: what each of the two withstands, and both.

A small MLP reads scikit-learn's digits, a ResNet-18 MNIST (size full). Each is deformed by Algorithm 1, absorbed, and absorbed on top
of the deformation; then the same attacks are swept over learning rates on each of them, on the unlocked net and on fresh
weights. The task is the same pictures in another arrangement. Recovered is the best gain of a sweep over the best gain of
its control. Attacks of tier 5 edit the weights first: rebalance undoes the absorbed lock, clip-spectrum the deformation,
rebalance-clip both.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from specdef.attacks.task import Budget
from specdef.experiments.composition_plot import draw
from specdef.experiments.composition_setup import (
    ABSORBED,
    BOTH,
    DEFORMATION,
    LOCKS,
    UPPER,
    Case,
    Vision,
    facts,
    key_of,
    resnet,
    toy,
)
from specdef.experiments.deformation_measure import Settings, places
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
from specdef.experiments.record import Progress, claim, make_record, write_record
from specdef.experiments.toy_locks_setup import Net

SEEDS = {"cpu": 3, "smoke": 1, "full": 1}
"""Seeds unless told otherwise."""

TRAINING = ("full-adamw", "full-momentum", "full-adafactor", "lora-all")
EDITS = ("rebalance", "clip-spectrum", "rebalance-clip")

SLACK = 0.1
"""Recovered shares closer than this are not told apart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How much is run.

    Args:
        net: The MLP and its attack.
        epochs: Of its deformation.
        vision: The ResNet; None leaves it out.
        attacks: Names of attacks.
    """

    net: Net
    epochs: int = 30
    vision: Vision | None = None
    attacks: tuple[str, ...] = (*TRAINING, *EDITS)


SIZES: dict[str, Plan] = {
    "cpu": Plan(net=Net()),
    "full": Plan(
        net=Net(),
        vision=Vision(lock=Settings(rows=20_000, epochs=5, retain_rows=25_000, lock_epochs=3), steps=40),
    ),
    "smoke": Plan(
        net=Net(hidden=16, depth=2, epochs=1, rows=512), epochs=8, attacks=("full-adamw", "rebalance"),
        vision=Vision(
            lock=Settings(
                data="digits", rows=640, epochs=1, retain_rows=320, lock_epochs=1, heldout_rows=160, test_rows=500,
                max_utility_loss=1.0, hidden_sizes=(8, 16), depths=(1, 1),
            ),
            steps=8, heldout=250,
        ),
    ),
}  # fmt: skip


def run(
    out: Path,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    size: Literal["cpu", "full", "smoke"] = "cpu",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Lock, attack and compare, and write composition.json, composition.md and composition.png.

    Every run is kept in the cache as soon as it has ended; what was interrupted goes on from there.

    Args:
        out: Folder; made if absent.
        seeds: Of the nets and their data.
        size: See `SIZES`.
        progress: Called with a line of text for every sweep.

    Returns:
        The record, as JSON values: command, versions, size, settings, seeds, seconds, claims, summary, table, data.
    """
    say = progress or (lambda _: None)
    plan = SIZES[size]
    net = plan.net
    steps = net.epochs * -(-net.rows // net.batch_size)
    made: dict[str, tuple[Budget, Callable[[int, Path], Case]]] = {
        "mlp": (Budget(steps=steps, evaluations=min(22, steps)), lambda seed, _: toy(net, plan.epochs, seed))
    }  # fmt: skip
    results: dict[str, dict[str, Rows]] = {}
    used: list[Path] = []
    with ExitStack() as stack:
        if vision := plan.vision:
            data, models = stack.enter_context(places(vision.lock))
            budget = Budget(steps=vision.steps, evaluations=min(10, vision.steps))
            made["resnet"] = (budget, lambda seed, place: resnet(vision, data, models, place, seed, say))  # fmt: skip
        for name, (budget, make) in made.items():
            results[name] = {"rows": [], "locks": []}
            for seed in seeds:
                journal = state_file("composition", name, plan, UPPER, budget, seed)
                used.append(journal)
                case = make(seed, journal.with_suffix(".deformed"))
                known = {"seed": seed, **facts(case)}
                for lock in LOCKS:
                    told = Audited(lock=lock, seed=seed, locked=case.locked[lock], original=case.original, task=case.task, attacks=plan.attacks)  # fmt: skip
                    found, start = audit_rows(told, budget, journal, lambda text, n=name: say(f"{n}, {text}"))  # type: ignore[misc]  # fmt: skip
                    results[name]["rows"] += found
                    known[f"start, {lock}"] = start
                results[name]["locks"].append(known)
    tables: dict[str, list[str]] = {}
    cells: dict[str, Rows] = {}
    for name, part in results.items():
        part["rows"] = unique_rows(part["rows"])
        cells[name] = part["cells"] = summarise(part["rows"])
        shown = [cell for cell in cells[name] if cell["lock"] != SCRATCH]
        tables[f"{name}: recovered share of the control's gain"] = text_table(shown, LOCKS, "recovered", {})  # fmt: skip
        tables[f"{name}: best accuracy on the new task"] = text_table(shown, (UNLOCKED, *LOCKS), "accuracy", {})  # fmt: skip
    claims = [entry for name, part in results.items() for entry in _claims(name, cells[name], part["locks"])]  # fmt: skip
    record = make_record(
        "composition", {"seeds": seeds, "size": size}, settings=asdict(plan) | {"absorbed": UPPER.to_dict()}, claims=claims,
        table=[line for title, lines in tables.items() for line in (title, *lines)],
        seconds=sum(row["seconds"] for part in results.values() for row in part["rows"]), data=results,
    )  # fmt: skip
    write_record(out, "composition", record, draw(cells, LOCKS))
    forget(used)
    for journal in used:
        place = journal.with_suffix(".deformed")
        shutil.rmtree(place, ignore_errors=True)
        key_of(place).unlink(missing_ok=True)
    return record


def _claims(net: str, cells: Rows, known: Rows) -> list[dict[str, Any]]:
    share = {
        (c["attack"], c["lock"]): c["recovered"]["mean"] for c in cells if c["recovered"] and c["lock"] in LOCKS
    }  # fmt: skip
    accuracy = {c["attack"]: c["accuracy"]["mean"] for c in cells if c["lock"] == UNLOCKED and c["accuracy"]}  # fmt: skip

    def of(attack: str) -> dict[str, float]:
        return {lock: share[attack, lock] for lock in LOCKS if (attack, lock) in share}

    growth = [entry["growth"] for entry in known]
    kept = [g[f"{BOTH}, balanced"]["median"] / g[f"{DEFORMATION}, balanced"]["median"] for g in growth]  # fmt: skip
    scaled = [entry["sites"] for entry in known]
    exact = [entry["bit_identical"] for entry in known]
    claims = [
        claim(f"{net}: put on top, the absorbed lock leaves every output bit for bit (every seed).", all(all(e.values()) for e in exact), bit_identical=exact),
        claim(f"{net}: under both locks every site is scaled (every seed).", all(s["scaled"] == s["all"] for s in scaled), sites=scaled),
        claim(f"{net}: balanced, both locks leave singular values as large as the deformation alone, to a tenth in the median, and that is at least twice the original's (every seed).", all(0.9 <= k <= 1.1 for k in kept) and min(g[DEFORMATION]["median"] for g in growth) >= 2, kept=kept, growth=growth),
        claim(f"{net}: every attack learns the new task on the unlocked net: accuracy at least 0.5.", min(accuracy.values()) >= 0.5, accuracy=accuracy),
    ]  # fmt: skip
    training = {a: found for a in TRAINING if len(found := of(a)) == len(LOCKS)}
    if training:
        worse = {a: f[BOTH] - min(f[DEFORMATION], f[ABSORBED]) for a, f in training.items()}
        claims.append(claim(f"{net}: no attack by training alone recovers more from both locks than from the stronger of the two, to {SLACK}.", max(worse.values()) <= SLACK, recovered=training, above=worse))  # fmt: skip
    learnt = {(c["attack"], c["lock"]): c["accuracy"]["mean"] for c in cells if c["accuracy"]}
    both = {a: [learnt[a, lock] for lock in LOCKS] for a in training}
    if both:
        # the loss of a deformed net on another task begins far above that of guessing, and accuracy may rise before it is back
        above = {a: last - min(first) for a, (*first, last) in both.items()}
        claims.append(claim(f"{net}: nor does it come to more accuracy, to {SLACK}.", max(above.values()) <= SLACK, accuracy=both, above=above))  # fmt: skip
    claims += _undone(net, of)
    return claims


def _undone(net: str, of: Callable[[str], Mapping[str, float]]) -> list[dict[str, Any]]:
    """State what the edits undo: a lock on top of a lock costs whoever knows both a second edit, and no more."""
    claims = []
    rebalanced, clipped = of("rebalance"), of("rebalance-clip")
    if len(rebalanced) == len(LOCKS):
        claims.append(claim(f"{net}: re-balancing undoes the absorbed lock: it recovers at least {1 - SLACK:g}.", rebalanced[ABSORBED] >= 1 - SLACK, recovered=rebalanced))  # fmt: skip
        gap = rebalanced[BOTH] - rebalanced[DEFORMATION]
        claims.append(claim(f"{net}: what re-balancing leaves of both locks is the deformation: it recovers from both what it does from that alone, to {SLACK}.", abs(gap) <= SLACK, gap=gap))  # fmt: skip
    if BOTH in clipped:
        claims.append(claim(f"{net}: re-balancing and then clipping undoes both: it recovers at least {1 - SLACK:g}.", clipped[BOTH] >= 1 - SLACK, recovered=clipped))  # fmt: skip
    return claims
