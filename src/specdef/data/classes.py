"""Batches for sequence classification: texts, or pairs of texts, each with one class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from specdef.data.columns import LABEL, TEXT, TEXT_PAIR, find_column, find_pair
from specdef.data.draw import draw_rows
from specdef.data.labels import class_indices
from specdef.data.language import text_of
from specdef.data.records import Records
from specdef.errors import SpecDefError


def classification_batches(
    records: Records,
    config: Any,
    tokenizer: Any,
    *,
    batch_size: int,
    length: int,
    num_batches: int,
    seed: int,
    columns: Mapping[str, str],
    note: Callable[[str], None],
) -> list[dict[str, Tensor]]:
    """Draw batches for a sequence classifier.

    Args:
        records: Rows with a text (or two) and a label.
        config: The model's transformers config.
        tokenizer: Its tokenizer.
        batch_size: Rows per batch.
        length: Most tokens per row; longer texts lose their end.
        num_batches: Batches to return.
        seed: Decides which rows are drawn.
        columns: Role -> column, as the caller gave it.
        note: Told what was cut and how names of classes were translated.

    Returns:
        Dicts of what the tokenizer gives (`input_ids`, `attention_mask`, for some models `token_type_ids`), int64
        `[batch_size, longest of the batch]`, and `labels`, int64 `[batch_size]`.

    Raises:
        SpecDefError: There are too few rows, a text or label is missing or out of range, or rows of different lengths
            cannot be padded.
    """
    found, source = records.columns, records.source
    pair = find_pair(("text", "text_pair"), TEXT_PAIR, columns, found)
    first = pair[0] if pair else find_column("text", TEXT, columns, found, source)
    label = find_column("label", LABEL, columns, found, source)
    indices = class_indices(
        records.column(label), config, names=records.class_names.get(label), place=records.places, note=note
    )  # fmt: skip
    drawn = draw_rows(records, batch_size, num_batches, seed)
    pad = _padding(config, tokenizer)
    limit = min(length, tokenizer.model_max_length)

    batches, cut = [], 0
    for start in range(0, len(drawn), batch_size):
        rows = drawn[start : start + batch_size]
        firsts = [text_of(records, i, first) for i in rows]
        seconds = [text_of(records, i, pair[1]) for i in rows] if pair else None
        lengths = tokenizer(firsts, seconds, verbose=False)["input_ids"]
        cut += sum(len(ids) > limit for ids in lengths)
        try:
            encoded = tokenizer(firsts, seconds, truncation=True, max_length=limit, verbose=False)
        except Exception as error:  # the Rust tokenizers raise bare exceptions for a limit below their special tokens
            raise SpecDefError(
                f"{records.places(rows[0])}: the text cannot be cut to {limit} tokens ({error}).",
                hint="Allow longer texts.",
            ) from error
        for i, ids in zip(rows, encoded["input_ids"], strict=True):
            if not ids:
                raise SpecDefError(
                    f"{records.places(i)}: the text is empty.", hint="Remove the row."
                )
        batches.append(_padded(dict(encoded), pad, source))
        batches[-1]["labels"] = torch.tensor([indices[i] for i in rows], dtype=torch.int64)
    if cut:
        note(f"{cut} of {len(drawn)} texts were cut to {limit} tokens")
    return batches


def _padding(config: Any, tokenizer: Any) -> int | None:
    """Return the token to pad with: the model's own, where it says which positions count."""
    for value in (getattr(config, "pad_token_id", None), tokenizer.pad_token_id):
        if value is not None:
            return int(value)
    return None


def _padded(encoded: dict[str, list[list[int]]], pad: int | None, source: str) -> dict[str, Tensor]:
    """Pad every row on the right to the longest."""
    longest = max(len(ids) for ids in encoded["input_ids"])
    if pad is None and any(len(ids) < longest for ids in encoded["input_ids"]):
        raise SpecDefError(
            f"{source}: texts of different lengths, and neither model nor tokenizer has a padding token.",
            hint="Set pad_token_id in the model's config.json, or use batches of one.",
        )
    out = {}
    for name, rows in encoded.items():
        fill = pad if name == "input_ids" else 0
        out[name] = torch.tensor(
            [[*row, *[fill or 0] * (longest - len(row))] for row in rows], dtype=torch.int64
        )
    return out
