"""What goals share: predictions of a model, and the rows of batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from specdef.attacks.structural.edits import fitted
from specdef.curvature.losses import Batch, ClassificationLoss
from specdef.errors import SpecDefError
from specdef.lock.deformation.retain import evaluating


def labels_of(batch: Batch) -> Tensor:
    """Return the class labels of a batch, one per row.

    Args:
        batch: With "labels", or a pair.

    Returns:
        (batch,) int64.

    Raises:
        SpecDefError: They are no classes, or not one per row.
    """
    labels = ClassificationLoss().targets(batch)
    if labels.ndim != 1:
        raise SpecDefError(
            f"labels are {list(labels.shape)}, not one per row",
            hint="This goal is for classifiers.",
        )
    return labels


def rows(batch: Batch, chosen: Tensor) -> Batch:
    """Return some rows of a batch.

    Args:
        batch: Its tensors have rows along their first axis; other values stay.
        chosen: (batch,) bool.

    Returns:
        A batch of the same kind.
    """

    def pick(value: Any) -> Any:
        return value[chosen] if isinstance(value, Tensor) and value.ndim else value

    if isinstance(batch, Mapping):
        return {name: pick(value) for name, value in batch.items()}
    return [pick(value) for value in batch]


def where(batches: Iterable[Batch], chosen: Callable[[Tensor], Tensor]) -> list[Batch]:
    """Return the rows whose labels are wanted; batches left without a row are dropped.

    Args:
        batches: Of a classifier.
        chosen: Labels (batch,) to bool (batch,).

    Returns:
        Batches.
    """
    masks = [(batch, chosen(labels_of(batch))) for batch in batches]
    return [rows(batch, mask) for batch, mask in masks if bool(mask.any())]


def predicted(model: nn.Module, batches: Sequence[Batch]) -> tuple[Tensor, Tensor]:
    """Run a classifier.

    Args:
        model: In any mode, which it keeps.
        batches: One at least.

    Returns:
        (predicted classes, labels), each (rows,) on the CPU.
    """
    loss = ClassificationLoss()
    guesses, labels = [], []
    with evaluating(model), torch.no_grad():
        for batch in batches:
            own = fitted(batch, model)
            guesses.append(loss.outputs(model, own).argmax(-1).cpu())
            labels.append(labels_of(own).cpu())
    return torch.cat(guesses), torch.cat(labels)


def accuracy(model: nn.Module, batches: Sequence[Batch]) -> float:
    """Return the share of rows a classifier gets right."""
    guesses, labels = predicted(model, batches)
    return float((guesses == labels).double().mean())
