"""`specdef verify`: is this folder what its certificate says?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specdef.cli.common import (
    Config,
    Device,
    Json,
    Seed,
    find_model,
    parse_list,
    print_json,
    progress_bar,
    say,
)

if TYPE_CHECKING:
    from specdef.cli.analysis import DataOptions


def _measured(name: str, help: str) -> Any:
    return typer.Option(name, help=help, rich_help_panel="Utility [default: as the lock recorded]")


COMPARABLE = ("float64", "float32", "bfloat16", "float16")
"""Dtypes a model can be loaded in."""


def verify(
    locked: Annotated[str, typer.Argument(help="Locked folder or hub id.")],
    original: Annotated[
        str | None, typer.Option(help="The unlocked model: compare hashes and outputs with it.")
    ] = None,
    key: Annotated[
        Path | None, typer.Option(help="The key: check that it unlocks to the original.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Dtypes outputs are compared in, comma-separated.")
    ] = "float32,bfloat16",
    public_key: Annotated[
        Path | None, typer.Option(help="Check the folder's signature with this key, PEM.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Run the model on this data and look at its activations in every dtype (docs/data.md)."
        ),
    ] = None,
    quantization: Annotated[
        bool,
        typer.Option(
            "--quantization",
            help="Measure what quantising costs the locked model and the original, on --data.",
        ),
    ] = False,
    retain: Annotated[
        str | None,
        _measured("--retain", "Measure utility again: the data that a deformation retained."),
    ] = None,
    heldout: Annotated[
        str | None, _measured("--heldout", "The same, where --heldout was given to lock.")
    ] = None,
    batch_size: Annotated[int | None, _measured("--batch-size", "Rows per batch.")] = None,
    num_batches: Annotated[
        int | None, _measured("--num-batches", "Batches that were trained on.")
    ] = None,
    eval_batches: Annotated[int | None, _measured("--eval-batches", "Held-out batches.")] = None,
    length: Annotated[int | None, _measured("--length", "Tokens per row of text, at most.")] = None,
    split: Annotated[str | None, _measured("--split", "Part of --retain.")] = None,
    heldout_split: Annotated[str | None, _measured("--heldout-split", "Part of --heldout.")] = None,
    columns: Annotated[
        str | None, _measured("--columns", "Columns with other names, like text=body,label=gold.")
    ] = None,
    task: Annotated[
        str | None, _measured("--task", "What the model does, where config.json does not say.")
    ] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    json: Json = False,
    config: Config = None,
) -> None:
    """Verify a locked model: certificate, hashes, and outputs against the original's. Exit 1 if anything fails."""
    dtypes = parse_list(dtype) or ()
    if not dtypes or not set(dtypes) <= set(COMPARABLE):
        raise ValueError(f"--dtype takes some of {', '.join(COMPARABLE)}, got {dtype!r}.")
    given = {
        "retain": retain, "heldout": heldout, "batch_size": batch_size, "num_batches": num_batches,
        "eval_batches": eval_batches, "length": length, "split": split, "heldout_split": heldout_split, "columns": columns,
        "task": task,
    }  # fmt: skip
    if not (retain or heldout or data) and any(value is not None for value in given.values()):
        name = next(n for n, value in given.items() if value is not None).replace("_", "-")
        raise ValueError(
            f"--{name} says how data is drawn; name the data: --retain DATA or --data DATA."
        )
    if quantization and not (data and original):
        raise ValueError(
            "--quantization compares two models on data: give --original MODEL and --data DATA."
        )
    if data and (retain or heldout):
        raise ValueError(
            "--data and --retain (or --heldout) are drawn by the same options: give them to two calls."
        )
    from specdef.cli.verify_checks import Checks, run_checks
    from specdef.lock.verify import verify_checkpoint

    folder = find_model(locked, quiet=json)
    source = find_model(original, quiet=json) if original else None
    if public_key:
        from specdef.lock.signing import verify_signature

        verify_signature(folder, public_key)
        say("the signature holds")
    again = _batches(folder, given, device=device) if retain or heldout else {}
    with progress_bar("verify") as (progress, status):
        result = verify_checkpoint(
            folder,
            source,
            key,
            dtypes=dtypes,
            seed=seed,
            device=device,
            progress=progress,
            status=None if json else status,
            **again,
        )
        # what is not what was locked need not be run; where outputs differ, these say why
        checks = run_checks(
            folder, source, _data(data, given, seed), dtypes=dtypes, quantization=quantization, device=device,
            status=None if json else status,
        ) if result.valid or result.source_matches else Checks()  # fmt: skip
    result = replace(
        result,
        valid=result.valid and not checks.problems,
        problems=(*result.problems, *checks.problems),
    )
    if json:
        print_json({**result.to_dict(), **checks.to_dict()})
    say(
        f"{'valid' if result.valid else 'NOT VALID'}: {result.tensors_checked} tensors checked, method {result.method}"
        + (f" on top of {result.below}" if result.below else "")
    )
    for item in result.outputs:
        verdict = (
            "bit-identical"
            if item.bit_identical
            else f"differ by up to {item.max_abs_logit_difference:.3g}"
        )
        say(f"outputs in {item.dtype}: {verdict} (largest output {item.max_abs_logit:.3g})")
    if result.source_matches is not None:
        say(
            f"the original given {'is' if result.source_matches else 'is NOT'} the model that was locked"
            + (f" by {result.original_of}" if result.below and result.original_of else "")
        )
    if result.key_matches is not None:
        say(
            f"the key {'unlocks' if result.key_matches else 'does NOT unlock'} it to the recorded original"
        )
    if result.utility is not None:
        measured = result.utility
        at_lock = "" if measured["recorded"] is None else f" (recorded: {measured['recorded']:.4g})"
        say(f"{measured['metric']} {measured['value']:.4g}{at_lock}, loss {measured['loss']:.4g}, {measured['rows']} held out")  # fmt: skip
    checks.say()
    for note in result.notes:
        say(f"note: {note}")
    for problem in result.problems[:20]:
        say(f"  problem: {problem}")
    if len(result.problems) > 20:
        say(f"  … and {len(result.problems) - 20} more")
    if not result.valid:
        raise typer.Exit(1)


def _data(data: str | None, given: dict[str, Any], seed: int) -> DataOptions | None:
    """Return how the batches of --data are drawn; None where there is none."""
    if data is None:
        return None
    from specdef.cli.analysis import DataOptions

    if name := next((n for n in ("eval_batches", "heldout_split") if given[n] is not None), None):
        raise ValueError(f"--{name.replace('_', '-')} is for --retain, not for --data.")
    drawn: dict[str, Any] = {"batch_size": 4, "num_batches": 2, "length": 128, "split": None, "columns": None, "task": None}  # fmt: skip
    values = {n: default if given[n] is None else given[n] for n, default in drawn.items()}
    return DataOptions(data=data, seed=seed, **values)


def _batches(folder: Path, given: dict[str, Any], *, device: str) -> dict[str, Any]:
    """Return the held-out batches of a deformation and its model, as `verify_checkpoint` takes them."""
    from specdef.cli.retain_data import recorded
    from specdef.cli.task_model import load_task_model
    from specdef.errors import CertificateMismatch, SpecDefError
    from specdef.lock.certificate import load_certificate
    from specdef.weights.checkpoint import Checkpoint

    try:
        certificate = load_certificate(folder)
    except CertificateMismatch:
        return {}  # the finding itself
    if not certificate.utility:
        raise SpecDefError(
            f"{folder}: {certificate.method} locks record no utility",
            hint="Leave --retain and --heldout out; --original compares outputs.",
        )
    drawn = certificate.utility.get("data")
    data = recorded(drawn if isinstance(drawn, dict) else {}, given)
    wide = any(info.dtype == "F64" for info in Checkpoint.open(folder).infos.values())
    loaded = load_task_model(
        folder, task=data.task, dtype="float64" if wide else "float32", device=device
    )
    return {"heldout": data.held(loaded), "load": lambda _: loaded.model}
