"""Limits of convergence-rate control (arXiv 2602.18868): the compensated lock on a language model and small nets of further modalities.

What it prevents at the paper's learning rates and at every other one, what it costs, and what undoes it. SmolLM2-135M-Instruct
relearns a novel in place of WMDP; a denoiser, a style transfer and a ViT stand for the further modalities.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from specdef.experiments.kept import Kept
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
from specdef.experiments.paper.tables import lock_table
from specdef.experiments.paper.verdicts import claims_of
from specdef.experiments.record import Progress, make_record, write_record
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
    clock = _Clock(kept, progress or (lambda _: None))
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
    record = make_record(
        "limits", {"seeds": seeds, "size": size, "device": device}, seconds=clock.total(), claims=claims_of(compared),
        comparisons=compared, settings=asdict(settings), table=tables(language, found) + lock_table(pictures["locks"]),
        data={"language": language, "cells": cells, **pictures, "curvature": curvature, "accuracy of": VIT},
    )  # fmt: skip
    write_record(out, "limits", record, draw(language, found, curvature))
    kept.forget()
    return record


class _Clock:
    """Wall time of this run and of those that were interrupted, brought up to date with every line of progress."""

    def __init__(self, kept: Kept, progress: Progress) -> None:
        self._kept, self._progress = kept, progress
        self._before: float = kept.values.get("seconds", 0.0)
        self._began = time.perf_counter()

    def total(self) -> float:
        """Return the seconds so far."""
        return self._before + time.perf_counter() - self._began

    def say(self, line: str) -> None:
        """Pass a line on, and keep the time."""
        self._kept.values.pop("seconds", None)
        self._kept.once("seconds", self.total)
        self._progress(line)
