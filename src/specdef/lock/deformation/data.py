"""Retain data: held-out part, order of the batches, and whether they fit the model, before the first step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from specdef.curvature.cross_entropy import IGNORE
from specdef.curvature.losses import Batch, Loss, MSELoss
from specdef.errors import SpecDefError
from specdef.lock.deformation.memory import explained_memory
from specdef.lock.deformation.retain import (
    Retain,
    RetainFunction,
    evaluating,
    task_loss,
    to_device,
)

HELD_OUT = 10
"""One of so many retain batches is held out where the caller names no held-out data."""

_T = TypeVar("_T")

_SEED_STRIDE = 1_000_003


@runtime_checkable
class Batches(Protocol):
    """Batches that can be passed over again and again: a list, or a sized loader."""

    def __len__(self) -> int:
        """Return the number of batches."""
        ...

    def __iter__(self) -> Iterator[Batch]:
        """Yield them in the order of one epoch."""
        ...


def split_held_out(
    retain: Iterable[Batch], heldout: Sequence[Batch] | None
) -> tuple[Batches, Sequence[Batch]]:
    """Return training and held-out batches.

    Args:
        retain: All batches: a list, or anything that can be passed over again and again and knows its length, like a
            `DataLoader`. A generator is read into a list.
        heldout: Held-out batches; None takes the last tenth of a list, at least one.

    Returns:
        (training, held out).

    Raises:
        SpecDefError: There is nothing to train on, or nothing to hold out.
    """
    if iter(retain) is retain:
        retain = list(retain)
    hint = "Give more batches, or held-out ones of their own (heldout=)."
    if heldout is None:
        if not isinstance(retain, Sequence):
            raise SpecDefError(f"a {type(retain).__name__} cannot be split into training and held-out data", hint=hint)  # fmt: skip
        if len(retain) < 2:
            raise SpecDefError(f"{len(retain)} retain batch{'' if len(retain) == 1 else 'es'} cannot be split into training and held-out data", hint=hint)  # fmt: skip
        cut = len(retain) - max(1, len(retain) // HELD_OUT)
        return retain[:cut], retain[cut:]
    if not len(heldout):
        raise SpecDefError("the held-out data is empty", hint=hint)
    if not isinstance(retain, Batches):
        raise SpecDefError(
            f"a {type(retain).__name__} does not say how many batches it has",
            hint="Give a list or a DataLoader of a data set with a length.",
        )
    if not len(retain):
        raise SpecDefError("the retain data is empty", hint=hint)
    return retain, heldout


def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """Return the order a list of batches is taken in: another one in every epoch, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed * _SEED_STRIDE + epoch)
    return torch.randperm(count, generator=generator).tolist()


def batches_from(train: Batches, seed: int, first: int, last: int) -> Iterator[tuple[int, Batch]]:
    """Yield the batches of some steps.

    Args:
        train: A list, taken in `epoch_order`; or a loader, in its own.
        seed: Of the order.
        first: First step, 0 for the very first.
        last: One more than the last.

    Yields:
        (index of the batch in the list, batch).
    """
    step, per_epoch = first, len(train)
    while step < last:
        epoch, skip = divmod(step, per_epoch)
        if isinstance(train, Sequence):
            numbered: Iterable[tuple[int, Batch]] = ((i, train[i]) for i in epoch_order(per_epoch, seed, epoch))  # fmt: skip
        else:
            torch.manual_seed(seed * _SEED_STRIDE + epoch)  # a shuffling loader draws from it
            numbered = enumerate(iter(train))
        seen = -1
        for seen, (index, batch) in enumerate(numbered):
            if seen >= skip and step < last:
                yield index, batch
                step += 1
        if seen < skip:
            raise SpecDefError(
                f"the retain data ended after {seen + 1} of {per_epoch} batches",
                hint="Give batches that can be passed over again and again, not a generator.",
            )


def require_fit(
    model: nn.Module,
    retain: Retain,
    train: Batches,
    heldout: Sequence[Batch],
    loss: Loss | RetainFunction | None,
) -> None:
    """Refuse data that does not fit the model, before the first step.

    Labels and token ids of every batch are looked at where batches are a list; the first training and held-out batches
    are run through the model.

    Args:
        model: The model.
        retain: The retain loss.
        train: Training batches.
        heldout: Held-out batches.
        loss: The task loss.

    Raises:
        SpecDefError: The model cannot take a batch, a label or token is out of range, or the loss is not finite.
    """
    lists = [train] if isinstance(train, Sequence) else []
    for batches in (*lists, heldout):
        for number, batch in enumerate(batches):
            _require_tokens(model, batch, f"batch {number} of the retain data")
    index, first = next(batches_from(train, 0, 0, 1))
    own = to_device(first, model)
    classes = _fitting(model, first, lambda: _classes(model, own, loss))
    if classes is not None:
        for batches in (*lists, heldout):
            for number, batch in enumerate(batches):
                _require_labels(model, batch, loss, classes, number)
    other = heldout[0]
    values = {
        "retain loss": _fitting(model, first, lambda: float(retain(model, own, index))),
        "held-out retain loss": _fitting(
            model, other, lambda: float(retain.task(model, to_device(other, model)))
        ),
    }
    for what, value in values.items():
        if not math.isfinite(value):
            raise SpecDefError(
                f"the {what} of the model as it is, is {value}",
                hint="The model or the data is damaged, or a batch has no label that counts.",
            )


def _fitting(model: nn.Module, batch: Batch, run: Callable[[], _T]) -> _T:
    """Run a model on a batch, saying what does not fit where torch would say how."""
    with evaluating(model), torch.no_grad(), explained_memory():
        try:
            return run()
        except (RuntimeError, ValueError, IndexError, TypeError, KeyError, AssertionError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise SpecDefError(
                f"the retain data does not fit the model: {reason[:300]}",
                hint=f"Batches are what {type(model).__name__} takes: {_shapes(batch)} was given.",
            ) from error


def _classes(model: nn.Module, batch: Batch, loss: Loss | RetainFunction | None) -> int | None:
    if callable(loss):
        return None
    kind = task_loss(model, batch, loss)
    return None if isinstance(kind, MSELoss) else int(kind.outputs(model, batch).shape[-1])


def _require_labels(model: nn.Module, batch: Batch, loss: Any, classes: int, number: int) -> None:
    targets = task_loss(model, batch, loss).targets(batch)
    bad = targets[(targets != IGNORE) & ((targets < 0) | (targets >= classes))]
    if bad.numel():
        raise SpecDefError(
            f"batch {number} of the retain data has the label {int(bad[0])}, outside 0..{classes - 1}",
            hint="Labels are class indices below the number of the model's outputs; -100 does not count.",
        )


def _require_tokens(model: nn.Module, batch: Batch, where: str) -> None:
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    embedding = getattr(model, "get_input_embeddings", lambda: None)
    try:
        table = embedding()
    except (AttributeError, NotImplementedError):  # transformers models without a table
        return
    size = getattr(table, "num_embeddings", None)
    if isinstance(ids, Tensor) and size is not None and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < size:  # fmt: skip
        raise SpecDefError(
            f"{where} has the token {int(ids.max())}; the model knows 0..{size - 1}",
            hint="Use the model's own tokenizer.",
        )


def _shapes(batch: Batch) -> str:
    items = batch.items() if isinstance(batch, Mapping) else enumerate(batch)
    return ", ".join(f"{n} {list(x.shape)}" for n, x in items if isinstance(x, Tensor))
