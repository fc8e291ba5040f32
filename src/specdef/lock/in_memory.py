"""Lock a model in memory, in place."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from specdef.curvature.losses import Batch as RetainBatch
from specdef.curvature.losses import Loss
from specdef.errors import SpecDefError
from specdef.lock.absorbed import select_sites
from specdef.lock.calibrate import Batch, calibrated_scores
from specdef.lock.certificate import LockCertificate, build_certificate
from specdef.lock.compensated import insert_compensation, module_path
from specdef.lock.config import LockConfig
from specdef.lock.deformation.config import DeformationConfig
from specdef.lock.deformation.model import deform_model
from specdef.lock.deformation.records import Progress as TrainingProgress
from specdef.lock.deformation.retain import RetainFunction, UtilityFunction
from specdef.lock.deformation.stored import Training
from specdef.lock.key import Key
from specdef.lock.lock import RETRIES, offending, plan_lock, projected_tensor
from specdef.lock.projected import compensation
from specdef.lock.sequential import find_symmetries
from specdef.lock.sequential import model_config as model_config
from specdef.lock.stack import Lock, locks, require_lockable, set_locks
from specdef.weights.edit import OutOfRange, apply_all
from specdef.weights.rewrite import TensorHashes
from specdef.weights.source import MemorySource
from specdef.weights.tensor_bytes import tensor_sha256


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


def lock_model(
    model: nn.Module,
    config: LockConfig | DeformationConfig | None = None,
    *,
    calibration: Iterable[Batch] | None = None,
    retain: Iterable[RetainBatch] | None = None,
    heldout: Iterable[RetainBatch] | None = None,
    loss: Loss | RetainFunction | None = None,
    utility: UtilityFunction | None = None,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    training_progress: Callable[[TrainingProgress], None] | None = None,
    data: Mapping[str, Any] | None = None,
) -> LockedModel:
    """Lock a model in memory, in place; one that a deformation has locked takes an absorbed lock on top.

    Args:
        model: For a deformation any module. Otherwise one with a transformers `config`; its tensor names must be those of a
            checkpoint, which is so for all families but mixtures of experts that transformers stacks in memory. For
            an absorbed lock also one without, whose layers stand in `nn.Sequential` in the order they are used.
        config: The recipe; None is the default lock.
        calibration: Batches with labels, or (input, target) pairs, to choose channels by (absorbed).
        retain: Batches whose loss a deformation retains; required for it, and refused with the other methods, like all
            that follow.
        heldout: Batches its utility is measured on; None takes the last tenth of `retain`.
        loss: Its task loss: a `Loss`, a callable of model and batch, or None for what suits the model.
        utility: Own measure of utility, higher is better; None is accuracy, or the negative loss.
        checkpoint: File for the state of an unfinished training; None keeps none.
        resume: Go on from there.
        training_progress: Told after every step.
        data: How the batches were drawn, for the certificate.

    Returns:
        The model, its certificate and its key.

    Raises:
        SelectionError: Nothing to lock was found or selected.
        SpecDefError: The lock would break the function, tensors hold NaN or Inf, the data does not fit, or the model is
            locked in a way that the method does not go on top of.
        NotConverged: A deformation led to nothing that may be kept.
        ValueError: `retain` is missing, or what only a deformation takes was given to another method. The model is as it
            was, whatever is raised.
    """
    began = time.perf_counter()
    config = config or LockConfig()
    training = Training(
        retain=retain, heldout=heldout, loss=loss, utility=utility, checkpoint=Path(checkpoint) if checkpoint else None,
        resume=resume, progress=training_progress, data=data,
    )  # fmt: skip
    training.check(config)
    require_lockable(
        model, "deformation" if isinstance(config, DeformationConfig) else config.method
    )
    tensors = unique_tensors(model)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise SpecDefError(
                f"{name} holds NaN or Inf", hint="The model diverged; load it again."
            )
    if isinstance(config, DeformationConfig):
        certificate, key = deform_model(model, tensors, config, training)
    else:
        certificate, key = _lock(model, tensors, config, calibration)
    set_locks(model, (*locks(model), Lock(key.method, key.lock_id)))
    return LockedModel(
        model=model, key=key, certificate=replace(certificate, seconds=time.perf_counter() - began)
    )


def unique_tensors(model: nn.Module) -> dict[str, Tensor]:
    """List parameters and saved buffers once each: of tied tensors the first name, as a checkpoint stores them."""
    seen: set[int] = set()
    out = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            out[name] = tensor
    return out


def _lock(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    config: LockConfig,
    calibration: Iterable[Batch] | None,
) -> tuple[LockCertificate, Key]:
    symmetries = find_symmetries(model, tensors) if config.method == "absorbed" else None
    plain = symmetries is not None and getattr(model, "config", None) is None
    source = MemorySource(tensors, {} if plain else model_config(model))
    scores = None
    if calibration is not None and symmetries is not None:
        sites = select_sites(symmetries.sites, config)
        scores = calibrated_scores(model, sites, calibration, channel=config.channel)
    before = {name: tensor_sha256(tensor) for name, tensor in tensors.items()}
    banned: set[tuple[str, int]] = set()
    while True:
        plan = plan_lock(source, config, scores=scores, banned=banned, symmetries=symmetries)
        try:
            apply_all(tensors, plan.scalings)
            break
        except OutOfRange as error:
            banned |= offending(plan, source, error, symmetries)
            if len(banned) > RETRIES:
                raise
    key = Key.from_plan(plan, config)
    if config.method == "compensated":
        for name in plan.projections:
            module_path(model, name)  # raises where nothing can be inserted
    projected = {
        name: projected_tensor(name, source.read(name), projection, config)
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
        plan, key, config, files={}, source_name=type(model).__name__, calibrated=scores is not None,
        below=locks(model)[-1]._asdict() if locks(model) else None,
    )  # fmt: skip
    return certificate, key
