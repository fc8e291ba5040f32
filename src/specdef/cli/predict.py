"""`specdef predict`: how fast a model would train, from its curvature alone, and how much slower a locked one."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specdef.cli.analysis import (
    BatchSize,
    Columns,
    Data,
    DataOptions,
    Length,
    NumBatches,
    Parameters,
    Precision,
    Progress,
    Split,
    TaskName,
    Workload,
    load_workload,
    progress_text,
)
from specdef.cli.common import (
    Config,
    Device,
    Json,
    Seed,
    find_model,
    parse_list,
    print_json,
    say,
)

if TYPE_CHECKING:
    from specdef.cli.predict_report import Outcome

DEFAULT_OPTIMIZERS = "gd,heavy_ball,nesterov,adamw"


def predict(
    model: Annotated[str, typer.Argument(help="Model folder or hub id.")],
    locked: Annotated[
        str | None, typer.Argument(help="A locked form of it, to be compared at the same target.")
    ] = None,
    *,
    data: Data,
    optimizers: Annotated[
        str,
        typer.Option(
            help="gd, sgd, heavy_ball, nesterov, adam, adamw, rmsprop, adadelta, kfac; comma-separated."
        ),
    ] = DEFAULT_OPTIMIZERS,
    target: Annotated[
        float | None,
        typer.Option(
            help="Decrease of the loss to reach, in nats [default: a tenth of MODEL's loss]."
        ),
    ] = None,
    learning_rates: Annotated[
        str | None,
        typer.Option(
            help="Predict the steps at these rates, comma-separated [default: the best rate is sought]."
        ),
    ] = None,
    num_steps: Annotated[int, typer.Option(help="Lanczos steps from the gradient.")] = 30,
    max_steps: Annotated[
        int, typer.Option(help="Training steps at which the search for the target ends.")
    ] = 10_000,
    parameters: Parameters = None,
    batch_size: BatchSize = 4,
    num_batches: NumBatches = 1,
    length: Length = 64,
    split: Split = None,
    columns: Columns = None,
    task: TaskName = None,
    dtype: Annotated[
        Precision | None,
        typer.Option(
            help="Type to compute in [default: float64 with LOCKED, whose small eigenvalues drown in float32; else float32]."
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the predicted losses into this PNG file.")
    ] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    json: Json = False,
    config: Config = None,
) -> None:
    """Predict stable learning rates and steps to a target loss by optimiser, without training."""
    began = time.monotonic()
    names = tuple(dict.fromkeys(parse_list(optimizers) or ()))
    rates = _numbers(learning_rates)
    if not names:
        raise ValueError("--optimizers needs at least one name.")
    if target is not None and not 0 < target < math.inf:
        raise ValueError(f"--target must be positive, got {target}.")
    if num_steps < 1 or max_steps < 1:
        raise ValueError("--num-steps and --max-steps must be at least 1.")
    from specdef.cli.predict_report import draw, outcomes, predict_report
    from specdef.rates.optimizers import resolve
    from specdef.weights.atomic import atomic_file, refuse_existing

    for name in names:
        resolve(name)  # an unknown one should not wait for the model
    if plot is not None:
        refuse_existing(plot)
    folder = find_model(model, quiet=json)
    other = find_model(locked, quiet=json) if locked else None
    options = DataOptions(
        data=data, batch_size=batch_size, num_batches=num_batches, length=length, split=split, columns=columns,
        task=task, seed=seed,
    )  # fmt: skip
    kind = dtype or (Precision.float64 if locked else Precision.float32)
    common: dict[str, Any] = {
        "params": parse_list(parameters), "dtype": kind.value, "rates": rates, "num_steps": num_steps, "max_steps": max_steps,
        "seed": seed, "curves": plot is not None,
    }  # fmt: skip

    def ask(place: Path, goal: float | None, progress: Progress, what: str) -> Outcome:
        work: Workload = load_workload(
            place, options, dtype=kind.value, device=device, original=folder, quiet=place != folder
        )
        return outcomes(work, names, goal, progress, what, **common)

    with progress_text("predict") as progress:
        found = ask(folder, target, progress, "MODEL" if other else "")
        against = ask(other, found.target, progress, "LOCKED") if other else None
    report = {
        "model": model, "locked": locked, "data": data, "dtype": kind.value,
        **predict_report(found, against), "seconds": round(time.monotonic() - began, 2), "files": [],
    }  # fmt: skip
    if plot is not None:
        with atomic_file(plot) as path:
            draw(path, found, against)
        report["files"] = [str(plot)]
    if json:
        print_json(report)
    _show(report)


def _numbers(text: str | None) -> tuple[float, ...] | None:
    """Read "1e-3,3e-3"."""
    if text is None:
        return None
    try:
        values = tuple(float(part) for part in parse_list(str(text)) or ())
    except ValueError:
        values = ()
    if not values or not all(0 < value < math.inf for value in values):
        raise ValueError(f"--learning-rates takes positive numbers like 1e-3,3e-3, got {text!r}.")
    return values


def _show(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(stderr=True, width=None if Console(stderr=True).is_terminal else 180)
    table = Table(
        title=f"{report['model']}: loss {report['loss']:.4g}, down by {report['target']:.4g}, not trained"
    )
    for column in ("optimizer", "", "stable rate", "best rate", "steps (range)", "slowdown (range)"):  # fmt: skip
        table.add_column(
            column, justify="left" if column in ("optimizer", "") else "right", no_wrap=True
        )
    doubts: dict[str, list[str]] = {}
    for name, row in report["optimizers"].items():
        pairs = [("MODEL" if row["locked"] else "", row)]
        pairs += [("LOCKED", row["locked"])] if row["locked"] else []
        for what, numbers in pairs:
            slow = what == "LOCKED"
            table.add_row(
                "" if slow else name, what, _number(numbers["stable_learning_rate"]), _number(numbers["best_learning_rate"]),
                _range(numbers, "steps_to_target"), _range(row, "slowdown") if slow else "",
                style=None if numbers["trustworthy"] else "dim",
            )  # fmt: skip
            if not numbers["trustworthy"]:
                doubts.setdefault(numbers["reason"], []).append(f"{name} {what}".strip())
    console.print(table)
    for reason, names in doubts.items():
        say(f"not to be trusted: {', '.join(names)}: {reason}")
    for path in report["files"]:
        say(f"wrote {path}")


def _number(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.3g}"


def _range(row: dict[str, Any], name: str) -> str:
    ends = [_number(row[f"{name}_{end}"]) for end in ("low", "high")]
    return f"{_number(row[name])} ({ends[0]} to {ends[1]})"
