"""Retain data: held-out part, order of the batches, and whether they fit the model, before the first step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from specdef.curvature.cross_entropy import IGNORE
from specdef.curvature.losses import Batch, Loss, MSELoss
from specdef.errors import SpecDefError
from specdef.lock.deformation.fit import explained_fit
from specdef.lock.deformation.retain import (
    Retain,
    RetainFunction,
    evaluating,
    task_loss,
    to_device,
)
from specdef.lock.embeddings import input_embeddings

HELD_OUT = 10
"""One of so many retain batches is held out where the caller names no held-out data."""

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
    retain: Iterable[Batch], heldout: Iterable[Batch] | None
) -> tuple[Batches, Sequence[Batch]]:
    """Return training and held-out batches.

    Args:
        retain: All batches: a list, or anything that can be passed over again and again and knows its length, like a
            `DataLoader`. A generator is read into a list.
        heldout: Held-out batches, of any kind that ends; None takes the last tenth of a list, at least one.

    Returns:
        (training, held out); held-out batches are a list, whatever they were.

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
    if not isinstance(heldout, Sequence):
        heldout = list(heldout)
    if not heldout:
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
    generator = torch.Generator().manual_seed(_epoch_seed(seed, epoch))
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
            numbered = enumerate(_drawn_apart(train, _epoch_seed(seed, epoch)))
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


def _epoch_seed(seed: int, epoch: int) -> int:
    return (seed * _SEED_STRIDE + epoch) % (1 << 63)


def _drawn_apart(loader: Iterable[Batch], seed: int) -> Iterator[Batch]:
    """Yield batches that are drawn with random numbers of their own: those of dropout go on as if nothing were drawn.

    So a resumed run, which passes over the batches it has seen, has the numbers it would have had.
    """
    own = torch.Generator().manual_seed(seed).get_state()
    batches: Iterator[Batch] | None = None
    while True:
        others = torch.get_rng_state()
        torch.set_rng_state(own)
        try:
            batches = iter(loader) if batches is None else batches
            batch = next(batches)
        except StopIteration:
            return
        finally:
            own = torch.get_rng_state()
            torch.set_rng_state(others)
        yield batch


def require_fit(
    model: nn.Module,
    train: Batches,
    heldout: Sequence[Batch],
    loss: Loss | RetainFunction | None,
) -> None:
    """Refuse data that does not fit the model, before the first step.

    Labels and token ids of every batch are looked at where batches are a list; the first one is run through the model.

    Args:
        model: The model.
        train: Training batches.
        heldout: Held-out batches.
        loss: The task loss.

    Raises:
        SpecDefError: The model cannot take a batch, or a label or token is out of range.
    """
    lists = [train] if isinstance(train, Sequence) else []
    for batches in (*lists, heldout):
        for number, batch in enumerate(batches):
            _require_batch(batch, number)
            _require_tokens(model, batch, f"batch {number} of the retain data")
    _, first = next(batches_from(train, 0, 0, 1))
    _require_batch(first, 0)
    with evaluating(model), torch.no_grad(), explained_fit(model, first):
        classes = _classes(model, to_device(first, model), loss)
    if classes is not None:
        for batches in (*lists, heldout):
            for number, batch in enumerate(batches):
                _require_labels(model, batch, loss, classes, number)


def require_finite(
    model: nn.Module,
    retain: Retain,
    train: Batches,
    heldout: Sequence[Batch],
    loss: Loss | RetainFunction | None,
) -> None:
    """Refuse a loss that is not finite, or will not be, before the first step.

    It is computed for the first training and held-out batches; of the other training batches, where they are a list, it
    is seen whether any label counts.

    Args:
        model: The model.
        retain: The retain loss.
        train: Training batches.
        heldout: Held-out batches.
        loss: The task loss.

    Raises:
        SpecDefError: It is not finite, or cannot be computed.
    """
    index, first = next(batches_from(train, 0, 0, 1))
    other = heldout[0]
    values = {}
    with evaluating(model), torch.no_grad():
        with explained_fit(model, first):
            values["retain loss"] = float(retain(model, to_device(first, model), index))
        with explained_fit(model, other):
            values["held-out retain loss"] = float(retain.task(model, to_device(other, model)))
    for what, value in values.items():
        if not math.isfinite(value):
            raise SpecDefError(
                f"the {what} of the model as it is, is {value}",
                hint="The model or the data is damaged, or a batch has no label that counts.",
            )
    if callable(loss) or not isinstance(train, Sequence):
        return
    for number, batch in enumerate(train):
        kind = task_loss(model, batch, loss)
        if not kind.count(kind.targets(batch)):
            raise SpecDefError(
                f"batch {number} of the retain data has no label that counts",
                hint="Leave it out: its loss is a mean over nothing.",
            )


def _classes(model: nn.Module, batch: Batch, loss: Loss | RetainFunction | None) -> int | None:
    if callable(loss):
        return None
    kind = task_loss(model, batch, loss)
    return None if isinstance(kind, MSELoss) else int(kind.outputs(model, batch).shape[-1])


def _require_batch(batch: Any, number: int) -> None:
    if not isinstance(batch, Mapping | Sequence) or isinstance(batch, str):
        raise SpecDefError(
            f"batch {number} of the retain data is a {type(batch).__name__}",
            hint='Give batches: dicts with a tensor under "labels", or (input, target) pairs.',
        )


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
    size = getattr(input_embeddings(model), "num_embeddings", None)
    if isinstance(ids, Tensor) and size is not None and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < size:  # fmt: skip
        raise SpecDefError(
            f"{where} has the token {int(ids.max())}; the model knows 0..{size - 1}",
            hint="Use the model's own tokenizer.",
        )
