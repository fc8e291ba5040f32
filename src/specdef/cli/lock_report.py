"""What `specdef lock` says: of a plan before anything is written, and of a lock when it is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from specdef.cli.common import human_bytes, output_bytes, print_json, say

if TYPE_CHECKING:
    from specdef.lock.certificate import LockCertificate
    from specdef.lock.config import LockConfig

CHECK_BELOW = 2_000_000_000
"""Bytes of weights up to which outputs are compared after locking unless told otherwise."""


def finish(
    folder: Path,
    certificate: LockCertificate,
    check: bool | None,
    sign: Path | None,
    *,
    device: str,
    as_json: bool,
    files: Mapping[str, Any],
) -> None:
    """Compare outputs, sign, and say what was done.

    Args:
        folder: The original.
        certificate: Of the lock.
        check: Compare outputs; None decides by size and method.
        sign: A private key to sign with.
        device: Where outputs are compared.
        as_json: Print JSON.
        files: What else is to be printed as JSON, by key: files that were written, a search for the design.

    Raises:
        Exit: Outputs differ that should not, or could not be compared though this was asked for.
    """
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


def dry_run(
    folder: Path,
    out: Path,
    recipe: LockConfig,
    batches: Any,
    *,
    as_json: bool,
    notes: Sequence[str] = (),
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Show the plan of a lock, and what slowdown is expected of it per tier, writing nothing.

    Args:
        folder: The model.
        out: The folder a lock would create.
        recipe: The recipe.
        batches: Calibration batches; None plans from the weights, and forecasts no slowdown.
        as_json: Print the plan as JSON too.
        notes: Sentences beside the plan's own.
        extra: What else is to be printed as JSON, by key.
    """
    from specdef.lock.certificate import count_reasons
    from specdef.lock.load import load_model
    from specdef.lock.lock import calibrate_checkpoint, open_lockable, plan_lock

    checkpoint = open_lockable(folder, out, recipe.method)  # refuses what a real run does
    load = cache(load_model)  # once, for scores and forecast
    scores = calibrate_checkpoint(checkpoint, batches, recipe, load=load) if batches is not None else None  # fmt: skip
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
        "notes": [*plan.notes, *notes],
        "ranges": plan.ranges.to_dict() if plan.ranges else None,
        **(extra or {}),
    }  # fmt: skip
    lines: list[str] = []
    if plan.scalings:
        from specdef.lock.forecast import expected_slowdowns, tier_lines

        expected = []
        if batches is not None:
            say("forecasting the slowdown")
            expected = expected_slowdowns(load(checkpoint.folder).eval(), batches[:1], plan.scalings)  # fmt: skip
        values["expected"] = [e.to_dict() for e in expected]
        lines = tier_lines(expected, max(e.exponent for edits in plan.scalings.values() for e in edits))  # fmt: skip
    if as_json:
        print_json(values)
    say(
        f"{plan.method} lock of {plan.num_sites} sites, {values['tensors_changed']} of {values['tensors_total']} tensors change"
    )
    say(f"reads {human_bytes(checkpoint.nbytes)}, writes {human_bytes(written)} to {out}")
    for record in plan.sites[:8]:
        where = f"channel {record.channel}" if record.channel is not None else f"top {record.k}"
        say(f"  {record.name:60} {where:14} x {record.scale:.4g}")
    if len(plan.sites) > 8:
        say(f"  … and {len(plan.sites) - 8} more (--json lists them)")
    _say_limits(values["uncovered"], dropped, values["notes"])
    for line in lines:
        say(f"expected, {line}")
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
        f"locked {certificate.num_sites} sites ({certificate.method}), {certificate.tensors_changed} of "
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
