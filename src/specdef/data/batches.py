"""Batches from a user's data: text, tables, data sets and pictures, for the three kinds of models that are analysed."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor

from specdef.data.classes import classification_batches
from specdef.data.columns import check_roles
from specdef.data.idx import idx_records, is_idx_folder
from specdef.data.language import language_batches
from specdef.data.mnist import NAME as MNIST
from specdef.data.mnist import find_idx
from specdef.data.records import read_records
from specdef.errors import SpecDefError

Task = Literal["causal-lm", "sequence-classification", "image-classification"]
"""What a model is trained to do."""

TASKS: tuple[Task, ...] = get_args(Task)


def load_batches(
    data: str | Path,
    config: Any,
    processor: Any,
    *,
    task: str,
    batch_size: int,
    num_batches: int,
    length: int = 128,
    seed: int = 0,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
    chat: bool | None = None,
    note: Callable[[str], None] | None = None,
) -> list[dict[str, Tensor]]:
    """Draw batches for a Hugging Face model from a file, a folder, packaged data or MNIST.

    Nothing but MNIST is fetched and no code of a data set is run. docs/data.md says what is accepted.

    Args:
        data: Name of packaged data (`packaged.NAMES`), "mnist", or a path: `.txt`, `.jsonl`, `.json`, `.csv`, `.tsv`, `.parquet`, `.npz`
            (pictures), the output of `datasets.save_to_disk`, a folder of such files, a folder of pictures in class
            folders, or one of IDX files.
        config: The model's transformers config.
        processor: Its tokenizer or image processor; None, for pictures only: they are resized and scaled to [0, 1].
        task: What the model is trained to do, one of `TASKS`.
        batch_size: Rows per batch.
        num_batches: Batches to return.
        length: Tokens per window of running text, and at most per prompt with completion or text to classify.
        seed: Decides which rows are drawn, without replacement; the global random state is left as it was.
        split: Part of a folder or of MNIST; default "train" where there is one.
        columns: Columns under other names than the common ones: a mapping from "text", "text_pair", "prompt", "completion",
            "label" or "image" to a column.
        chat: Whether a prompt with its completion goes through the tokenizer's chat template, as a user's turn and the
            assistant's; None: packaged data do, where the tokenizer has one. Language models only.
        note: Called with one line of text for each decision worth knowing: cut texts, how class names were translated, …

    Returns:
        Batches to call the model with, each with `labels`: `input_ids`, `attention_mask` and `labels`
        `[batch_size, length]`, with -100 where nothing is to be predicted; or what the tokenizer gives and `labels`
        `[batch_size]`; or `pixel_values` `[batch_size, channels, height, width]` and `labels` `[batch_size]`.

    Raises:
        ValueError: A count is too small, or `task` or a key of `columns` is unknown.
        SpecDefError: The data cannot be read, lacks a column, holds too little, or does not fit the model.
    """
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}.")
    for name, value, least in (("batch_size", batch_size, 1), ("num_batches", num_batches, 1), ("length", length, 2)):  # fmt: skip
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}.")
    say = note or _silent

    if task == "image-classification":
        from specdef.data.images import image_batches, read_arrays

        if (folder := find_idx(data, progress=say)) is not None:
            records = idx_records(folder, split)
        elif Path(data).suffix.lower() == ".npz" and os.path.isfile(data):
            records = read_arrays(Path(data), config)
        else:
            records = read_records(data, split=split)
        check_roles(columns or {}, records.columns, records.source)
        return image_batches(
            records, config, processor, batch_size=batch_size, num_batches=num_batches, seed=seed,
            columns=columns or {}, note=say,
        )  # fmt: skip

    if processor is None:
        raise ValueError("processor must be the model's tokenizer, got None.")
    if data == MNIST or is_idx_folder(Path(data)):
        raise SpecDefError(
            f"{data}: pictures; the model takes text.", hint="Give text, or an image classifier."
        )
    limit = _longest(config)
    if task == "causal-lm" and limit is not None and length > limit:
        raise SpecDefError(
            f"Windows of {length} tokens were asked for; the model reads at most {limit}.",
            hint=f"Ask for a length of at most {limit}.",
        )
    records = read_records(data, split=split)
    check_roles(columns or {}, records.columns, records.source)
    drawn: dict[str, Any] = {
        "batch_size": batch_size, "num_batches": num_batches, "seed": seed, "columns": columns or {}, "note": say,
        "length": min(length, limit or length),
    }  # fmt: skip
    if task == "causal-lm":
        return language_batches(records, config, processor, chat=chat, **drawn)
    return classification_batches(records, config, processor, **drawn)


def _longest(config: Any) -> int | None:
    """Return how many positions the model has, if it says so."""
    get = getattr(config, "get_text_config", None)
    value = getattr(get() if get else config, "max_position_embeddings", None)
    return value if isinstance(value, int) and value > 0 else None


def _silent(_: str) -> None:
    """Report nothing."""
