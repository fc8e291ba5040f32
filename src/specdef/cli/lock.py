"""`specdef lock`: one folder in, one locked folder out."""

from __future__ import annotations

import math
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specdef.cli import lock_options as option
from specdef.cli.common import (
    Config,
    Device,
    Json,
    Seed,
    find_model,
    human_bytes,
    output_bytes,
    parse_layers,
    parse_modules,
    print_json,
    progress_bar,
    say,
)
from specdef.cli.lock_options import Method
from specdef.errors import SpecDefError

if TYPE_CHECKING:
    from specdef.lock.certificate import LockCertificate
    from specdef.lock.config import LockConfig

CHECK_BELOW = 2_000_000_000
"""Bytes of weights up to which outputs are compared after locking unless told otherwise."""


class Schedule(StrEnum):
    """Schedules of the absorbed lock."""

    convex = "convex"
    staggered = "staggered"
    uniform = "uniform"


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
    scale: Annotated[
        float | None, typer.Option(help="Largest multiplier [default: 2^30 absorbed, 1e4 others].")
    ] = None,
    min_scale: Annotated[
        float, typer.Option(help="Smallest multiplier of a schedule (absorbed).")
    ] = 2.0**8,
    schedule: Annotated[
        Schedule, typer.Option(help="How scales are spread over the sites (absorbed).")
    ] = Schedule.convex,
    power: Annotated[int, typer.Option(help="Exponent of the convex schedule (absorbed).")] = 16,
    channel: Annotated[
        Channel, typer.Option(help="Which channel of a site is scaled (absorbed).")
    ] = Channel.least_useful,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="Text or JSONL file to choose channels on, or 'builtin'; without it they are chosen from the weights alone (absorbed)."
        ),
    ] = None,
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
        _finish(folder, certificate, check, sign, device=device, as_json=json, files={"plot": path})
        return
    from specdef.lock.config import LockConfig

    recipe = LockConfig(
        method=method.value,  # type: ignore[arg-type]
        scale=scale, min_scale=min_scale, schedule=schedule.value, power=power,
        channel=channel.value, k=25 if k is None else k, num_layers=num_layers, target_modules=parse_modules(target_modules),
        layers=parse_layers(layers), storage_dtype=storage_dtype,
        max_relative_error=max_relative_error, seed=seed,
    )  # fmt: skip
    from specdef.lock.lock import lock_checkpoint

    folder = find_model(model, quiet=json)
    batches = _calibration(calibration, folder, seed) if method is Method.absorbed else None
    if dry_run:
        _dry_run(folder, out, recipe, batches, as_json=json)
        return
    with progress_bar("lock") as (progress, status):
        certificate = lock_checkpoint(
            folder, out, recipe, key_path=key, calibration=batches, source_name=_source_name(model, folder),
            progress=progress, status=None if json else status,
        )  # fmt: skip
    _finish(folder, certificate, check, sign, device=device, as_json=json, files={})


def _finish(
    folder: Path,
    certificate: LockCertificate,
    check: bool | None,
    sign: Path | None,
    *,
    device: str,
    as_json: bool,
    files: dict[str, str | None],
) -> None:
    """Compare outputs, sign, and say what was done."""
    out = Path(certificate.certificate).parent
    certificate, identical = _check(folder, out, certificate, check, device=device, quiet=as_json)
    if sign:
        from specdef.lock.signing import sign_folder

        say(f"signature: {sign_folder(out, sign)}")
    values = certificate.to_dict()
    for large in ("tensors", "files"):
        values.pop(large)
    values |= {"outputs_identical": identical, **files}
    if as_json:
        print_json(values)
    _summary(certificate)
    if certificate.bit_identical and identical is False:
        say("FINDING: outputs are not bit-identical to the original's; do not publish this folder")
        raise typer.Exit(1)
    if check and identical is None:
        say("FINDING: outputs could not be compared, though --check asks for it")
        raise typer.Exit(1)


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


def _dry_run(folder: Path, out: Path, recipe: LockConfig, batches: Any, *, as_json: bool) -> None:
    from specdef.lock.certificate import count_reasons
    from specdef.lock.lock import calibrate_checkpoint, open_lockable, plan_lock

    checkpoint = open_lockable(folder, out)  # what a real run refuses, a dry run refuses too
    scores = calibrate_checkpoint(checkpoint, batches, recipe) if batches is not None else None
    plan = plan_lock(checkpoint, recipe, scores=scores)
    _, dropped = checkpoint.other_files()
    written = output_bytes(checkpoint.nbytes, plan)
    values: dict[str, Any] = {
        "method": plan.method,
        "dry_run": True,
        "out": str(out),
        "sites": [record.to_dict() for record in plan.sites],
        "tensors_total": len(checkpoint.names),
        "tensors_changed": len(plan.tensors_changed),
        "bytes_read": checkpoint.nbytes,
        "bytes_written": written,
        "sigma_max_before": plan.sigma_max_before,
        "sigma_max_after": plan.sigma_max_after,
        "uncovered": count_reasons(plan.uncovered),
        "dropped": dropped,
        "notes": list(plan.notes),
    }
    if as_json:
        print_json(values)
    say(
        f"{plan.method} lock of {len(plan.sites)} sites, {values['tensors_changed']} of {values['tensors_total']} tensors change"
    )
    say(f"reads {human_bytes(checkpoint.nbytes)}, writes {human_bytes(written)} to {out}")
    for record in plan.sites[:8]:
        where = f"channel {record.channel}" if record.channel is not None else f"top {record.k}"
        say(f"  {record.name:60} {where:14} x {record.scale:.4g}")
    if len(plan.sites) > 8:
        say(f"  … and {len(plan.sites) - 8} more (--json lists them)")
    _say_limits(values["uncovered"], dropped, plan.notes)
    say("dry run: nothing was written")


def _check(
    folder: Path,
    out: Path,
    certificate: LockCertificate,
    check: bool | None,
    *,
    device: str,
    quiet: bool,
) -> tuple[LockCertificate, bool | None]:
    """Compare outputs, record the difference in the certificate, and say whether they are identical.

    Card and notes say so where bit identity was promised and did not hold; the promise stays, so that `verify` fails.

    Returns:
        The certificate as it stands now, and the verdict; None where nothing was compared.
    """
    from specdef.errors import CheckpointError
    from specdef.lock.card import write_card
    from specdef.lock.verify import DTYPES, compare_outputs
    from specdef.weights.checkpoint import Checkpoint

    if check is None:
        equal = certificate.method not in ("scaled", "deformation")
        check = equal and Checkpoint.open(folder).nbytes < CHECK_BELOW
    if not check:
        return certificate, None
    results = []
    for dtype in DTYPES:
        if not quiet:
            say(f"lock: comparing outputs in {dtype}")
        try:
            results.append(compare_outputs(out, folder, dtype, device=device))
        except CheckpointError as error:
            say(f"outputs were not compared: {error}")
            return certificate, None
    identical = all(r.bit_identical for r in results)
    differences = {r.dtype: r.max_abs_logit_difference for r in results}
    certificate = replace(
        certificate,
        output_difference={d: x for d, x in differences.items() if math.isfinite(x)},
        notes=[
            *certificate.notes,
            *(
                f"Outputs in {d} are not finite."
                for d, x in differences.items()
                if not math.isfinite(x)
            ),
        ],
    )
    if certificate.bit_identical and not identical:
        broken = "Outputs are not those of the original, though they should be: do not publish this folder."
        certificate = replace(certificate, notes=[*certificate.notes, broken])
        write_card(out, certificate)
    certificate.write(out)
    return certificate, identical


def _summary(certificate: LockCertificate) -> None:
    say(
        f"locked {len(certificate.sites)} sites ({certificate.method}), {certificate.tensors_changed} of "
        f"{certificate.tensors_total} tensors changed, in {certificate.seconds:.1f} s"
    )
    if certificate.training:
        from specdef.cli.lock_deformation import say_training

        say_training(certificate)
    say(
        f"sigma_max of the most deformed matrix: {certificate.sigma_max_before:.4g} -> {certificate.sigma_max_after:.4g}"
    )
    for dtype, difference in certificate.output_difference.items():
        say(f"largest difference of the outputs in {dtype}: {difference:.3g}")
    say(f"key: {certificate.key} (keep it private; without it the original is not restored)")
    say(f"certificate: {certificate.certificate}")
    _say_limits(certificate.uncovered, certificate.dropped, certificate.notes)
    say(f"what this does not stop: {certificate.threat_model}")


def _say_limits(uncovered: Any, dropped: Any, notes: Any) -> None:
    for reason, count in uncovered.items():
        say(f"not covered: {count} inputs ({reason})")
    if dropped:
        say(f"not carried over, being other copies of the weights: {', '.join(dropped)}")
    for note in notes:
        say(f"note: {note}")
