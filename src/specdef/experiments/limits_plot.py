"""The figure of the `limits` experiment: utility by scale, loss by learning rate, what undoes the lock, further modalities, curvature."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from specdef.experiments.limits_report import language_shares
from specdef.experiments.limits_setup import LIMITS, LM, MODALITIES
from specdef.experiments.limits_tables import Share
from specdef.experiments.lock_table import UNLOCKED
from specdef.experiments.paper.locks import ABSORBED, COMPENSATED, DEFORMATION
from specdef.experiments.paper.runs import PAPER, SWEEP

Rows = list[dict[str, Any]]


def draw(language: Mapping[str, Rows], shares: Mapping[tuple[str, ...], Share], curvature: Rows) -> Figure:  # fmt: skip
    """Draw six panels.

    Args:
        language: Of `language_part`.
        shares: Of `limits_modalities.shares`.
        curvature: Of `curvature_part`.

    Returns:
        The figure.
    """
    figure = Figure(figsize=(15, 8), layout="constrained")
    axes = figure.subplots(2, 3).flatten()
    _utility(axes[0], language["utility"])
    _rates(axes[1], language["runs"], "full-adamw")
    _rates(axes[2], language["runs"], "lora-all")
    _limit(axes[3], language["runs"], shares)
    _modalities(axes[4], shares)
    _curvature(axes[5], curvature)
    return figure


def _utility(axis: Axes, rows: Rows) -> None:
    for dtype in dict.fromkeys(r["dtype"] for r in rows):
        own = [r for r in rows if r["dtype"] == dtype and r["loss"] is not None]
        axis.plot([r["scale"] for r in own], [r["accuracy"] for r in own], "o-", label=dtype)
    axis.set(xscale="log", xlabel="scale", ylabel="next-token accuracy", title=f"{LM}: utility of the compensated lock")  # fmt: skip
    axis.legend(fontsize=8)


def _rates(axis: Axes, runs: Rows, attack: str) -> None:
    own = [r for r in runs if r["attack"] == attack]
    start = own[0]["start_loss"]
    for lock in dict.fromkeys(r["lock"] for r in own):
        rows = sorted((r for r in own if r["lock"] == lock), key=lambda r: r["learning_rate"])
        axis.plot([r["learning_rate"] for r in rows], [start if r["loss"] is None else r["loss"] for r in rows], "o-", label=lock)  # fmt: skip
    axis.axhline(start, color="k", ls=":", lw=1)
    axis.set(xscale="log", xlabel="learning rate", ylabel="lowest held-out loss", title=f"{LM}: {attack}")  # fmt: skip
    axis.legend(fontsize=8)


def _limit(axis: Axes, runs: Rows, shares: Mapping[tuple[str, ...], Share]) -> None:
    language = language_shares(runs)
    models = (LM, *MODALITIES)
    for i, attack in enumerate(("full-adamw", *LIMITS)):
        heights = [
            language.get((COMPENSATED, attack, SWEEP)) if m == LM else shares.get((m, attack, "adamw", SWEEP, COMPENSATED))
            for m in models
        ]  # fmt: skip
        axis.bar([j + 0.16 * i for j in range(len(models))], [h or 0.0 for h in heights], 0.15, label=attack)  # fmt: skip
    axis.set_xticks([j + 0.3 for j in range(len(models))], models, fontsize=8)
    axis.set(ylabel="share of the unlocked gain", title="compensated lock: what undoes it", ylim=(0, 1.3))  # fmt: skip
    axis.axhline(1, color="k", ls=":", lw=1)
    axis.legend(fontsize=7, ncols=2)


def _modalities(axis: Axes, shares: Mapping[tuple[str, ...], Share]) -> None:
    locks = (UNLOCKED, COMPENSATED, DEFORMATION, ABSORBED)
    for i, lock in enumerate(locks):
        for at, colour in ((SWEEP, f"C{i}"), (PAPER, "k")):
            heights = [shares.get((m, "full-adamw", "adamw", at, lock)) or 0.0 for m in MODALITIES]
            places = [j + 0.2 * i for j in range(len(MODALITIES))]
            if at == SWEEP:
                axis.bar(places, heights, 0.18, color=colour, label=lock)
            else:
                axis.plot(places, [max(0.0, h) for h in heights], "_", color=colour, ms=12, label="usual rate" if i == 0 else "")  # fmt: skip
    axis.set_xticks([j + 0.3 for j in range(len(MODALITIES))], MODALITIES, fontsize=8)
    axis.set(ylabel="share of the unlocked gain", title="AdamW, best of a sweep", ylim=(0, 1.3))
    axis.legend(fontsize=7)


def _curvature(axis: Axes, rows: Rows) -> None:
    own = [r for r in rows if r["seed"] == rows[0]["seed"]]
    names = {"trainable": "C trains", "frozen": "C frozen", "original": "unlocked", "bound": "bound through a later weight"}  # fmt: skip
    for name, label in names.items():
        axis.plot([r["scale"] for r in own], [r[name] for r in own], "o-", label=label)
    axis.set(xscale="log", yscale="log", xlabel="scale", ylabel="lambda_max", title="small MLP: curvature")  # fmt: skip
    axis.legend(fontsize=8)
