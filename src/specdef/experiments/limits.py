"""Limits of convergence-rate control (arXiv 2602.18868): the compensated lock on a language model and small nets of further modalities.

What it prevents at the paper's learning rates and at every other one, what it costs, and what undoes it. SmolLM2-135M-Instruct
relearns a novel in place of WMDP; a denoiser, a style transfer and a ViT stand for the further modalities.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from specdef.experiments.kept import Clock, Kept
from specdef.experiments.limits_language import language_part
from specdef.experiments.limits_modalities import (
    cells_of,
    curvature_part,
    picture_part,
    shares,
)
from specdef.experiments.limits_nets import require_pictures
from specdef.experiments.limits_plot import draw
from specdef.experiments.limits_report import comparisons
from specdef.experiments.limits_setup import MODALITIES, SIZES, VIT
from specdef.experiments.limits_tables import tables
from specdef.experiments.paper.conclude import conclude
from specdef.experiments.paper.tables import lock_table
from specdef.experiments.record import Progress
from specdef.models.smollm2 import smollm2

SEEDS = {"cpu": 1, "full": 3, "smoke": 1}
"""Seeds unless told otherwise."""


def run(
    out: Path,
    *,
    seeds: Sequence[int] = (0,),
    size: Literal["cpu", "full", "smoke"] = "cpu",
    device: str = "cpu",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Lock, attack, undo and compare, and write limits.json and limits.png.

    Every run is kept in the cache as soon as it has ended; what was interrupted goes on from there.

    Args:
        out: Folder; made if absent.
        seeds: Of nets, pictures and texts drawn.
        size: See `limits_setup.SIZES`.
        device: Where models train.
        progress: Called with a line of text for every step.

    Returns:
        The record, as JSON values: command, versions, size, settings, seconds, claims, comparisons, summary, table, data.

    Raises:
        SpecDefError: Fashion-MNIST or SmolLM2 is not installed.
    """
    settings = SIZES[size]
    require_pictures(settings.pictures)
    if not settings.language.tiny:
        smollm2(progress=progress)
    kept = Kept("limits", settings, device, tuple(seeds))
    clock = Clock(kept, progress)
    language: dict[str, Any] = {"runs": [], "utility": []}
    pictures: dict[str, Any] = {"rows": [], "locks": [], "edits": []}
    curvature: list[dict[str, Any]] = []
    for seed in seeds:
        for name, rows in language_part(settings.language, seed, kept, clock.say, device).items():
            language[name] += rows
        for name, rows in picture_part(settings.pictures, seed, kept, clock.say, device).items():
            pictures[name] += rows
        clock.say("curvature")
        curvature += kept.once(f"curvature, seed {seed}", lambda seed=seed: curvature_part(settings.curvature, seed))  # type: ignore[misc]  # fmt: skip
    cells = cells_of(pictures["rows"])
    found = shares(cells, MODALITIES)
    compared = comparisons(language, pictures, found, curvature)
    return conclude(
        out, "limits", kept, options={"seeds": seeds, "size": size, "device": device}, seconds=clock.total(), comparisons=compared, settings=asdict(settings), table=tables(language, found) + lock_table(pictures["locks"]),
        data={"language": language, "cells": cells, **pictures, "curvature": curvature, "accuracy of": VIT}, figure=draw(language, found, curvature),
    )  # fmt: skip
