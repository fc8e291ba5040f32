"""`specdef fragility`: will a harmless fine-tune undo what a model was aligned to, and when? Forecast before training."""

from __future__ import annotations

import math
import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specdef.cli.analysis import (
    Columns,
    DataOptions,
    Dtype,
    Length,
    Parameters,
    Precision,
    progress_text,
)
from specdef.cli.common import (
    Config,
    Device,
    Json,
    Seed,
    find_model,
    human_bytes,
    parse_list,
    print_json,
    say,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

OPTIMIZERS = ("sgd", "heavy_ball", "adamw")


class Batches(StrEnum):
    """What a step of the fine-tune sees."""

    full = "full"
    cycled = "cycled"


class FisherMatrix(StrEnum):
    """Matrices whose leading eigenvectors span the sensitive subspace."""

    ggn = "ggn"
    empirical = "empirical"


def fragility(
    model: Annotated[str, typer.Argument(help="Model folder or hub id.")],
    *,
    aligned: Annotated[
        str,
        typer.Option(
            help="Behaviour to keep: a data file or folder (docs/data.md), or builtin (harmless stand-ins), declines, formats."
        ),
    ],
    task: Annotated[
        list[str],
        typer.Option(
            help="Data of the fine-tune: a file or folder, sotu, moby-dick, python or arithmetic; several times to compare."
        ),
    ],
    optimizer: Annotated[str, typer.Option(help="sgd, heavy_ball or adamw.")] = "sgd",
    learning_rate: Annotated[
        float | None,
        typer.Option(
            help="Constant rate of the fine-tune [default: a tenth of the stable rate 2/lambda_max]."
        ),
    ] = None,
    steps: Annotated[int, typer.Option(help="Planned steps.")] = 100,
    batches: Annotated[
        Batches,
        typer.Option(help="A step sees the mean of all task batches, or one after the other."),
    ] = Batches.full,
    batch_size: Annotated[int, typer.Option(help="Rows per batch.")] = 4,
    num_batches: Annotated[int, typer.Option(help="Batches of each task.")] = 4,
    aligned_batches: Annotated[int, typer.Option(help="Batches of aligned data.")] = 4,
    length: Length = 64,
    columns: Columns = None,
    aligned_columns: Annotated[
        str | None, typer.Option(help="The same for the aligned data; --columns is for the tasks.")
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat",
            help="Put prompts into the tokenizer's chat template [default: packaged prompts only, where there is one].",
        ),
    ] = None,
    parameters: Parameters = None,
    lora: Annotated[
        int | None,
        typer.Option(
            help="Fine-tune adapters of this rank beside every linear layer, and nothing else."
        ),
    ] = None,
    max_rank: Annotated[int, typer.Option(help="Largest dimension of the sensitive subspace.")] = 8,
    energy: Annotated[
        float, typer.Option(help="Share of the Fisher matrix' trace it should hold.")
    ] = 0.9,
    fisher: Annotated[
        FisherMatrix, typer.Option(help="Matrix of the subspace: Gauss-Newton, or empirical.")
    ] = FisherMatrix.ggn,
    threshold: Annotated[
        float, typer.Option(help="Alignment loss that is too much, in nats per token.")
    ] = 0.05,
    observe: Annotated[
        bool,
        typer.Option("--observe", help="Run the fine-tune too, beside the model, and compare."),
    ] = False,
    dtype: Dtype = Precision.float32,
    out: Annotated[
        Path | None, typer.Option(help="New folder for the pages, the plots and fragility.json.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be computed, and compute nothing.")
    ] = False,
    seed: Seed = 0,
    device: Device = "cpu",
    json: Json = False,
    config: Config = None,
) -> None:
    """Forecast what a harmless fine-tune will do to aligned behaviour, without training.

    Exit code 1 where the alignment is forecast, or was seen, to pass the threshold within the planned steps.
    """
    began = time.monotonic()
    params = parse_list(parameters)
    _check(
        optimizer, learning_rate, steps, threshold, max_rank, energy, lora, params, aligned, task
    )
    from specdef.cli.fragility_run import contract, diagnose, plan, prepare, task_names
    from specdef.weights.atomic import refuse_existing

    task_names(task)
    if out is not None:
        refuse_existing(out)
    folder = find_model(model, quiet=json)
    common: dict[str, Any] = {
        "batch_size": batch_size, "length": length, "split": None, "task": None, "seed": seed, "chat": chat,
    }  # fmt: skip
    standing = DataOptions(
        data=aligned, num_batches=aligned_batches, columns=aligned_columns, **common
    )
    tasks = [DataOptions(data=name, num_batches=num_batches, columns=columns, **common) for name in task]  # fmt: skip
    with progress_text("fragility") as progress:
        progress.phase("reading the model and the data")
        work = prepare(
            folder, standing, tasks, params=params, lora=lora, dtype=dtype.value, device=device, quiet=json
        )  # fmt: skip
        if not dry_run:
            reports, rate = diagnose(
                work, learning_rate=learning_rate, optimizer=optimizer, batches=batches.value, seed=seed, progress=progress.phase,
                model_name=folder.resolve().name, aligned_name=Path(aligned).name, steps=steps,
                fisher=fisher.value, energy=energy, max_rank=max_rank, threshold=threshold, observe=observe,
            )  # fmt: skip
    if dry_run:
        values = {"model": model, "aligned": aligned} | plan(
            work, max_rank=max_rank, observe=observe, steps=steps, batches=batches.value
        )
        if json:
            print_json(values)
        _say_plan(values)
        return
    from specdef.fragility.render.pages import write_pages
    from specdef.fragility.render.view import finding

    every, ranking, values = contract(reports)
    values |= {
        "learning_rate_given": learning_rate is not None, "lora": lora, "findings": {r["task"]: finding(r) for r in every},
        "seconds": round(time.monotonic() - began, 2),
    }  # fmt: skip
    files = [] if out is None else [str(f) for f in write_pages(out, every, ranking, values)]
    if json:
        print_json(values | {"files": files})
    if learning_rate is None:
        say(f"no --learning-rate was given: {rate:.3g} is taken, a tenth of the stable rate 2/lambda_max")  # fmt: skip
    _say_reports(every, ranking, files)
    if any(values["findings"].values()):
        raise typer.Exit(1)


def _check(
    optimizer: str, learning_rate: float | None, steps: int, threshold: float, max_rank: int, energy: float,
    lora: int | None, params: Sequence[str] | None, aligned: str, task: Sequence[str],
) -> None:  # fmt: skip
    """Refuse what should not wait for the model."""
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"--optimizer must be one of {', '.join(OPTIMIZERS)}, got {optimizer!r}.")
    for name, number in (("--learning-rate", learning_rate), ("--threshold", threshold)):
        if number is not None and not 0 < number < math.inf:
            raise ValueError(f"{name} must be positive, got {number}.")
    if steps < 2:
        raise ValueError(f"--steps must be at least 2, got {steps}.")
    for name, count in (("--max-rank", max_rank), ("--lora", lora)):
        if count is not None and count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}.")
    if not 0 < energy <= 1:
        raise ValueError(f"--energy must be in (0, 1], got {energy}.")
    if lora is not None and params is not None:
        raise ValueError("--lora trains its adapters alone; leave --parameters out.")
    if aligned in task:
        raise ValueError("--task names the aligned data itself; give data of a fine-tune.")


def _say_plan(values: Mapping[str, Any]) -> None:
    say(
        f"{values['parameters']['count']:,} parameters in {values['parameters']['tensors']} tensors would move"
    )
    for name, terms in values["terms"].items():
        say(f"  {name}: {terms} counted terms")
    say(
        f"memory: {human_bytes(values['memory_bytes'])} for vectors, and what is free for graphs, at most half of it"
    )
    say(
        f"at most {values['hessian_products']} products with the Hessian and {values['fisher_products']} with the Fisher matrix, "
        f"{values['training_gradients']} gradients of the run"
    )  # fmt: skip
    say("dry run: nothing was computed or written")


def _say_reports(
    every: Sequence[Mapping[str, Any]], ranking: Mapping[str, Any] | None, files: Sequence[str]
) -> None:
    from specdef.fragility.render.view import comparison, view

    for task in view(every, ranking)["tasks"]:
        say(f"{task['task']} (aligned data: {task['aligned']}): {task['verdict']}")
        for row in task["conditions"]:
            say(f"  {row['name']}: {row['word']}; {row['statement']}")
        for label, text in (*task["numbers"], *task["observed"]):
            say(f"  {label}: {text}")
        for reason in task["reasons"]:
            say(f"  not applicable: {reason}")
        if task["finding"]:
            say(f"  finding: {task['finding']}")
    if ranking:
        found = comparison(every, ranking)
        for row in found["rows"]:
            say(
                f"{row['place']}. {row['task']}: forecast {row['forecast']} ({row['band']}), observed {row['observed']}"
            )
        say(found["correlation"])
    for file in files:
        say(f"wrote {file}")
