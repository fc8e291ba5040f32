"""What guards against drift into the sensitive subspace keep of an aligned behaviour, and what they cost the task.

An MLP, and the last blocks of SmolLM2-135M-Instruct, are fine-tuned on harmless data with SGD and AdamW: unguarded; with EWC at
several strengths; with the gradient projected; with the update projected, off the subspace M of the start, off M and H M, and off
the M of the present weights. Guards are made from some examples of the behaviour; the alignment loss, KL to the original
model, is measured on others, and compared at equal task loss on held-out data as well as after equal steps.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from specdef.attacks.fit import batch_loss
from specdef.curvature.losses import Batch
from specdef.curvature.operators import GGNOperator, HessianOperator
from specdef.experiments.fragility_guard_plot import draw, tables
from specdef.experiments.fragility_guard_setup import (
    Case,
    Digits,
    Language,
    digits_case,
    language_case,
)
from specdef.experiments.record import Progress, claim, make_record, write_record
from specdef.fragility.alignment import AlignmentLoss
from specdef.fragility.ewc import EWCPenalty
from specdef.fragility.guard import DriftGuard
from specdef.fragility.subspace import FisherSubspace, fisher_subspace
from specdef.fragility.turning import coupled_directions

SEEDS = {"cpu": 2, "smoke": 1}
"""Seeds unless told otherwise."""

NONE, EWC = "none", "EWC"
GRADIENT, UPDATE, COUPLED, TURNED = "gradient off M", "update off M", "update off M and H M", "update off M(now)"  # fmt: skip
GUARDS = (NONE, GRADIENT, UPDATE, COUPLED, TURNED)

LEVELS = (0.25, 0.5, 0.75)
"""Shares of the unguarded run's gain at which guards are compared."""

Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How a case is run.

    Args:
        case: What is run.
        rates: Learning rate by optimiser.
        steps: Of a run.
        interval: Steps between two measurements.
        rank: Of M, at most.
        every: Steps between two turns of M.
        strengths: Of EWC.
    """

    case: Digits | Language
    rates: Mapping[str, float]
    steps: int
    interval: int
    rank: int
    every: int = 10
    strengths: tuple[float, ...] = (10.0, 100.0, 1000.0)


DIGITS, SMOLLM2, TINY = "mlp", "smollm2", "tiny llama"
SIZES: dict[str, dict[str, Plan]] = {
    "cpu": {
        DIGITS: Plan(case=Digits(), rates={"sgd": 0.02, "adamw": 5e-4}, steps=300, interval=10, rank=32),
        SMOLLM2: Plan(case=Language(), rates={"sgd": 0.02, "adamw": 1e-4}, steps=40, interval=5, rank=8, every=5),
    },
    "smoke": {
        DIGITS: Plan(case=Digits(hidden=16, pretraining=100, rows=600), rates={"sgd": 0.02, "adamw": 1e-3}, steps=60, interval=6, rank=12, strengths=(10.0,)),
        TINY: Plan(case=Language(tiny=True, train=4, heldout=1, aligned=1, kept=1, batch_size=4, length=24, blocks=1), rates={"sgd": 0.02, "adamw": 1e-3}, steps=8, interval=2, rank=4, strengths=(10.0,)),
    },
}  # fmt: skip


def run(
    out: Path,
    *,
    seeds: Sequence[int] = (0, 1),
    size: Literal["cpu", "smoke"] = "cpu",
    device: str = "cpu",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Fine-tune with every guard, and write fragility-guard.json, fragility-guard.md and fragility-guard.png.

    Args:
        out: Folder; made if absent.
        seeds: Of the nets and their data. A language model takes the first.
        size: See `SIZES`.
        device: Where is trained.
        progress: Called with a line of text for every run.

    Returns:
        The record, as JSON values: command, versions, size, settings, seeds, seconds, claims, summary, table, data.
    """
    say = progress or (lambda _: None)
    began = time.perf_counter()
    results: dict[str, list[Row]] = {}
    for name, plan in SIZES[size].items():
        results[name] = []
        for seed in seeds if isinstance(plan.case, Digits) else seeds[:1]:
            case = digits_case(plan.case, seed) if isinstance(plan.case, Digits) else language_case(plan.case, seed)  # fmt: skip
            results[name] += compare(case, plan, seed, device, lambda text, n=name: say(f"{n}, {text}"))  # type: ignore[misc]  # fmt: skip
    claims = [entry for name, rows in results.items() for entry in _claims(name, rows)]
    record = make_record(
        "fragility_guard", {"seeds": seeds, "size": size, "device": device}, claims=claims,
        settings={name: asdict(plan) for name, plan in SIZES[size].items()},
        table=[line for name, rows in results.items() for line in tables(name, rows, LEVELS)],
        seconds=time.perf_counter() - began, data=results,
    )  # fmt: skip
    write_record(out, "fragility-guard", record, draw(results))
    return record


def compare(case: Case, plan: Plan, seed: int, device: str, say: Progress) -> list[Row]:
    """Fine-tune a case with every guard and optimiser.

    Args:
        case: What is run; unchanged.
        plan: How.
        seed: Of the subspace.
        device: Where is trained.
        say: Called with a line of text for every run.

    Returns:
        A row per run: optimizer, guard, strength (EWC), seed, curve of [step, task loss, alignment loss], at: alignment loss by
        level of the task loss (None where it is not reached), drift, and seconds.
    """
    model = case.model.to(device)
    subspace = fisher_subspace(model, case.aligned, case.loss, max_rank=plan.rank, energy=1.0, seed=seed)  # fmt: skip
    H = HessianOperator(model, case.task[:4], case.loss)
    coupled = coupled_directions(subspace, H)
    rows: list[Row] = []
    for optimizer, rate in plan.rates.items():
        levels: dict[float, float] = {}
        for guard, strength in [*((g, None) for g in GUARDS), *((EWC, s) for s in plan.strengths)]:
            begun = time.perf_counter()
            curve, drift = fine_tune(case, plan, subspace, coupled, guard, strength, optimizer, rate)  # fmt: skip
            if guard == NONE:
                start, best = curve[0][1], min(point[1] for point in curve)
                levels = {level: start - level * (start - best) for level in LEVELS}
            rows.append(
                {
                    "optimizer": optimizer, "guard": guard, "strength": strength, "seed": seed, "curve": curve, "drift": drift,
                    "at": {f"{level:g}": alignment_at(curve, loss) for level, loss in levels.items()},
                    "rank": subspace.rank, "energy": subspace.energy, "seconds": time.perf_counter() - begun,
                }
            )  # fmt: skip
            name = guard if strength is None else f"{guard} {strength:g}"
            say(f"seed {seed}, {optimizer}, {name}: task {curve[-1][1]:.3f}, alignment {curve[-1][2]:.4f}")  # fmt: skip
    return rows


def fine_tune(
    case: Case,
    plan: Plan,
    subspace: FisherSubspace,
    coupled: Tensor,
    guard: str,
    strength: float | None,
    optimizer: str,
    rate: float,
) -> tuple[list[list[float]], float]:
    """Fine-tune a copy of the model under one guard.

    Args:
        case: Model and data.
        plan: Steps.
        subspace: M.
        coupled: H M.
        guard: One of `GUARDS`, or EWC.
        strength: Of EWC.
        optimizer: sgd or adamw.
        rate: Its learning rate.

    Returns:
        [step, held-out task loss, held-out alignment loss] until the loss is no number; and the share of the way that lies in M.
    """
    model = copy.deepcopy(case.model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    build = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[optimizer]
    stepper = build(parameters, lr=rate, weight_decay=0.0)
    mode: Any = {GRADIENT: "first-order", UPDATE: "second-order", COUPLED: "second-order", TURNED: "second-order"}.get(guard, "monitor")  # fmt: skip
    aligned = GGNOperator(model, case.aligned, case.loss) if guard == TURNED else None
    watch = DriftGuard(
        model, subspace, mode=mode, aligned=aligned, every=plan.every, threshold=math.inf,
        extra=coupled if guard == COUPLED else None,
    )  # fmt: skip
    kept = AlignmentLoss(GGNOperator(model, case.kept, case.loss))
    curve: list[list[float]] = []
    with ExitStack() as stack:
        stack.enter_context(watch.attach(stepper))
        if guard == EWC:
            assert strength is not None
            ewc = EWCPenalty(model, case.aligned, case.loss, strength)
            stack.enter_context(ewc.attach(stepper))
        for step in range(plan.steps + 1):
            if step % plan.interval == 0:
                with torch.no_grad():
                    terms = [mean_loss(model, case, batch) for batch in case.heldout]
                curve.append([step, sum(map(float, terms)) / len(terms), kept.present()])
                if not all(map(math.isfinite, curve[-1])):
                    break
            stepper.zero_grad()
            torch.autograd.backward(mean_loss(model, case, case.task[step % len(case.task)]))
            stepper.step()
    return curve, watch.history[-1].drift if watch.history else 0.0


def mean_loss(model: nn.Module, case: Case, batch: Batch) -> Tensor:
    """Return the loss of a batch, mean over its terms."""
    return batch_loss(model, batch, case.loss)


def alignment_at(curve: Sequence[Sequence[float]], loss: float) -> float | None:
    """Return the alignment loss where a curve first comes down to a task loss, its logarithm interpolated.

    Args:
        curve: [step, task loss, alignment loss].
        loss: The task loss.

    Returns:
        The alignment loss; None where the curve stays above.

    >>> alignment_at([[0, 3.0, 0.0], [1, 2.0, 1e-4], [2, 1.0, 1e-2]], 1.5)
    0.001
    """
    for (_, high, a), (_, low, b) in pairwise(curve):
        if low <= loss < high:
            share = (high - loss) / (high - low)
            if a <= 0 or b <= 0:  # the start, where it is 0
                return b * share**2
            return round(math.exp((1 - share) * math.log(a) + share * math.log(b)), 12)
    return None


def _claims(name: str, rows: Sequence[Row]) -> list[dict[str, Any]]:
    optimizers = list(dict.fromkeys(row["optimizer"] for row in rows))
    seeds = list(dict.fromkeys(row["seed"] for row in rows))

    def of(guard: str, value: Callable[[Row], Any]) -> dict[tuple[str, int], list[Any]]:
        return {(o, s): [value(r) for r in rows if (r["guard"], r["optimizer"], r["seed"]) == (guard, o, s)] for o in optimizers for s in seeds}  # fmt: skip

    def ratios(
        guard: str, other: str, optimizer: str, levels: Sequence[float] = LEVELS
    ) -> list[float]:
        """Return the alignment loss under one guard over the least under another, by seed and level."""
        found = []
        for level in levels:
            above, below = (of(g, lambda r, key=f"{level:g}": r["at"][key]) for g in (guard, other))  # type: ignore[misc]
            for seed in seeds:
                mine, theirs = above[optimizer, seed][0], [a for a in below[optimizer, seed] if a]
                if theirs:  # who never gets there is no rival
                    found.append(mine / min(theirs) if mine is not None else math.inf)
        return found

    def every(
        guard: str, other: str, most: float, levels: Sequence[float] = LEVELS
    ) -> tuple[bool, dict[str, list[float]]]:
        found = {o: ratios(guard, other, o, levels) for o in optimizers}
        return all(r <= most for values in found.values() for r in values), found

    end = of(NONE, lambda r: r["curve"][-1][2])
    drift = {g: {o: max(of(g, lambda r: r["drift"])[o, s][0] for s in seeds) for o in optimizers} for g in (GRADIENT, UPDATE)}  # fmt: skip
    fifth, numbers = every(TURNED, NONE, 0.2)
    half, turned = every(TURNED, UPDATE, 0.5, (0.75,))
    ewc, rival = every(TURNED, EWC, 1.0)
    fixed = ratios(UPDATE, GRADIENT, "adamw", (0.5,))
    more, extra = every(UPDATE, COUPLED, 1.0)
    price = {o: [(of(TURNED, lambda r: r["curve"][-1][1])[o, s][0] - base[-1][1]) / (base[0][1] - base[-1][1]) for s in seeds for base in [of(NONE, lambda r: r["curve"])[o, s][0]]] for o in optimizers}  # fmt: skip
    return [
        claim(f"{name}: unguarded fine-tuning costs the behaviour more than 0.05 nats (every optimiser and seed).", all(v[0] > 0.05 for v in end.values()), alignment={f"{o}, {s}": v[0] for (o, s), v in end.items()}),
        claim(f"{name}: with the gradient projected nothing drifts into M under SGD (under 1e-3 of the way), but something does under AdamW; with the update projected under neither.", drift[GRADIENT]["sgd"] < 1e-3 < drift[GRADIENT]["adamw"] and max(drift[UPDATE].values()) < 1e-3, drift=drift),
        claim(f"{name}: under AdamW projecting the update leaves at most half the alignment loss that projecting the gradient does, half-way to the unguarded task loss.", bool(fixed) and all(r <= 0.5 for r in fixed), ratios=fixed),
        claim(f"{name}: keeping out of H M too leaves more alignment loss at every equal task loss than keeping out of M alone.", more, ratios=extra),
        claim(f"{name}: turning M along leaves at most half of what the fixed M leaves, at three quarters of the task's gain.", half, ratios=turned),
        claim(f"{name}: turning M along leaves at most a fifth of the unguarded alignment loss at equal task loss.", fifth, ratios=numbers),
        claim(f"{name}: it leaves less than EWC at its best strength, at every task loss that EWC reaches.", ewc, ratios=rival),
        claim(f"{name}: after equal steps it gives up at most a quarter of the task's gain.", all(p <= 0.25 for values in price.values() for p in values), given_up=price),
    ]  # fmt: skip
