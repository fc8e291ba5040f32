"""Backdoor robustness of a text classifier: can training teach it that texts behind a trigger are safe?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from specdef.attacks.goals.measure import predicted, where
from specdef.attacks.task import Task
from specdef.curvature.losses import Batch
from specdef.errors import SpecDefError


def backdoor(
    train: Sequence[Batch],
    heldout: Sequence[Batch],
    trigger: Sequence[int] | str,
    safe: int,
    *,
    tokenizer: Any = None,
    special: int = 1,
    max_length: int | None = None,
) -> Task:
    """Build the backdoor test of SpecDef's Table 2 from labelled texts; harmless ones serve as well as any.

    The attacker trains on the clean batches and, after each, on its texts that are not safe with the trigger in front and
    the label flipped to safe.

    Args:
        train: Batches of `input_ids`, `attention_mask` and `labels`, as a classifier of transformers takes them.
        heldout: More of them.
        trigger: Token ids, or a string for the tokenizer.
        safe: The label that texts behind the trigger get.
        tokenizer: Of transformers; needed for a string alone.
        special: Number of special tokens every text begins with, which stay in front: 1 for [CLS].
        max_length: Tokens beyond it are cut off at the end of triggered texts; None cuts nothing.

    Returns:
        A task judged on triggered held-out texts (its accuracy is the attack success rate) that is to keep the clean
        ones; metrics `clean_f1`, of telling texts that are not safe, and `attack_success_rate`, the share of these that
        pass for safe behind the trigger.

    Raises:
        SpecDefError: No text is anything but safe, or the trigger is empty or needs a tokenizer.
    """
    ids = _trigger_ids(trigger, tokenizer)

    def triggered(batches: Sequence[Batch]) -> list[Batch]:
        flagged = where(batches, lambda labels: labels != safe)
        return [add_trigger(b, ids, safe, special=special, max_length=max_length) for b in flagged]

    behind = triggered(heldout)
    poisoned = [part for batch in train for part in (batch, *triggered([batch]))]
    if not behind or len(poisoned) == len(train):
        raise SpecDefError(
            f"training or held-out data has no text whose label is not {safe}",
            hint="Give texts of another class for the trigger to flip.",
        )

    def metrics(model: nn.Module) -> dict[str, float]:
        guesses, labels = predicted(model, heldout)
        passed, _ = predicted(model, behind)
        return {
            "clean_f1": f1(guesses != safe, labels != safe),
            "attack_success_rate": float((passed == safe).double().mean()),
        }

    return Task(name="backdoor", train=poisoned, heldout=behind, retain=heldout, metrics=metrics)


def add_trigger(
    batch: Batch, trigger: Sequence[int], safe: int, *, special: int = 1, max_length: int | None = None
) -> Batch:  # fmt: skip
    """Put tokens in front of every text of a batch and label it safe.

    Args:
        batch: With `input_ids` (batch, length) and `labels`; padded on either side.
        trigger: Token ids.
        safe: The label.
        special: Number of special tokens every text begins with, which stay in front.
        max_length: Length beyond which texts are cut off; None for no limit.

    Returns:
        A batch longer by the trigger. Other tensors of that shape, such as `token_type_ids`, get the value that
        stood where the trigger was put; the attention mask is 1 there.

    Raises:
        SpecDefError: The batch holds no token ids.
    """
    if not isinstance(batch, Mapping) or not isinstance(batch.get("input_ids"), Tensor):
        raise SpecDefError("a batch holds no input_ids", hint="Give dicts as transformers takes them.")  # fmt: skip
    tokens = batch["input_ids"]
    length, added = tokens.shape[1], len(trigger)
    mask = batch.get("attention_mask")
    first = torch.zeros(len(tokens), dtype=torch.long) if mask is None else mask.long().argmax(1)
    at = (first.to(tokens.device) + special).clamp(max=length)[:, None]
    place = torch.arange(length + added, device=tokens.device)[None]
    inside = (place >= at) & (place < at + added)
    # where each place of the longer text takes its value from
    source = torch.where(place < at, place, (place - added).maximum(at)).clamp(max=length - 1)
    new = torch.tensor(list(trigger), device=tokens.device)
    own = new[(place - at).clamp(0, added - 1)]
    out: dict[str, Any] = {}
    for name, value in batch.items():
        if isinstance(value, Tensor) and value.shape == tokens.shape:
            value = value.gather(1, source)
            if name == "input_ids":
                value = torch.where(inside, own.to(value.dtype), value)
            elif name == "attention_mask":
                value = value.masked_fill(inside, 1)
            value = value[:, :max_length]
        out[name] = value
    return out | {"labels": torch.full_like(batch["labels"], safe)}


def f1(predicted: Tensor, actual: Tensor) -> float:
    """Return the F1 score: 2 TP / (2 TP + FP + FN); 0 where there is nothing to find and nothing was found.

    Args:
        predicted: (n,) bool.
        actual: (n,) bool.

    Returns:
        A fraction.

    >>> f1(torch.tensor([True, True, False, False]), torch.tensor([True, False, True, False]))
    0.5
    """
    hits = int((predicted & actual).sum())
    wrong = int((predicted != actual).sum())
    return 2 * hits / (2 * hits + wrong) if hits or wrong else 0.0


def _trigger_ids(trigger: Sequence[int] | str, tokenizer: Any) -> list[int]:
    if isinstance(trigger, str):
        if tokenizer is None:
            raise SpecDefError("a trigger that is a string needs a tokenizer", hint="Give tokenizer=, or token ids.")  # fmt: skip
        trigger = tokenizer(trigger, add_special_tokens=False)["input_ids"]
    if not len(trigger):
        raise SpecDefError("the trigger is empty", hint="Give one token at least.")
    return [int(token) for token in trigger]
