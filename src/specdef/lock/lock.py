"""Lock a checkpoint on disk: plan, rewrite, key, certificate, in this order."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from specdef.curvature.losses import Batch as RetainBatch
from specdef.curvature.losses import Loss
from specdef.errors import CheckpointError, SpecDefError
from specdef.lock.absorbed import plan_absorbed, select_sites
from specdef.lock.activations import require_finite_activations
from specdef.lock.calibrate import Batch, calibrated_scores
from specdef.lock.card import write_card
from specdef.lock.certificate import LockCertificate, build_certificate
from specdef.lock.compensated import locked_config
from specdef.lock.config import LockConfig
from specdef.lock.deformation.checkpoint import deform_checkpoint
from specdef.lock.deformation.config import DeformationConfig
from specdef.lock.deformation.records import Progress as TrainingProgress
from specdef.lock.deformation.retain import RetainFunction, UtilityFunction
from specdef.lock.deformation.stored import Training
from specdef.lock.files import other_files_sha256
from specdef.lock.key import Key
from specdef.lock.load import load_model
from specdef.lock.merge import merge
from specdef.lock.plan import LockPlan, Projection
from specdef.lock.projected import compensation, plan_projected, scaled_matrix
from specdef.lock.residual import encode_residual
from specdef.lock.selection import check_selection
from specdef.lock.stack import lower_lock
from specdef.lock.unlock import require_locked_tensors
from specdef.symmetries import Symmetries, find_sites
from specdef.weights.atomic import atomic_folder, refuse_existing
from specdef.weights.checkpoint import Checkpoint
from specdef.weights.edit import Edit, OutOfRange, ReplaceEdit
from specdef.weights.folder import (
    BASE_CONFIG_NAME,
    CERTIFICATE_BELOW_NAME,
    CERTIFICATE_NAME,
    COMPENSATION_NAME,
    file_sha256,
)
from specdef.weights.rewrite import Progress, copy_other_files, rewrite_tensors
from specdef.weights.source import FolderSource, TensorSource

RETRIES = 8
"""How often a channel that turns out not to fit is replaced before the scale itself is to blame."""


def plan_lock(
    source: Checkpoint | TensorSource,
    config: LockConfig | DeformationConfig,
    *,
    scores: Mapping[str, Tensor] | None = None,
    banned: Iterable[tuple[str, int]] = (),
    symmetries: Symmetries | None = None,
    status: Callable[[str], None] | None = None,
) -> LockPlan:
    """Work out what a lock would do, writing nothing.

    Args:
        source: An open checkpoint, or any tensor source.
        config: The recipe.
        scores: Site name to channel scores, from `calibrated_scores` (absorbed); None is data-free.
        banned: (site, channel) pairs to avoid (absorbed).
        symmetries: Of a model no table knows (absorbed); None looks them up.
        status: Told what is being worked on.

    Returns:
        The plan.

    Raises:
        ValueError: The recipe is a deformation, of which nothing is known before it is trained.
        SelectionError: Nothing to lock was found or selected.
        SpecDefError: The lock would break the function.
    """
    if isinstance(config, DeformationConfig):
        raise ValueError(
            "a deformation is trained, not planned; find_matrices(model, config) lists what it would work on."
        )
    tensors = FolderSource(source) if isinstance(source, Checkpoint) else source
    check_selection(tensors.names, config)
    if config.method == "absorbed":
        return plan_absorbed(tensors, config, scores=scores, banned=list(banned), symmetries=symmetries)  # fmt: skip
    return plan_projected(tensors, config, progress=status)


def lock_checkpoint(
    source: str | Path,
    out: str | Path,
    config: LockConfig | DeformationConfig | None = None,
    *,
    key_path: str | Path | None = None,
    calibration: Iterable[Batch] | None = None,
    source_name: str = "",
    progress: Progress | None = None,
    status: Callable[[str], None] | None = None,
    retain: Iterable[RetainBatch] | None = None,
    heldout: Iterable[RetainBatch] | None = None,
    loss: Loss | RetainFunction | None = None,
    utility: UtilityFunction | None = None,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    training_progress: Callable[[TrainingProgress], None] | None = None,
    data: Mapping[str, Any] | None = None,
    load: Callable[[Path], nn.Module] | None = None,
    notes: Iterable[str] = (),
) -> LockCertificate:
    """Lock a model folder into a new folder.

    A folder that a deformation has locked takes an absorbed lock on top; each is undone by its own key, the upper one first.
    Streams: memory is bounded by a few blocks for absorbed without calibration, by the largest locked matrix in float64
    for compensated and scaled, by the model for calibration; a deformation trains the model. The output folder appears
    whole or not at all; the key is written just before it appears.

    Args:
        source: Model folder with safetensors weights.
        out: Folder to create.
        config: The recipe; None is the default lock.
        key_path: Where the key goes; None is `OUT.key.safetensors` beside the output.
        calibration: Batches with labels to choose channels by (absorbed); None chooses from the weights alone.
        source_name: Name of the model in the certificate; None is the folder's own name.
        progress: Called with (bytes done, bytes in all).
        status: Told what is being worked on.
        retain: Batches whose loss a deformation retains; required for it, and refused with the other methods, like all
            that follow.
        heldout: Batches its utility is measured on; None takes the last tenth of `retain`.
        loss: Its task loss: a `Loss`, a callable of model and batch, or None for what suits the model.
        utility: Own measure of utility, higher is better; None is accuracy, or the negative loss.
        checkpoint: Where the state of an unfinished training goes; None is `OUT.checkpoint.safetensors`.
        resume: Go on from there.
        training_progress: Told after every step.
        data: How the batches were drawn, for the certificate.
        load: How the folder becomes a model to train; None is `load_model` in float32.
        notes: Sentences for the certificate, of how the recipe was found, say; not for a deformation.

    Returns:
        The certificate, with the sites in full, and the paths of key and certificate.

    Raises:
        CheckpointError: The source cannot be used, or the output cannot be written.
        CertificateMismatch: The source is locked, and is not what its certificate says.
        SelectionError: Nothing to lock was found or selected.
        SpecDefError: The lock would break the function, or the data does not fit the model.
        NotConverged: A deformation led to nothing that may be kept.
        ValueError: `retain` is missing, or what only a deformation takes was given to another method.
    """
    began = time.perf_counter()
    config = config or LockConfig()
    training = Training(
        retain=retain, heldout=heldout, loss=loss, utility=utility, checkpoint=Path(checkpoint) if checkpoint else None,
        resume=resume, progress=training_progress, data=data, load=load,
    )  # fmt: skip
    training.check(config)
    out = Path(out) if Path(out).name else Path(out).absolute()
    method = "deformation" if isinstance(config, DeformationConfig) else config.method
    opened = open_lockable(source, out, method)
    key_path = Path(key_path) if key_path else out.with_name(out.name + ".key.safetensors")
    if key_path.resolve().is_relative_to(out.resolve()):
        raise CheckpointError(
            "lies inside the locked folder", path=key_path, hint="Keep the key elsewhere."
        )
    if isinstance(config, DeformationConfig):
        certificate = deform_checkpoint(
            opened, out, config, training, key_path=key_path, source_name=source_name, progress=progress, status=status
        )  # fmt: skip
    else:
        certificate = _lock(
            opened, out, config, key_path, calibration, source_name, progress, status, tuple(notes)
        )
    return replace(
        certificate,
        seconds=time.perf_counter() - began,
        key=str(key_path),
        certificate=str(out / CERTIFICATE_NAME),
    )


def open_lockable(source: str | Path, out: Path, method: str) -> Checkpoint:
    """Open a model folder for locking into another, refusing what cannot be locked or written before any work.

    Args:
        source: Model folder.
        out: Folder to create.
        method: The lock method.

    Returns:
        The open folder.

    Raises:
        CheckpointError: The source is damaged, quantised, lacks its configuration or is locked in a way that the method
            does not go on top of, or the output is taken or lies inside the source.
        CertificateMismatch: The source is locked, and its files were changed since.
    """
    refuse_existing(out)
    checkpoint = Checkpoint.open(source)
    checkpoint.require_float()
    if out.resolve().is_relative_to(checkpoint.folder.resolve()):
        raise CheckpointError(
            "lies inside the model's folder", path=out, hint="Name a folder outside it."
        )
    if not checkpoint.config:
        raise CheckpointError(
            "has no config.json", path=source, hint="Fetch it from where the weights came from."
        )
    lower_lock(checkpoint, method)
    return checkpoint


def calibrate_checkpoint(
    checkpoint: Checkpoint,
    batches: Iterable[Batch],
    config: LockConfig,
    *,
    load: Callable[[Path], nn.Module] = load_model,
) -> dict[str, Tensor]:
    """Load the model of a folder and score the channels of its sites on batches.

    Args:
        checkpoint: The open folder.
        batches: Inputs with labels.
        config: Its channel, layers and target_modules are used.
        load: How the folder becomes a model, which is left as it was.

    Returns:
        Site name to channel scores, as `plan_lock` takes them.
    """
    sites = find_sites(checkpoint.config, checkpoint.shapes).sites
    chosen = select_sites(sites, config)
    model = load(checkpoint.folder).eval()
    return calibrated_scores(model, chosen, batches, channel=config.channel)


def projected_tensor(
    name: str, original: Tensor, projection: Projection, config: LockConfig
) -> tuple[Tensor, Tensor]:
    """Return W~ as it is stored, and the residual that makes the key exact.

    Raises:
        SpecDefError: W~ overflows its dtype.
    """
    stored = torch.float32 if config.storage_dtype else original.dtype
    locked = scaled_matrix(original, projection).to(stored)
    if not bool(locked.isfinite().all()):
        raise SpecDefError(
            f"{name}: scale {projection.scale:g} overflows", hint="Use a smaller scale."
        )
    return locked, encode_residual(original, merge(locked, projection))


def offending(
    plan: LockPlan, source: Checkpoint | TensorSource, error: OutOfRange, symmetries: Symmetries | None = None
) -> set[tuple[str, int]]:  # fmt: skip
    """Return the (site, channel) pairs that scale the slice which does not fit; a site may have a channel for each side."""
    sites = (symmetries or find_sites(source.config, source.shapes)).sites
    return {
        (site.name, record.channel)
        for site in sites
        for record in plan.sites
        if record.name == site.name and record.channel is not None
        for leg, _ in site.legs()
        if leg.tensor == error.tensor and error.position in leg.positions(record.channel)
    }


def _lock(
    checkpoint: Checkpoint,
    out: Path,
    config: LockConfig,
    key_path: Path,
    calibration: Iterable[Batch] | None,
    source_name: str,
    progress: Progress | None,
    status: Callable[[str], None] | None,
    notes: tuple[str, ...],
) -> LockCertificate:
    scores = None
    batches: list[Batch] = []
    if calibration is not None and config.method == "absorbed":
        if status:
            status("calibrating")
        batches = list(calibration)
        scores = calibrate_checkpoint(checkpoint, batches, config)
    banned: set[tuple[str, int]] = set()
    written: list[Path] = []
    while True:
        plan = plan_lock(checkpoint, config, scores=scores, banned=banned, status=status)
        plan = replace(plan, notes=(*plan.notes, *notes))
        Key.from_plan(plan, config).require_place(key_path)  # before the work, not after it
        try:
            with atomic_folder(out) as work:
                certificate, key = _write(
                    checkpoint, work, plan, config, source_name, scores, progress, status
                )
                if scores is not None:
                    require_finite_activations(work, batches)
                had_key = key_path.exists()
                key.save(key_path)
                written += [] if had_key else [key_path]
            return certificate
        except OutOfRange as error:
            # The plan saw a sample of large tensors; a value outside it does not fit. Take the next best channel.
            banned |= offending(plan, checkpoint, error)
            if len(banned) > RETRIES:
                raise
        except BaseException:
            if not (out / CERTIFICATE_NAME).exists():
                for path in written:
                    with suppress(OSError):  # a key without its lock would block the next one
                        path.unlink()
            raise


def _write(
    checkpoint: Checkpoint,
    work: Path,
    plan: LockPlan,
    config: LockConfig,
    source_name: str,
    scores: Mapping[str, Tensor] | None,
    progress: Progress | None,
    status: Callable[[str], None] | None,
) -> tuple[LockCertificate, Key]:
    if status:
        status("writing")
    lower = lower_lock(checkpoint, plan.method)
    residuals: dict[str, Tensor] = {}

    def projected(name: str) -> ReplaceEdit:
        def compute(original: Tensor) -> Tensor:
            locked, residuals[name] = projected_tensor(
                name, original, plan.projections[name], config
            )
            return locked

        return ReplaceEdit(compute=compute, dtype="F32" if config.storage_dtype else None)

    edits: dict[str, Edit] = {
        **plan.scalings,
        **{name: projected(name) for name in plan.projections},
    }
    hashes = rewrite_tensors(
        checkpoint, work, edits, progress=progress, workers=1 if plan.projections else 2
    )
    _, dropped = copy_other_files(checkpoint, work)
    below = {}
    if lower:
        # what is not what was locked, its own key would not undo
        require_locked_tensors({name: found.before for name, found in hashes.items()}, lower)
        copy = work / CERTIFICATE_BELOW_NAME
        copy.write_bytes((checkpoint.folder / CERTIFICATE_NAME).read_bytes())
        below = {"method": lower.method, "lock_id": lower.lock_id, "sha256": file_sha256(copy)}
    if plan.method == "compensated":
        tensors = {
            name: compensation(p).to(
                torch.float32 if config.storage_dtype else FolderSource(checkpoint).dtype(name)
            )
            for name, p in plan.projections.items()
        }
        save_file(tensors, work / COMPENSATION_NAME, metadata={"format": "pt"})
        (work / COMPENSATION_NAME).chmod(
            0o644
        )  # save_file keeps it to the owner; the folder is to be published
        config_bytes = (work / "config.json").read_bytes()
        (work / BASE_CONFIG_NAME).write_bytes(config_bytes)
        locked = locked_config(checkpoint.config, list(plan.projections))
        (work / "config.json").write_text(json.dumps(locked, indent=2) + "\n", encoding="utf-8")
    key = replace(Key.from_plan(plan, config), residuals=residuals, hashes=hashes)
    certificate = build_certificate(
        plan, key, config, files=other_files_sha256(work), source_name=source_name or checkpoint.folder.resolve().name,
        calibrated=scores is not None, dropped=dropped, below=below, utility=lower.utility if lower else None,
    )  # fmt: skip
    write_card(work, certificate)
    certificate.write(work)
    return certificate, key
