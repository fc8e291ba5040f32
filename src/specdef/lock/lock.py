"""Lock a checkpoint on disk, or a model in memory: plan, rewrite, key, certificate, in this order."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from specdef.errors import CheckpointError, SpecDefError
from specdef.lock.absorbed import plan_absorbed, select_sites
from specdef.lock.calibrate import Batch, calibrated_scores
from specdef.lock.card import write_card
from specdef.lock.certificate import LockCertificate, build_certificate
from specdef.lock.compensated import insert_compensation, locked_config, module_path
from specdef.lock.config import LockConfig
from specdef.lock.files import other_files_sha256
from specdef.lock.key import Key, encode_residual
from specdef.lock.load import LOCK_ID, load_model
from specdef.lock.merge import merge
from specdef.lock.plan import LockPlan, Projection
from specdef.lock.projected import compensation, plan_projected, scaled_matrix
from specdef.lock.selection import check_selection
from specdef.symmetries import find_sites
from specdef.weights.atomic import atomic_folder, refuse_existing
from specdef.weights.checkpoint import Checkpoint
from specdef.weights.edit import Edit, OutOfRange, ReplaceEdit, apply_all
from specdef.weights.folder import (
    BASE_CONFIG_NAME,
    CERTIFICATE_NAME,
    COMPENSATION_NAME,
)
from specdef.weights.rewrite import Progress, TensorHashes, copy_other_files, rewrite_tensors
from specdef.weights.source import FolderSource, MemorySource, TensorSource
from specdef.weights.tensor_bytes import tensor_sha256

_RETRIES = 8
"""How often a channel that turns out not to fit is replaced before the scale itself is to blame."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LockedModel:
    """A model locked in memory.

    Args:
        model: The module that was given, changed in place.
        certificate: What was done.
        key: What undoes it; `key.save(path)` keeps it.
    """

    model: nn.Module
    certificate: LockCertificate
    key: Key


def plan_lock(
    source: Checkpoint | TensorSource,
    config: LockConfig,
    *,
    scores: Mapping[str, Tensor] | None = None,
    banned: Iterable[tuple[str, int]] = (),
    status: Callable[[str], None] | None = None,
) -> LockPlan:
    """Work out what a lock would do, writing nothing.

    Args:
        source: An open checkpoint, or any tensor source.
        config: The recipe.
        scores: Site name to channel scores, from `calibrated_scores` (absorbed); None is data-free.
        banned: (site, channel) pairs to avoid (absorbed).
        status: Told what is being worked on.

    Returns:
        The plan.

    Raises:
        SelectionError: Nothing to lock was found or selected.
        SpecDefError: The lock would break the function.
    """
    tensors = FolderSource(source) if isinstance(source, Checkpoint) else source
    check_selection(tensors.names, config)
    if config.method == "absorbed":
        return plan_absorbed(tensors, config, scores=scores, banned=list(banned))
    return plan_projected(tensors, config, progress=status)


def lock_checkpoint(
    source: str | Path,
    out: str | Path,
    config: LockConfig | None = None,
    *,
    key_path: str | Path | None = None,
    calibration: Iterable[Batch] | None = None,
    source_name: str = "",
    progress: Progress | None = None,
    status: Callable[[str], None] | None = None,
) -> LockCertificate:
    """Lock a model folder into a new folder.

    Streams: memory is bounded by a few blocks for absorbed without calibration, by the largest locked matrix in float64
    for compensated and scaled, by the model for calibration. The output folder appears whole or not at all; the key
    is written just before it appears.

    Args:
        source: Model folder with safetensors weights.
        out: Folder to create.
        config: The recipe; None is the default lock.
        key_path: Where the key goes; None is `OUT.key.safetensors` beside the output.
        calibration: Batches with labels to choose channels by (absorbed); None chooses from the weights alone.
        source_name: Name of the model in the certificate; None is the folder's own name.
        progress: Called with (bytes done, bytes in all).
        status: Told what is being worked on.

    Returns:
        The certificate, with the sites in full, and the paths of key and certificate.

    Raises:
        CheckpointError: The source cannot be used, or the output cannot be written.
        SelectionError: Nothing to lock was found or selected.
        SpecDefError: The lock would break the function.
    """
    began = time.perf_counter()
    config = config or LockConfig()
    out = Path(out) if Path(out).name else Path(out).absolute()
    checkpoint = open_lockable(source, out)
    key_path = Path(key_path) if key_path else out.with_name(out.name + ".key.safetensors")
    if key_path.resolve().is_relative_to(out.resolve()):
        raise CheckpointError(
            "lies inside the locked folder", path=key_path, hint="Keep the key elsewhere."
        )
    scores = None
    if calibration is not None and config.method == "absorbed":
        if status:
            status("calibrating")
        scores = calibrate_checkpoint(checkpoint, calibration, config)
    banned: set[tuple[str, int]] = set()
    had_key = key_path.exists()
    while True:
        plan = plan_lock(checkpoint, config, scores=scores, banned=banned, status=status)
        Key.from_plan(plan, config).require_place(key_path)  # before the work, not after it
        try:
            with atomic_folder(out) as work:
                certificate = _write(
                    checkpoint, work, plan, config, key_path, source_name, scores, progress, status
                )
                certificate = replace(certificate, seconds=time.perf_counter() - began)
            break
        except OutOfRange as error:
            # The plan saw a sample of large tensors; a value outside it does not fit. Take the next best channel.
            banned |= _offending(plan, checkpoint, error)
            if len(banned) > _RETRIES:
                raise
        except BaseException:
            if not had_key and not (out / CERTIFICATE_NAME).exists():
                with suppress(OSError):  # a key without its lock would block the next one
                    key_path.unlink()
            raise
    return replace(certificate, key=str(key_path), certificate=str(out / CERTIFICATE_NAME))


def open_lockable(source: str | Path, out: Path) -> Checkpoint:
    """Open a model folder for locking into another, refusing what cannot be locked or written before any work.

    Args:
        source: Model folder.
        out: Folder to create.

    Returns:
        The open folder.

    Raises:
        CheckpointError: The source is damaged, quantised, locked or lacks its configuration, or the output is taken or
            lies inside the source.
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
    if (checkpoint.folder / CERTIFICATE_NAME).exists():
        raise CheckpointError(
            "is locked already", path=source, hint="Unlock it first, or lock the original."
        )
    return checkpoint


def lock_model(
    model: nn.Module,
    config: LockConfig | None = None,
    *,
    calibration: Iterable[Batch] | None = None,
) -> LockedModel:
    """Lock a transformers model in memory, in place.

    Args:
        model: A module with a transformers `config`; its tensor names must be those of a checkpoint, which is so for all
            families but mixtures of experts that transformers stacks in memory.
        config: The recipe; None is the default lock.
        calibration: Batches with labels to choose channels by (absorbed).

    Returns:
        The model, its certificate and its key.

    Raises:
        SelectionError: Nothing to lock was found or selected.
        SpecDefError: The lock would break the function, tensors hold NaN or Inf, or the model is locked already. The
            model is then as it was.
    """
    began = time.perf_counter()
    config = config or LockConfig()
    if getattr(model, LOCK_ID, None) is not None:
        raise SpecDefError(
            "the model is locked already", hint="Lock the original; one key undoes one lock."
        )
    tensors = unique_tensors(model)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise SpecDefError(
                f"{name} holds NaN or Inf", hint="The model diverged; load it again."
            )
    source = MemorySource(tensors, model_config(model))
    scores = None
    if calibration is not None and config.method == "absorbed":
        sites = select_sites(find_sites(source.config, source.shapes).sites, config)
        scores = calibrated_scores(model, sites, calibration, channel=config.channel)
    before = {name: tensor_sha256(tensor) for name, tensor in tensors.items()}
    banned: set[tuple[str, int]] = set()
    while True:
        plan = plan_lock(source, config, scores=scores, banned=banned)
        try:
            apply_all(tensors, plan.scalings)
            break
        except OutOfRange as error:
            banned |= _offending(plan, source, error)
            if len(banned) > _RETRIES:
                raise
    key = Key.from_plan(plan, config)
    if config.method == "compensated":
        for name in plan.projections:
            module_path(model, name)  # raises where nothing can be inserted
    projected = {
        name: _projected(name, source.read(name), projection, config)
        for name, projection in plan.projections.items()
    }
    residuals = {name: residual for name, (_, residual) in projected.items()}
    for name, (locked, _) in projected.items():
        tensors[name].data = locked.to(tensors[name].device)
    if config.method == "compensated":
        insert_compensation(
            model, {n: compensation(p).to(tensors[n].dtype) for n, p in plan.projections.items()}
        )
    hashes = {
        name: TensorHashes(before=before[name], after=tensor_sha256(tensor))
        for name, tensor in tensors.items()
    }
    key = replace(key, residuals=residuals, hashes=hashes)
    certificate = build_certificate(
        plan, key, config, files={}, source_name=type(model).__name__, calibrated=scores is not None
    )
    setattr(model, LOCK_ID, key.lock_id)
    return LockedModel(
        model=model, key=key, certificate=replace(certificate, seconds=time.perf_counter() - began)
    )


def calibrate_checkpoint(
    checkpoint: Checkpoint, batches: Iterable[Batch], config: LockConfig
) -> dict[str, Tensor]:
    """Load the model of a folder and score the channels of its sites on batches.

    Args:
        checkpoint: The open folder.
        batches: Inputs with labels.
        config: Its channel, layers and target_modules are used.

    Returns:
        Site name to channel scores, as `plan_lock` takes them.
    """
    sites = find_sites(checkpoint.config, checkpoint.shapes).sites
    chosen = select_sites(sites, config)
    model = load_model(checkpoint.folder).eval()
    return calibrated_scores(model, chosen, batches, channel=config.channel)


def unique_tensors(model: nn.Module) -> dict[str, Tensor]:
    """List parameters and saved buffers once each: of tied tensors the first name, as a checkpoint stores them."""
    seen: set[int] = set()
    out = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            out[name] = tensor
    return out


def model_config(model: nn.Module) -> dict[str, Any]:
    """Return the model's configuration as its config.json holds it.

    Raises:
        SpecDefError: It is no transformers model.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        raise SpecDefError(
            f"{type(model).__name__} has no transformers configuration",
            hint="Lock it as a checkpoint folder instead.",
        )
    return dict(config.to_dict())


def _write(
    checkpoint: Checkpoint,
    work: Path,
    plan: LockPlan,
    config: LockConfig,
    key_path: Path,
    source_name: str,
    scores: Mapping[str, Tensor] | None,
    progress: Progress | None,
    status: Callable[[str], None] | None,
) -> LockCertificate:
    if status:
        status("writing")
    residuals: dict[str, Tensor] = {}

    def projected(name: str) -> ReplaceEdit:
        def compute(original: Tensor) -> Tensor:
            locked, residuals[name] = _projected(name, original, plan.projections[name], config)
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
        calibrated=scores is not None, dropped=dropped,
    )  # fmt: skip
    write_card(work, certificate)
    certificate.write(work)
    key.save(key_path)
    return certificate


def _projected(
    name: str, original: Tensor, projection: Projection, config: LockConfig
) -> tuple[Tensor, Tensor]:
    """Return W~ as it is stored, and the residual that makes the key exact."""
    stored = torch.float32 if config.storage_dtype else original.dtype
    locked = scaled_matrix(original, projection).to(stored)
    if not bool(locked.isfinite().all()):
        raise SpecDefError(
            f"{name}: scale {projection.scale:g} overflows", hint="Use a smaller scale."
        )
    return locked, encode_residual(original, merge(locked, projection))


def _offending(
    plan: LockPlan, source: Checkpoint | TensorSource, error: OutOfRange
) -> set[tuple[str, int]]:
    channels = {record.name: record.channel for record in plan.sites}
    return {
        (site.name, channel)
        for site in find_sites(source.config, source.shapes).sites
        if (channel := channels.get(site.name)) is not None
        for leg, _ in site.legs()
        if leg.tensor == error.tensor and error.position in leg.positions(channel)
    }
