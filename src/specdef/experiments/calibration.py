"""Predicted against measured: stable learning rates and steps to a target, over models, locks and optimisers.

Measured by training with full batches from the same start. Stable, for gradient descent over 50 steps and heavy ball over 20
(momentum gets as far in fewer): the loss never rises more than 2 % of its start above the lowest so far. For AdamW over 50
steps: it never rises above its start. The first is what the theory speaks of. The other criterion is measured too and kept in
the record: gradient descent on networks with normalisation stays below its start at rates many times larger, which no
local theory knows.
Steps: until the loss has fallen by a tenth, at a quarter and at a 32nd of the predicted stable rate.
Misses stay in the table.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from matplotlib.figure import Figure

from specdef.curvature.base import CurvatureOperator
from specdef.experiments.calibration_cases import Case, cases
from specdef.experiments.record import Progress, claim, versions, write_record
from specdef.rates.krylov import Shared
from specdef.rates.measure import Criterion, largest_stable_rate, train
from specdef.rates.predict import predict_convergence
from specdef.rates.prediction import Prediction

OPTIMIZERS: dict[str, tuple[Criterion, int]] = {
    "gd": ("smooth", 50),
    "heavy_ball": ("smooth", 20),
    "adamw": ("bounded", 50),
}
"""Optimiser to the criterion its stable rate is measured by, and over how many steps."""

SHARE = 0.1
"""Target as a share of the loss."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How much is measured.

    Args:
        families: Which models.
        locks: Most locks of each.
        optimizers: Which of `OPTIMIZERS`.
        steps: Most steps of a stability run.
        ratio: Ratio of the rates between which a measured stable rate lies.
        parts: Steps are counted at the predicted stable rate divided by these.
        max_steps: Most steps to the target.
        lanczos_steps: Lanczos steps of a prediction.
    """

    families: tuple[str, ...]
    locks: int = 5
    optimizers: tuple[str, ...] = tuple(OPTIMIZERS)
    steps: int = 50
    ratio: float = 1.15
    parts: tuple[int, ...] = (4, 32)
    max_steps: int = 300
    lanczos_steps: int = 30


SIZES: dict[str, Settings] = {
    "cpu": Settings(families=("mlp", "cnn", "resnet", "gpt2", "llama")),
    "smoke": Settings(families=("mlp", "gpt2"), locks=1),
    "full": Settings(
        families=("smollm2",), locks=1, optimizers=("gd", "adamw"), steps=20, ratio=1.4, parts=(4, 32), max_steps=60, lanczos_steps=20
    ),
}  # fmt: skip
"""smoke: two families, one lock each. full: the last two blocks of SmolLM2-135M, some ten minutes."""


def run(
    out: Path,
    *,
    size: Literal["cpu", "smoke", "full"] = "cpu",
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Predict and measure, and write calibration.json, calibration.md and calibration.png.

    Args:
        out: Folder.
        size: See `SIZES`.
        seed: Of models and data.
        progress: Called with one line per row of the table.

    Returns:
        The record: versions, seconds, claims, rows.
    """
    began = time.perf_counter()
    rows: list[dict[str, Any]] = []
    settings = SIZES[size]
    for case in cases(settings.families, locks=settings.locks, seed=seed):
        for optimizer in settings.optimizers:
            rows.append(measure_case(case, optimizer, settings))
            if progress:
                progress(_line(rows[-1]))
    record = {
        "experiment": "calibration",
        "size": size,
        "seed": seed,
        "versions": versions(),
        "seconds": time.perf_counter() - began,
        "claims": _claims(rows),
        "rows": rows,
    }
    write_record(out, "calibration", record, draw(rows))
    return record


def measure_case(case: Case, optimizer: str, settings: Settings = SIZES["smoke"]) -> dict[str, Any]:
    """Predict and measure one model with one optimiser.

    Args:
        case: The model.
        optimizer: A name in `OPTIMIZERS`.
        settings: How much is measured.

    Returns:
        One row of the table.
    """
    operator = case.operator
    loss = operator.loss()
    shared = Shared()
    found = predict_convergence(operator, None, optimizer, target=SHARE * loss, num_steps=settings.lanczos_steps, shared=shared)  # fmt: skip
    criterion, steps = OPTIMIZERS[optimizer]
    other: Criterion = "bounded" if criterion == "smooth" else "smooth"
    stable = found.stable_learning_rate
    measured = {
        kind: largest_stable_rate(
            operator,
            optimizer,
            1.3 * stable,  # so that no rate tried is the predicted one
            criterion=kind,
            num_steps=min(steps, settings.steps),
            ratio=settings.ratio,
        ).rate
        for kind in ((criterion, other) if case.family != "smollm2" else (criterion,))
    }
    return {
        "family": case.family,
        "lock": case.lock,
        "optimizer": optimizer,
        "loss": loss,
        "parameters": operator.shape[0],
        "prediction": found.to_dict(),
        "stable": {
            "predicted": stable,
            "measured": measured[criterion],
            "ratio": stable / measured[criterion] if measured[criterion] else math.inf,
            "criterion": criterion,
            f"measured_{other}": measured.get(other, math.nan),
            "trustworthy": found.trustworthy,
        },
        "steps": [
            _steps(operator, optimizer, found, stable / part, settings, shared)
            for part in settings.parts
        ],
    }


def _steps(
    operator: CurvatureOperator,
    optimizer: str,
    found: Prediction,
    rate: float,
    settings: Settings,
    shared: Shared,
) -> dict[str, Any]:
    known = None if math.isnan(found.lambda_max) else found.lambda_max
    at = predict_convergence(operator, None, optimizer, target=found.target, learning_rates=[rate], lambda_max=known, num_steps=settings.lanczos_steps, shared=shared)  # fmt: skip
    run = train(operator, optimizer, rate, settings.max_steps, target=found.target)
    measured = run.steps_to(found.target)
    return {
        "learning_rate": rate,
        "predicted": at.steps_to_target,
        "low": at.steps_low,
        "high": at.steps_high,
        "measured": measured,
        "ratio": at.steps_to_target / measured if math.isfinite(measured) else math.nan,
        "error_estimate": at.error_estimate,
        "trustworthy": at.trustworthy,
        "reason": at.reason,
    }


def draw(rows: Sequence[dict[str, Any]]) -> Figure:
    """Draw predicted against measured, with bands of a factor of 2 (rates) and 3 (steps); open marks are not trusted.

    Args:
        rows: Rows of the table.

    Returns:
        The figure.
    """
    figure = Figure(figsize=(11, 5), layout="constrained")
    panels = figure.subplots(1, 2)
    colours = dict(zip(OPTIMIZERS, ("tab:blue", "tab:orange", "tab:green"), strict=True))
    points: dict[int, list[float]] = {0: [], 1: []}
    for row in rows:
        for panel, entries in enumerate(([row["stable"]], row["steps"])):
            for entry in entries:
                x, y = entry["measured"], entry["predicted"]
                if not (math.isfinite(x) and math.isfinite(y) and x > 0 and y > 0):
                    continue
                colour = colours[row["optimizer"]]
                face = colour if entry["trustworthy"] else "none"
                mark = "o" if row["lock"] == "none" else "^"
                panels[panel].plot(x, y, mark, color=colour, markerfacecolor=face, markersize=5)
                points[panel] += [x, y]
    for panel, (title, factor) in enumerate(
        (("largest stable learning rate", 2), ("steps to a tenth less loss", 3))
    ):
        axes = panels[panel]
        ends = torch.tensor([min(points[panel], default=1.0), max(points[panel], default=1.0)])
        low, high = (float(end) for end in ends)
        axes.plot([low, high], [low, high], "k-", linewidth=0.8)
        axes.fill_between(
            [low, high], [low / factor, high / factor], [low * factor, high * factor], color="0.9"
        )
        axes.set(xscale="log", yscale="log", xlabel=f"measured {title}", ylabel="predicted")
    for name, colour in colours.items():
        panels[0].plot([], [], "s", color=colour, label=name)
    panels[0].plot([], [], "ko", label="unlocked")
    panels[0].plot([], [], "k^", label="locked")
    panels[0].plot([], [], "ko", markerfacecolor="none", label="not trusted by itself")
    panels[0].legend(fontsize=8)
    return figure


def within(values: Sequence[float], factor: float) -> int:
    """Count ratios within a factor of one.

    Args:
        values: Ratios; those that are not finite do not count.
        factor: Above 1.

    Returns:
        How many.

    >>> within([0.4, 0.5, 1.9, float("inf")], 2)
    2
    """
    return sum(1 / factor <= value <= factor for value in values)


def _claims(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    claims = []
    for optimizer in dict.fromkeys(row["optimizer"] for row in rows):
        mine = [row for row in rows if row["optimizer"] == optimizer]
        for which, ratios in (
            ("all", [row["stable"]["ratio"] for row in mine]),
            ("trusted", [row["stable"]["ratio"] for row in mine if row["stable"]["trustworthy"]]),
        ):
            inside = within(ratios, 2)
            claims.append(
                claim(
                    f"{optimizer}: the stable rate is predicted within a factor of 2 ({which} cases)",
                    inside == len(ratios),
                    inside=inside,
                    cases=len(ratios),
                )
            )
        steps = [entry for row in mine for entry in row["steps"] if not math.isnan(entry["ratio"])]
        for which, chosen in (("all", steps), ("trusted", [e for e in steps if e["trustworthy"]])):
            inside = within([entry["ratio"] for entry in chosen], 3)
            covered = sum(entry["low"] <= entry["measured"] <= entry["high"] for entry in chosen)
            claims.append(
                claim(
                    f"{optimizer}: the steps to the target are predicted within a factor of 3 ({which} cases)",
                    inside == len(chosen),
                    inside=inside,
                    cases=len(chosen),
                    inside_its_own_range=covered,
                )
            )
    return claims


def _line(row: dict[str, Any]) -> str:
    stable = row["stable"]
    steps = "; ".join(
        f"{e['predicted']:.0f} ({e['low']:.0f}..{e['high']:.0f}) for {e['measured']:.0f}{'' if e['trustworthy'] else ' ?'}"
        for e in row["steps"]
    )
    return (
        f"{row['family']:7s} {row['lock']:17s} {row['optimizer']:10s} stable {stable['predicted']:.2e} for {stable['measured']:.2e}"
        f" = {stable['ratio']:.2f}{'' if stable['trustworthy'] else ' ?'}; steps {steps}"
    )
