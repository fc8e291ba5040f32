"""What a deformation must keep: the task loss, the original's outputs (KL), or a callable; and the utility that is left."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from specdef.curvature.cross_entropy import IGNORE
from specdef.curvature.losses import (
    Batch,
    ClassificationLoss,
    LMLoss,
    Loss,
    MSELoss,
    model_outputs,
)
from specdef.errors import SpecDefError
from specdef.lock.deformation.config import RetainLoss, Teacher
from specdef.lock.deformation.divergence import kl_terms
from specdef.lock.deformation.fit import explained_fit

RetainFunction = Callable[[nn.Module, Batch], Tensor]
"""A user's retain loss: model and batch to a scalar that can be differentiated."""

UtilityFunction = Callable[[nn.Module], float]
"""A user's utility: higher is better."""

CACHE_BYTES = 1 << 29
"""Size of the teacher's outputs up to which `teacher="auto"` keeps them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Utility:
    """How well a model does on held-out retain data.

    Args:
        metric: "accuracy" of classes, "next-token accuracy", "negative loss", or the name of the user's function.
        value: Its value; higher is better.
        loss: Held-out task loss, in nats per sample or token for cross-entropy.
        rows: Samples or tokens that count; 0 for a callable loss, which does not tell.
    """

    metric: str
    value: float
    loss: float
    rows: int

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)


class Retain:
    """The retain loss of a batch.

    Args:
        model: The model as it is before the deformation: the teacher of KL.
        kind: task, kl or their sum.
        teacher: How the original's outputs are had.
        loss: The task: a `Loss`, a callable, or None for what suits the model and its labels.
        batches: The training batches where they can be indexed; otherwise the teacher must be online.

    Raises:
        SpecDefError: KL is asked for where outputs are no class logits.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        kind: RetainLoss = "task",
        teacher: Teacher = "auto",
        loss: Loss | RetainFunction | None = None,
        batches: Sequence[Batch] | None = None,
    ) -> None:
        self._kind = kind
        self._loss = loss
        self._outputs: list[Tensor] | None = None
        self._teacher: nn.Module | None = None
        if kind == "task":
            return
        if isinstance(loss, MSELoss):
            raise SpecDefError(
                "KL needs class logits, and the loss is a squared error",
                hint="Use retain_loss='task', or a callable that compares outputs with the original's.",
            )
        if teacher == "cached" and batches is None:
            raise SpecDefError(
                "the teacher's outputs can be cached for a list of batches only",
                hint="Give the retain data as a list, or use teacher='online'.",
            )
        if batches is not None and teacher != "online":
            self._outputs = self._cache(model, batches, math.inf if teacher == "cached" else CACHE_BYTES)  # fmt: skip
        if self._outputs is None:
            with torch.no_grad():
                self._teacher = copy.deepcopy(model).eval().requires_grad_(False)

    def __call__(self, model: nn.Module, batch: Batch, index: int) -> Tensor:
        """Return the loss of a batch.

        Args:
            model: The model in training.
            batch: On the model's device.
            index: Its place among the batches the teacher's outputs were cached for.

        Returns:
            A scalar: nats per sample or token, both terms added for "task+kl".
        """
        if self._kind == "task":
            return self.task(model, batch)
        loss = None if callable(self._loss) else task_loss(model, batch, self._loss)
        outputs = model_outputs(model, batch) if loss is None else loss.outputs(model, batch)
        rows = outputs[_counted(loss, outputs, batch)]
        divergence = kl_terms(self._original(batch, loss, index), rows).mean()
        if self._kind == "kl":
            return divergence
        task = self.task(model, batch) if loss is None else task_mean(loss, outputs, batch)
        return task + divergence

    def task(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the task loss alone, of any batch.

        Args:
            model: The model.
            batch: On the model's device.

        Returns:
            A scalar.
        """
        if callable(self._loss):
            value = self._loss(model, batch)
            if not isinstance(value, Tensor) or value.numel() != 1:
                what = f"{list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise SpecDefError(f"the retain loss gave {what}", hint="Return one number as a tensor, with its graph.")  # fmt: skip
            return value
        loss = task_loss(model, batch, self._loss)
        return task_mean(loss, loss.outputs(model, batch), batch)

    @property
    def cached(self) -> bool:
        """Whether the teacher's outputs are kept."""
        return self._outputs is not None

    def _original(self, batch: Batch, loss: Loss | None, index: int) -> Tensor:
        if self._outputs is not None:
            return self._outputs[index].to(next(iter(_tensors(batch))).device)
        assert self._teacher is not None
        return _rows(self._teacher, batch, loss)

    def _cache(
        self, model: nn.Module, batches: Sequence[Batch], limit: float
    ) -> list[Tensor] | None:
        kept: list[Tensor] = []
        with evaluating(model), torch.no_grad():
            for batch in batches:
                own = to_device(batch, model)
                loss = None if callable(self._loss) else task_loss(model, own, self._loss)
                with explained_fit(model, batch):
                    kept.append(_rows(model, own, loss).cpu())
                if kept[0].nbytes * len(batches) > limit:
                    return None
        return kept


def task_loss(model: nn.Module, batch: Batch, loss: Loss | None = None) -> Loss:
    """Return the loss a model is trained with: what was given, or what suits the model and the labels.

    Args:
        model: Causal language models of transformers are told by their class's name.
        batch: Its labels tell classes (integers) from regression.
        loss: Returned as it is, if given.

    Returns:
        LMLoss, ClassificationLoss or MSELoss.

    Raises:
        SpecDefError: The batch has no labels to go by.
    """
    if loss is not None:
        return loss
    bare = getattr(model, "_orig_mod", model)  # torch.compile
    bare = bare.module if isinstance(bare, nn.DataParallel) else bare
    if type(bare).__name__.endswith(("ForCausalLM", "LMHeadModel")):
        return LMLoss()
    labels = batch.get("labels") if isinstance(batch, Mapping) else batch[1]
    if not isinstance(labels, Tensor):
        raise SpecDefError(
            "a batch of the retain data has no labels",
            hint='Give dicts with a tensor under "labels", (input, target) pairs, or a callable loss.',
        )
    return MSELoss() if labels.is_floating_point() else ClassificationLoss()


def task_mean(loss: Loss, outputs: Tensor, batch: Batch) -> Tensor:
    """Return the mean of the terms of a batch that count; NaN where none does."""
    targets = loss.targets(batch)
    return loss.terms(outputs, targets).sum() / loss.count(targets)


def measure_utility(
    model: nn.Module,
    batches: Sequence[Batch],
    loss: Loss | RetainFunction | None = None,
    utility: UtilityFunction | None = None,
) -> Utility:
    """Measure a model on held-out data, in evaluation mode and without gradients; its mode is left as it was.

    Args:
        model: The model.
        batches: Held-out batches.
        loss: The task loss, as `Retain` takes it.
        utility: Own measure instead of accuracy or the negative loss.

    Returns:
        The utility; its loss is the mean over samples or tokens, whatever the batches' sizes.
    """
    total, rows, hits = 0.0, 0, 0
    metric = "negative loss"
    with evaluating(model), torch.no_grad():
        for batch in batches:
            own = to_device(batch, model)
            if callable(loss):
                total += float(loss(model, own))
                continue
            kind = task_loss(model, own, loss)
            outputs, targets = kind.outputs(model, own), kind.targets(own)
            count = kind.count(targets)
            total += float(task_mean(kind, outputs, own)) * count if count else 0.0
            rows += count
            if not isinstance(kind, MSELoss):
                metric = "next-token accuracy" if isinstance(kind, LMLoss) else "accuracy"
                hits += int(((outputs.argmax(-1) == targets) & (targets != IGNORE)).sum())
        mean = total / (rows or len(batches))
        if utility is not None:
            return Utility(metric=getattr(utility, "__name__", "utility"), value=float(utility(model)), loss=mean, rows=rows)  # fmt: skip
    value = -mean if metric == "negative loss" else hits / max(rows, 1)
    return Utility(metric=metric, value=value, loss=mean, rows=rows)


def to_device(batch: Batch, model: nn.Module) -> Batch:
    """Return a batch with its tensors on the device of the model's first parameter; half precision in its dtype.

    Batches for a model in half precision reach it so while it is trained in float32.
    """
    parameter = next(model.parameters())

    def moved(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        half = value.dtype in (torch.bfloat16, torch.float16)
        return value.to(parameter.device, parameter.dtype if half else value.dtype)

    if isinstance(batch, Mapping):
        return {name: moved(value) for name, value in batch.items()}
    return [moved(value) for value in batch]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set every module to evaluation mode, and back to the mode it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _tensors(batch: Batch) -> list[Tensor]:
    values = batch.values() if isinstance(batch, Mapping) else batch
    return [value for value in values if isinstance(value, Tensor)]


def _rows(model: nn.Module, batch: Batch, loss: Loss | None) -> Tensor:
    """Return the logits of the rows that count, `[n, C]`, without a graph."""
    with torch.no_grad():
        outputs = model_outputs(model, batch) if loss is None else loss.outputs(model, batch)
        return outputs[_counted(loss, outputs, batch)]


def _counted(loss: Loss | None, outputs: Tensor, batch: Batch) -> Tensor:
    """Tell which rows of the outputs count: those with a target, or, for a callable loss, those that are no padding."""
    if outputs.ndim < 2:
        raise SpecDefError("KL needs logits with an axis of classes", hint="Use retain_loss='task'.")  # fmt: skip
    if loss is not None:
        return loss.targets(batch) != IGNORE
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if isinstance(mask, Tensor) and mask.shape == outputs.shape[:-1]:
        return mask != 0
    return torch.ones(outputs.shape[:-1], dtype=torch.bool, device=outputs.device)
