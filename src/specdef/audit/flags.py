"""Flags: when a cell cannot be trusted as it stands, or must be read with care, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, get_args

from specdef.audit.grid import Outcome, Tried, best_index, index_of, outcomes
from specdef.audit.study import SweepResult, facts

if TYPE_CHECKING:
    from specdef.attacks.run import Run
    from specdef.audit.cell import Cell, Reference

SAME = 0.05
"""Losses nearer than this share of the control's gain are the same."""

ROUNDED = 0.5
"""Above this share of steps lost to rounding, rounding may be what holds."""

Flag = Literal[
    "control-not-broken", "best-at-edge", "diverged-everywhere", "rounding-does-the-work",
    "utility-already-lost", "scratch-reached",
]  # fmt: skip

ADVICE: dict[Flag, str] = {
    "control-not-broken": "The attack does not learn on the unlocked model either: give it more steps, more data or another task.",
    "best-at-edge": "The best learning rate is the last one tried: a better one may lie beyond, so run a larger suite, which tries more.",
    "diverged-everywhere": "No learning rate tried was stable on the locked model: run a larger suite, which tries lower ones, or run in float64 (--dtype float64).",
    "rounding-does-the-work": "Most steps were smaller than the rounding of the weights: run again in float64 (--dtype float64) before counting on this.",
    "utility-already-lost": "The locked model does not do its own work any more: what cannot be trained is worth nothing if it cannot be used.",
    "scratch-reached": "Fresh weights learn the task as well as this attack does: no lock can hold longer on it, so a task that needs the model tells more.",
}
"""One sentence each: what it means, and what to do."""

FLAGS: tuple[Flag, ...] = get_args(Flag)


def flags_of(
    cell: Cell, locked: Sequence[SweepResult], gain: float, reference: Reference, *, broken: bool
) -> list[Flag]:
    """Say what must be known about the sweeps of a locked model.

    Args:
        cell: What was measured.
        locked: One sweep per seed.
        gain: The control's.
        reference: What the cell is measured against.
        broken: The attack got in all the same.

    Returns:
        The flags.
    """
    flags: list[Flag] = []
    first = locked[0]
    kinds = [_kinds(sweep, reference) for sweep in locked]
    if not first.sweep.rates:  # it was searched
        if any(all(kind == "diverged" for kind in own) for own in kinds):
            flags.append("diverged-everywhere")
        elif _at_edge(first, kinds[0], reference):
            flags.append("best-at-edge")
    stable = [r for r, kind in zip(first.runs, kinds[0], strict=True) if kind != "diverged"]
    if (
        stable and not broken and stable[-1].swamped > ROUNDED
    ):  # large steps are the last to be lost
        flags.append("rounding-does-the-work")
    if (
        reference.scratch is not None
        and cell.locked is not None
        and reference.scratch < reference.start
        and cell.locked >= reference.scratch - SAME * gain
    ):
        flags.append("scratch-reached")
    return flags


def _kinds(sweep: SweepResult, reference: Reference) -> list[Outcome]:
    return outcomes([_tried(run, sweep, reference) for run in sweep.runs], sweep.sweep)


def _at_edge(sweep: SweepResult, kinds: Sequence[Outcome], reference: Reference) -> bool:
    """Tell whether a better rate may lie beyond the last one tried."""
    tried = {index_of(r.setting.learning_rate): _tried(r, sweep, reference) for r in sweep.runs}
    kind_at = dict(zip(tried, kinds, strict=True))
    best = best_index(tried, kind_at)
    return best == max(tried) or (best == min(tried) and kind_at[best] != "nothing")


def _tried(run: Run, sweep: SweepResult, reference: Reference) -> Tried:
    return Tried(
        rate=run.setting.learning_rate,
        **facts(run, sweep.idle, start=reference.start, steps=reference.steps),
    )
