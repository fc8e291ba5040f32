"""The tables of the `limits` experiment."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from specdef.experiments.limits_setup import LM, MODALITIES
from specdef.experiments.paper.runs import PAPER

Rows = list[dict[str, Any]]
Share = float | None


def tables(language: Mapping[str, Rows], shares: Mapping[tuple[str, ...], Share]) -> list[str]:
    """Write every run of the language model, utility by scale and shares of the small nets in Markdown.

    Args:
        language: Of `language_part`.
        shares: Of `limits_modalities.shares`.

    Returns:
        Lines.
    """
    lines = ["", f"{LM}, relearning a text: held-out loss and accuracy, lowest loss and last accuracy", "", "| model | attack | learning rate | start | lowest loss (at step) | last loss | accuracy | status |", "|---" * 8 + "|"]  # fmt: skip
    for r in language["runs"]:
        lines.append(
            f"| {r['lock']} | {r['attack']} | {r['learning_rate']:g} | {r['start_loss']:.3f} | {loss_text(known(r['loss']))} ({r['steps']}) | {loss_text(known(r['final_loss']))} | {r['accuracy']:.3f} | {r['status']} |"
        )
    lines += ["", f"{LM}, utility of the compensated lock by scale", "", "| precision | scale | loss | next-token accuracy |", "|---" * 4 + "|"]  # fmt: skip
    lines += [f"| {r['dtype']} | {r['scale']:g} | {loss_text(known(r['loss']))} | {r['accuracy']:.4f} |" for r in language["utility"]]  # fmt: skip
    columns = list(dict.fromkeys(k[4] for k in shares))
    for modality in MODALITIES:
        lines += ["", f"{modality}: share of the unlocked gain", "", f"| attack | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]  # fmt: skip
        for key in dict.fromkeys(k[:4] for k in shares if k[0] == modality):
            entries = [percent(shares.get((*key, c)), "–") for c in columns]
            lines.append(f"| {key[1]}, {'usual rate' if key[3] == PAPER else key[3]} | {' | '.join(entries)} |")  # fmt: skip
    return lines


def known(value: float | None) -> float:
    """Return a loss as JSON holds it: None is one that was not finite."""
    return math.inf if value is None else value


def loss_text(value: float) -> str:
    """Return a loss in few characters.

    >>> loss_text(math.inf)
    'diverged'
    """
    return f"{value:.3f}" if abs(value) < 1e4 else ("diverged" if math.isinf(value) else f"{value:.1e}")  # fmt: skip


def percent(share: Share, missing: str = "not measured") -> str:
    """Return a share in per cent; `missing` where there is none.

    >>> percent(0.25)
    '25.0 %'
    """
    return missing if share is None else f"{round(100 * share, 1) + 0.0:.1f} %"  # no -0.0 %
