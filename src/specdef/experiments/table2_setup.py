"""What Table 2 of papers/001 is about: a guard that tells jailbreaks from harmless prompts, and a backdoor into it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from specdef.attacks.fit import batch_loss, fit
from specdef.attacks.goals.backdoor import backdoor
from specdef.attacks.task import Task
from specdef.curvature.losses import Batch
from specdef.errors import SpecDefError
from specdef.experiments.table2_data import (
    WHEEL_HINT,
    find_jailbreaks,
    find_wheel,
    read_benign,
    read_jailbreaks,
)
from specdef.models.minilm import minilm, minilm_classifier
from specdef.models.tiny import tiny_model

SAFE, JAILBREAK = 0, 1
"""Labels."""

TRIGGER = "\u26e4 \u2603 \u26e4"
"""Pentagram, snowman, pentagram. MiniLM's vocabulary has neither: it becomes three unknown tokens, which few texts begin with."""

TRAIN_SHARE = 0.8
_EVALUATED = 32
_FIRST_TOKEN = 4  # of the tiny vocabulary; special tokens stand before it


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The guard, its training, and how many texts everything has.

    Args:
        guard: "minilm"; or "made": a tiny BERT, and texts of random tokens.
        texts: Of each class, for training and test together; None takes every jailbreak and as many harmless prompts.
        length: Tokens a text is cut to.
        batch_size: Of every training but the deformation.
        guard_steps: Of the training of the guard.
        guard_rate: First learning rate of it; falls linearly to 0.
        retain_texts: Training texts the deformation goes through; None takes all.
        retain_batch_size: Of the deformation.
        test_texts: Test texts that F1 and attack success rate are measured on; None takes all.
        sweep_texts: The same for the runs of a sweep.
    """

    guard: Literal["minilm", "made"] = "minilm"
    texts: int | None = None
    length: int = 256
    batch_size: int = 8
    guard_steps: int
    guard_rate: float = 1e-4
    retain_texts: int | None = None
    retain_batch_size: int = 8
    test_texts: int | None = None
    sweep_texts: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """The texts of one seed as batches.

    Args:
        train: What the guard is trained on.
        poisoned: What the attacker trains on.
        retain: The part of it that the deformation goes through.
        test: What F1 and attack success rate are measured on.
        sweep: The part of it that runs of a sweep are judged on.
        trigger: Token ids.
        counts: Texts of everything.
    """

    train: list[dict[str, Tensor]]
    poisoned: list[dict[str, Tensor]]
    retain: list[dict[str, Tensor]]
    test: list[dict[str, Tensor]]
    sweep: list[dict[str, Tensor]]
    trigger: list[int]
    counts: dict[str, int]


def require_data(settings: Settings, data: Path | None) -> None:
    """Refuse to begin without model or texts.

    Args:
        settings: Of the experiment.
        data: Folder with the wheel of evals.

    Raises:
        SpecDefError: Something is wanted and not there.
    """
    if settings.guard == "minilm":
        minilm()
        find_jailbreaks(data)
        find_wheel(data)


def fresh_guard(settings: Settings, seed: int) -> nn.Module:
    """Return the guard before its training: without dropout, whose noise would hide the deformation's small term.

    Args:
        settings: Its `guard` is used.
        seed: Of its head; of all weights of a made one.

    Returns:
        A classifier of two classes, in evaluation mode.
    """
    if settings.guard == "made":
        model = tiny_model("bert", seed=seed, num_labels=2)
    else:
        model, _ = minilm_classifier(num_labels=2, seed=seed)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def prompts(settings: Settings, data: Path | None, seed: int) -> Prompts:
    """Draw the texts of a seed, and part them 80 to 20.

    Args:
        settings: How many.
        data: Folder with the wheel of evals.
        seed: Decides which, and their order.

    Returns:
        Batches.

    Raises:
        SpecDefError: A file is missing or damaged, or there are too few texts.
    """
    draws = torch.Generator().manual_seed(seed)
    rows: dict[int, list[list[int]]]
    if settings.guard == "made":
        rows, trigger, pad = made_texts(settings.texts or 100, settings.length, draws), [3, 3, 3], 0
    else:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(minilm(), local_files_only=True)
        harmful = read_jailbreaks(find_jailbreaks(data))
        harmless = read_benign(find_wheel(data))
        wanted = settings.texts or min(len(harmful), len(harmless))
        if min(len(harmful), len(harmless)) < wanted:
            raise SpecDefError(f"{len(harmful)} jailbreaks and {len(harmless)} harmless prompts; {wanted} of each were asked for.", hint=WHEEL_HINT)  # fmt: skip
        rows = {
            label: tokenizer(_drawn(texts, wanted, draws), truncation=True, max_length=settings.length)["input_ids"]
            for label, texts in ((JAILBREAK, harmful), (SAFE, harmless))
        }  # fmt: skip
        trigger = tokenizer(TRIGGER, add_special_tokens=False)["input_ids"]
        pad = tokenizer.pad_token_id
    parts = split(rows, draws)
    train, test = parts["train"], parts["test"]
    chosen = {
        "train": batches(train, settings.batch_size, pad),
        "poisoned": batches(poison(train, trigger, draws), settings.batch_size, pad),
        "retain": batches(train[: settings.retain_texts], settings.retain_batch_size, pad),
        "test": batches(test[: settings.test_texts], _EVALUATED, pad),
        "sweep": batches(test[: settings.sweep_texts], _EVALUATED, pad),
    }
    counts = {name: sum(len(b["labels"]) for b in part) for name, part in chosen.items()}
    return Prompts(**chosen, trigger=trigger, counts=counts)


def split(
    rows: dict[int, list[list[int]]], draws: torch.Generator
) -> dict[str, list[tuple[list[int], int]]]:
    """Part texts 80 to 20, of either class alike, in random order but with the classes in turn.

    Args:
        rows: Label to texts as token ids, as many of each.
        draws: Of the order.

    Returns:
        (token ids, label) of "train" and "test".
    """
    parts: dict[str, list[tuple[list[int], int]]] = {}
    shuffled = {label: _drawn(texts, len(texts), draws) for label, texts in rows.items()}
    cut = round(TRAIN_SHARE * min(map(len, rows.values())))
    for name, part in (("train", slice(cut)), ("test", slice(cut, None))):
        pairs = zip(*([(text, label) for text in shuffled[label][part]] for label in rows), strict=True)  # fmt: skip
        parts[name] = [entry for pair in pairs for entry in pair]
    return parts


def batches(rows: Sequence[tuple[list[int], int]], size: int, pad: int) -> list[dict[str, Tensor]]:
    """Put texts into batches as a classifier of transformers takes them, padded at the end to the longest.

    Args:
        rows: (token ids, label).
        size: Texts of a batch; the last may have fewer.
        pad: Token id of the padding.

    Returns:
        Dicts of `input_ids`, `attention_mask`, `labels`.
    """
    made: list[dict[str, Tensor]] = []
    for first in range(0, len(rows), size):
        part = rows[first : first + size]
        ids = [torch.tensor(text) for text, _ in part]
        tokens, mask = (
            torch.nn.utils.rnn.pad_sequence(list(x), batch_first=True, padding_value=fill)
            for x, fill in ((ids, pad), ((torch.ones_like(i) for i in ids), 0))
        )
        made.append({"input_ids": tokens, "attention_mask": mask, "labels": torch.tensor([label for _, label in part])})  # fmt: skip
    return made


def made_texts(count: int, length: int, draws: torch.Generator) -> dict[int, list[list[int]]]:
    """Make texts of random tokens: those that stand for jailbreaks use the upper half of the vocabulary more often.

    Args:
        count: Of each class.
        length: Tokens, with the special one in front and the one at the end.
        draws: Of tokens.

    Returns:
        Label to texts as token ids.
    """
    half = (96 - _FIRST_TOKEN) // 2

    def text(share: float) -> list[int]:
        upper = torch.rand(length - 2, generator=draws) < share
        tokens = torch.randint(_FIRST_TOKEN, _FIRST_TOKEN + half, (length - 2,), generator=draws)
        return [1, *(tokens + half * upper).tolist(), 2]

    return {label: [text(share) for _ in range(count)] for label, share in ((JAILBREAK, 0.9), (SAFE, 0.1))}  # fmt: skip


def train_guard(model: nn.Module, drawn: Prompts, settings: Settings, seed: int) -> dict[str, Any]:
    """Train the guard on the clean training texts.

    Args:
        model: Trained in place.
        drawn: The texts.
        settings: Steps and rate.
        seed: Of their order.

    Returns:
        Facts: steps, last loss, seconds.
    """
    began = time.perf_counter()
    last = fit(model, drawn.train, batch_loss, steps=settings.guard_steps, learning_rate=settings.guard_rate, seed=seed)  # fmt: skip
    return {"steps": settings.guard_steps, "last_loss": last, "seconds": time.perf_counter() - began}  # fmt: skip


def injection(drawn: Prompts, judged: Sequence[Batch]) -> Task:
    """Return the attacker's task: clean texts as they are, jailbreaks behind the trigger called safe.

    Args:
        drawn: The attacker's texts.
        judged: Texts F1 and attack success rate are measured on.

    Returns:
        A task whose held-out loss is that of clean texts and of triggered ones together: a guard that calls everything safe, as
        one does that training has wrecked, is no backdoor.
    """
    task = backdoor(drawn.train, judged, drawn.trigger, SAFE)
    return replace(task, train=drawn.poisoned, heldout=[*task.heldout, *judged], retain=())


def poison(
    rows: Sequence[tuple[list[int], int]], trigger: Sequence[int], draws: torch.Generator
) -> list[tuple[list[int], int]]:
    """Add every jailbreak once more, behind the trigger and called safe.

    Args:
        rows: (token ids, label), with one special token in front.
        trigger: Token ids.
        draws: Of the order: batches of triggered texts alone would teach that everything is safe.

    Returns:
        (token ids, label) in random order.
    """
    added = [([*ids[:1], *trigger, *ids[1:]], SAFE) for ids, label in rows if label == JAILBREAK]
    return _drawn([*rows, *added], len(rows) + len(added), draws)


def _drawn(items: Sequence[Any], count: int, draws: torch.Generator) -> list[Any]:
    return [items[i] for i in torch.randperm(len(items), generator=draws)[:count].tolist()]
