"""The papers' numbers beside ours, and whether the claim behind them held."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from specdef.experiments.record import claim

HELD = "held"
FAILED = "did not hold"
ONLY_THERE = "only at the paper's learning rate"

RESISTED = 0.1
"""A lock prevents training that recovers less than this share of what the unlocked model gains: the audit's own convention."""


def comparison(
    quantity: str, *, paper: str, ours: str, verdict: str, note: str = "", **numbers: Any
) -> dict[str, Any]:
    """Set a number of a paper beside ours.

    Args:
        quantity: What was measured, on what model and data.
        paper: What the paper says.
        ours: What was measured here.
        verdict: `HELD`, `FAILED` or `ONLY_THERE`.
        note: What the reader should know: other data, other weights.
        numbers: What decides it.

    Returns:
        One entry of a record's `comparisons`.

    Raises:
        ValueError: There is no such verdict.
    """
    if verdict not in (HELD, FAILED, ONLY_THERE):
        raise ValueError(
            f"verdict must be {HELD!r}, {FAILED!r} or {ONLY_THERE!r}, got {verdict!r}."
        )
    return {"quantity": quantity, "paper": paper, "ours": ours, "verdict": verdict, "note": note, "numbers": numbers}  # fmt: skip


def held_if(condition: bool) -> str:
    """Return the verdict on a claim that no learning rate decides."""
    return HELD if condition else FAILED


def resistance(at_the_papers_rate: float | None, best_of_the_sweep: float | None) -> str:
    """Return the verdict on the claim that a lock prevents training.

    Args:
        at_the_papers_rate: Share of the unlocked gain that the paper's attack recovers at its one rate.
        best_of_the_sweep: The same for the best of all rates; None or nan holds nothing.

    Returns:
        The verdict.

    >>> resistance(0.02, 0.8)
    "only at the paper's learning rate"
    """
    there, anywhere = (
        math.inf if x is None or math.isnan(x) else x for x in (at_the_papers_rate, best_of_the_sweep)
    )  # fmt: skip
    if there >= RESISTED:
        return FAILED
    return HELD if anywhere < RESISTED else ONLY_THERE


def claims_of(comparisons: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return comparisons as claims of a record: one that holds only at the paper's learning rate does not hold.

    Args:
        comparisons: As `comparison` makes them.

    Returns:
        As `record.claim` makes them.
    """
    return [
        claim(
            f"{c['quantity']}: the paper has {c['paper']}, here {c['ours']}"
            + ("" if c["verdict"] != ONLY_THERE else f" ({ONLY_THERE})"),
            c["verdict"] == HELD,
            **c["numbers"],
        )
        for c in comparisons
    ]
