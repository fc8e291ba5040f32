"""Deform a model and round it to what is stored, so that all that is recorded speaks of the stored weights."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from specdef.curvature.losses import Batch, Loss
from specdef.errors import SpecDefError
from specdef.lock.config import LockConfig
from specdef.lock.deformation.config import DeformationConfig
from specdef.lock.deformation.data import split_held_out
from specdef.lock.deformation.deform import deform
from specdef.lock.deformation.matrices import find_matrices, largest_singular_values
from specdef.lock.deformation.records import DeformationResult, Progress
from specdef.lock.deformation.retain import (
    RetainFunction,
    Utility,
    UtilityFunction,
    measure_utility,
)
from specdef.lock.deformation.state import data_digest
from specdef.lock.plan import LockPlan, SiteRecord
from specdef.symmetries import layer_index

HALF = (torch.bfloat16, torch.float16)
"""Dtypes that are trained in float32 and rounded when they are stored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """What a deformation is given besides model and recipe; of other methods every field is None or False.

    Args:
        retain: Training batches.
        heldout: Batches utility is measured on; None takes the last tenth of `retain`.
        loss: The task loss, as `deform` takes it.
        utility: Own measure of utility, higher is better.
        checkpoint: File for the state of an unfinished training.
        resume: Go on from that file.
        progress: Told after every step.
        data: How the batches were drawn, for the certificate: JSON values.
        load: How a folder becomes a model to train; None is `load_model` in float32.
    """

    retain: Iterable[Batch] | None = None
    heldout: Iterable[Batch] | None = None
    loss: Loss | RetainFunction | None = None
    utility: UtilityFunction | None = None
    checkpoint: Path | None = None
    resume: bool = False
    progress: Callable[[Progress], None] | None = None
    data: Mapping[str, Any] | None = None
    load: Callable[[Path], nn.Module] | None = None

    def check(self, config: LockConfig | DeformationConfig) -> None:
        """Refuse what does not go with a recipe, before any work.

        Raises:
            ValueError: A deformation has nothing to train on, or another method is given what only a deformation takes.
        """
        if isinstance(config, DeformationConfig):
            if self.retain is None:
                raise ValueError(
                    "a deformation needs retain: batches of the task the model is to go on doing."
                )
            try:
                json.dumps(dict(self.data or {}), allow_nan=False)
            except (TypeError, ValueError) as error:
                raise ValueError(f"data must be JSON values: {error}.") from error
            return
        given = [f.name for f in fields(self) if getattr(self, f.name) not in (None, False)]
        if given:
            raise ValueError(
                f"{given[0]} is for a deformation (DeformationConfig); the method is {config.method}."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """A deformation as it is stored.

    Args:
        plan: The matrices, with their largest singular values before and after.
        utility: As in the certificate.
        training: As in the certificate.
    """

    plan: LockPlan
    utility: dict[str, Any]
    training: dict[str, Any]


def deform_stored(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    dtypes: Mapping[str, torch.dtype],
    config: DeformationConfig,
    training: Training,
    status: Callable[[str], None] | None = None,
) -> Stored:
    """Train a model in place by Algorithm 1, round it, and measure it again.

    Args:
        model: In float32 or float64.
        tensors: Its parameters and buffers by the names they are stored under.
        dtypes: What each of them is stored in.
        config: The recipe.
        training: Data, losses and the rest.
        status: Told what is being worked on.

    Returns:
        What was done. The model holds the rounded values, in its own dtype.

    Raises:
        SpecDefError: A trained value leaves the range of its dtype; the model is then what training made of it.
    """
    retain, heldout = split_held_out(
        () if training.retain is None else training.retain, training.heldout
    )
    result = deform(
        model, config, retain, heldout, loss=training.loss, utility=training.utility,
        checkpoint=training.checkpoint, resume=training.resume, progress=training.progress,
    )  # fmt: skip
    rounded = _round(tensors, dtypes)
    sigma, after = result.sigma_after, result.utility_after
    if rounded:
        if status:
            status("measuring what is stored")
        sigma = largest_singular_values(find_matrices(model, config))
        after = measure_utility(model, heldout, training.loss, training.utility)
    names = _stored_names(model, tensors)
    sites = tuple(
        SiteRecord(
            name=names[n], kind="matrix", layer=layer_index(names[n]), scale=sigma[n] / before,
            covers=(names[n],), k=config.k, sigma_max_before=before, sigma_max_after=sigma[n],
        )
        for n, before in result.sigma_before.items()
    )  # fmt: skip
    largest = max(sigma, key=lambda name: sigma[name])
    return Stored(
        plan=LockPlan(
            method="deformation", sites=sites, notes=tuple(_notes(config, result, after, training)),
            sigma_max_before=result.sigma_before[largest], sigma_max_after=sigma[largest],
        ),
        utility=_utility(result, after, {**(training.data or {}), "sha256": data_digest(heldout)}),
        training=_training(result),
    )  # fmt: skip


def require_change(residuals: Mapping[str, Tensor]) -> None:
    """Refuse a lock that is none.

    Args:
        residuals: Of the tensors that changed.

    Raises:
        SpecDefError: There are none: the steps were lost in rounding.
    """
    if not residuals:
        raise SpecDefError(
            "no stored value changed: the steps were too small for its dtype",
            hint="Raise the learning rate or the number of steps, or store the original in float32.",
        )


def _stored_names(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the name that each parameter is stored under; of several the first."""
    names: dict[int, str] = {}
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), name)
    return {name: names.get(id(p), name) for name, p in model.named_parameters()}


def _round(tensors: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]) -> bool:
    """Round every tensor to its dtype in place; say whether any value changed."""
    changed = False
    with torch.no_grad():
        for name, tensor in tensors.items():
            stored = tensor.to(dtypes[name])
            if stored.is_floating_point() and not bool(stored.isfinite().all()):
                raise SpecDefError(
                    f"{name}: trained values leave the range of {str(dtypes[name]).removeprefix('torch.')}",
                    hint="Lower target_sigma_max or the learning rate, or lock a bfloat16 or float32 copy of the model.",
                )
            back = stored.to(tensor.dtype)
            if not torch.equal(back, tensor):
                changed = True
                tensor.copy_(back)
    return changed


def _notes(
    config: DeformationConfig, result: DeformationResult, after: Utility, training: Training
) -> list[str]:
    notes = []
    if training.heldout is None:
        notes.append("Utility was measured on the last tenth of the retain batches, held out.")
    floor = -math.inf
    if config.max_utility_loss is not None:
        floor = result.utility_before.value - config.max_utility_loss
    if not after.value >= floor - 1e-12:
        notes.append(
            f"Rounding to the stored dtype took {after.metric} from {result.utility_after.value:.4g} to {after.value:.4g}, "
            f"below the floor of {floor:.4g}."
        )
    return notes


def _utility(result: DeformationResult, after: Utility, data: dict[str, Any]) -> dict[str, Any]:
    before = result.utility_before
    return {
        "metric": after.metric,
        "before": _number(before.value),
        "after": _number(after.value),
        "retain_loss_before": _number(before.loss),
        "retain_loss_after": _number(after.loss),
        "rows": after.rows,
        "data": data,
    }


def _training(result: DeformationResult) -> dict[str, Any]:
    values = result.to_dict()
    kept = (
        "steps",
        "kept_step",
        "stopped",
        "reason",
        "seconds",
        "step_seconds",
        "spectral_seconds",
    )
    history = [{n: _number(x) for n, x in s.to_dict().items()} for s in result.history]
    return {**{name: values[name] for name in kept}, "history": history}


def _number(value: Any) -> Any:
    """Return a value as JSON knows it: a number that is not finite is none."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
