"""The quartic law of alignment collapse (arXiv 2602.15799): planted, and forecast then observed on SmolLM2-135M-Instruct.

What is aligned is a harmless stand-in: polite declines and answers in the form asked for (`specdef.data.packaged`). Tasks are harmless too. Every
forecast is made before its fine-tune, from the weights at the start; the fine-tune is then run, and both are kept, misses included. Gradient
descent with full batches is what the law speaks of; AdamW is forecast in its own metric; LoRA in adapter coordinates.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from scipy.stats import spearmanr  # type: ignore[import-untyped]

from specdef.cli.analysis import DataOptions
from specdef.cli.fragility_run import SHARE, diagnose_task, prepare, stable_rate
from specdef.experiments.collapse_planted import planted_results
from specdef.experiments.collapse_plot import draw
from specdef.experiments.collapse_report import claims, table
from specdef.experiments.kept import Kept
from specdef.experiments.paper.earlier import collapse_comparisons
from specdef.experiments.record import Progress, make_record, write_record
from specdef.fragility.subspace import FisherSubspace
from specdef.models.smollm2 import smollm2
from specdef.models.tiny import save_tiny
from specdef.models.tiny_tokenizer import save_tiny_tokenizer

SEEDS = {"cpu": 1, "full": 3, "smoke": 1}
"""Seeds unless told otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One way of fine-tuning.

    Args:
        name: Of the column.
        optimizer: As `specdef.fragility` takes it.
        learning_rate: None takes a tenth of the smallest stable rate of the tasks.
        steps: Of the fine-tune.
        batches: full or cycled.
        lora: Rank of adapters that move alone; None moves the weights.
    """

    name: str
    optimizer: str
    learning_rate: float | None
    steps: int
    batches: Literal["full", "cycled"] = "full"
    lora: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is diagnosed.

    Args:
        parameters: What moves, as `--parameters`; None for all.
        aligned_rows: Rows of declines and formats.
        tasks: Packaged data.
        task_rows: Rows of each, in two batches.
        length: Tokens of a row, at most.
        max_rank: Of the sensitive subspace.
        runs: Ways of fine-tuning.
        tiny: A tiny random model in place of SmolLM2.
    """

    parameters: tuple[str, ...] | None
    aligned_rows: int
    tasks: tuple[str, ...]
    task_rows: int
    length: int
    max_rank: int
    runs: tuple[Run, ...]
    tiny: bool = False


TASKS = ("moby-dick", "sotu", "python", "arithmetic")

SIZES = {
    "cpu": Settings(
        parameters=("model.layers.2?.*",), aligned_rows=4, tasks=TASKS, task_rows=4, length=24, max_rank=8,
        runs=(
            Run(name="sgd", optimizer="sgd", learning_rate=None, steps=40),
            Run(name="adamw", optimizer="adamw", learning_rate=2e-6, steps=20),
            Run(name="lora, sgd", optimizer="sgd", learning_rate=None, steps=20, lora=4),
        ),
    ),
    "full": Settings(
        parameters=None, aligned_rows=48, tasks=TASKS, task_rows=64, length=128, max_rank=16,
        runs=(
            Run(name="sgd", optimizer="sgd", learning_rate=None, steps=400),
            Run(name="adamw", optimizer="adamw", learning_rate=2e-6, steps=200),
            Run(name="adamw, one batch a step", optimizer="adamw", learning_rate=2e-6, steps=200, batches="cycled"),
            Run(name="lora, sgd", optimizer="sgd", learning_rate=None, steps=400, lora=8),
        ),
    ),
    "smoke": Settings(
        parameters=None, aligned_rows=4, tasks=("moby-dick", "arithmetic"), task_rows=4, length=24, max_rank=3, tiny=True,
        runs=(
            Run(name="sgd", optimizer="sgd", learning_rate=None, steps=12),
            Run(name="lora, sgd", optimizer="sgd", learning_rate=None, steps=12, lora=2),
        ),
    ),
}  # fmt: skip
"""Model, data and runs."""


def run(
    out: Path,
    *,
    seeds: Sequence[int] = (0,),
    size: Literal["cpu", "full", "smoke"] = "cpu",
    device: str = "cpu",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Plant, forecast, run and compare, and write collapse.json, collapse.md and collapse.png.

    Every report is kept in the cache as soon as it is made; what was interrupted goes on from there.

    Args:
        out: Folder; made if absent.
        seeds: Of the rows drawn and of everything random.
        size: See `SIZES`.
        device: Where models run.
        progress: Called with a line of text now and then.

    Returns:
        The record, as JSON values: command, versions, size, settings, seeds, seconds, claims, summary, table, data.
    """
    say = progress or (lambda _: None)
    settings = SIZES[size]
    say("planted")
    planted = planted_results(seeds[0])
    kept = Kept("collapse", settings, size, device)
    with tempfile.TemporaryDirectory() as place:
        folder = _tiny(Path(place)) if settings.tiny else smollm2(progress=say)
        rows = [
            row
            for seed in seeds
            for way in settings.runs
            for row in _diagnosed(folder, settings, way, seed, device, kept, say)
        ]
    ranks = [_rank(rows, way.name, seed) for way in settings.runs for seed in seeds]
    options = {"seeds": seeds, "size": size}
    stated = claims(planted, rows, ranks)
    record = make_record(
        "collapse", options if device == "cpu" else {**options, "device": device},
        claims=stated, comparisons=collapse_comparisons(stated), settings=asdict(settings), table=table(rows, ranks),
        seconds=sum(row["cost"]["seconds"] + row["observed"]["seconds"] for row in rows), data={"planted": planted, "runs": rows, "ranks": ranks},
    )  # fmt: skip
    write_record(out, "collapse", record, draw(planted, rows))
    kept.forget()
    return record


def _diagnosed(
    folder: Path, settings: Settings, way: Run, seed: int, device: str, kept: Kept, say: Progress
) -> list[dict[str, Any]]:
    """Forecast and run every task in one way."""
    aligned = DataOptions(
        data="declines+formats", batch_size=settings.aligned_rows, num_batches=1, length=settings.length + 16, split=None,
        columns=None, task=None, seed=seed,
    )  # fmt: skip
    tasks = [
        replace(aligned, data=name, batch_size=settings.task_rows // 2, num_batches=2, length=settings.length)
        for name in settings.tasks
    ]  # fmt: skip
    work = prepare(
        folder, aligned, tasks, params=None if way.lora else settings.parameters, lora=way.lora, dtype="float32", device=device,
        quiet=True,
    )  # fmt: skip
    at = f"{way.name}, seed {seed}"
    rate = way.learning_rate
    if rate is None:
        say(f"{at}: stable learning rate")
        rate = SHARE * kept.once(f"{at}: stable rate", lambda: stable_rate(work, optimizer=way.optimizer, batches=way.batches, seed=seed))  # fmt: skip
    known: FisherSubspace | None = None
    rows = []
    for task in work.tasks:

        def report(task: str = task) -> dict[str, Any]:
            nonlocal known
            found = diagnose_task(
                work, task, known=known, optimizer=way.optimizer, learning_rate=rate, steps=way.steps, batches=way.batches,
                max_rank=settings.max_rank, observe=True, seed=seed, progress=lambda text: say(f"{at}, {task}: {text}"),
                model_name="tiny" if settings.tiny else "SmolLM2-135M-Instruct", aligned_name="declines+formats",
            )  # fmt: skip
            known = found.subspace
            return found.to_dict()

        rows.append({"run": way.name, "seed": seed, **_plain_numbers(kept.once(f"{at}, {task}", report))})  # fmt: skip
    return rows


def _plain_numbers(report: dict[str, Any]) -> dict[str, Any]:
    """Leave out the names of the parameters, hundreds that the settings stand for, and the verdicts: claims go by the numbers."""
    report["parameters"].pop("names", None)
    return {name: value for name, value in report.items() if name not in ("conditions", "verdict")}


def _rank(rows: Sequence[Mapping[str, Any]], name: str, seed: int) -> dict[str, Any]:
    """Correlate the forecast, and the overlap and the coupling at the start, with the damage observed, over tasks."""
    part = [row for row in rows if row["run"] == name and row["seed"] == seed]
    damage = [row["observed"]["alignment"][-1] for row in part]
    found: dict[str, Any] = {"run": name, "seed": seed, "tasks": len(part)}
    for quantity, values in (
        ("forecast", [row["forecast"]["alignment"][-1] for row in part]),
        ("initial_overlap", [row["initial_overlap"] for row in part]),
        ("gamma", [row["gamma"] for row in part]),
    ):
        found[quantity] = float(spearmanr(values, damage).statistic) if len(part) > 2 else None
    return found


def _tiny(folder: Path) -> Path:
    with torch.random.fork_rng(devices=[]):
        save_tiny("llama", folder)
    save_tiny_tokenizer(folder)
    return folder
