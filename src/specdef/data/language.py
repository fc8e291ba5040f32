"""Batches for causal language models: windows of running text, or prompts with their completions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from specdef.data.chat import chat_texts, has_template
from specdef.data.columns import PROMPT, TEXT, find_column, find_pair
from specdef.data.draw import draw_rows
from specdef.data.records import Records
from specdef.data.texts import token_batches
from specdef.errors import SpecDefError

IGNORED = -100
"""Label of a position that counts for no loss."""

_CHARACTERS_PER_TOKEN = 32  # far more than any text has: runs of spaces in code


def language_batches(
    records: Records,
    config: Any,
    tokenizer: Any,
    *,
    batch_size: int,
    length: int,
    num_batches: int,
    seed: int,
    columns: Mapping[str, str],
    chat: bool | None = None,
    note: Callable[[str], None],
) -> list[dict[str, Tensor]]:
    """Draw batches for a causal language model.

    Plain texts are joined and cut into windows without padding (`token_batches`), so texts shorter than a window need
    none either. Prompts with completions stay one row each: prompt, completion, end token; prompt and padding have label -100.
    With `chat` the two are what the tokenizer's chat template makes of a user's turn and the assistant's.

    Args:
        records: Rows with a text, or with a prompt and a completion.
        config: The model's transformers config.
        tokenizer: Its tokenizer.
        batch_size: Rows per batch.
        length: Tokens per window, or at most per prompt with completion: a longer prompt loses its beginning, and a
            longer completion its end.
        num_batches: Batches to return.
        seed: Decides which rows are drawn.
        columns: Role -> column, as the caller gave it.
        chat: Whether prompts go through the chat template; None: where the records are meant so and there is one.
        note: Told what was cut.

    Returns:
        Dicts of `input_ids`, `attention_mask` and `labels`, int64 `[batch_size, length or less]`.

    Raises:
        SpecDefError: There are too few tokens or rows, a row has no text, or the tokenizer is another model's.
    """
    pair = find_pair(("prompt", "completion"), PROMPT, columns, records.columns)
    if pair and "text" not in columns:
        drawn = draw_rows(records, batch_size, num_batches, seed)
        if chat and not has_template(tokenizer):
            raise SpecDefError(
                f"{records.source}: the tokenizer has no chat template to put prompts into.",
                hint="Leave the chat template out, or use a model that was trained to chat.",
            )
        if chat is None:
            chat = records.chat and has_template(tokenizer)
        rows = [_completion(records, i, pair, tokenizer, length, chat) for i in drawn]
        cut = sum(was_cut for *_, was_cut in rows)
        if cut:
            note(f"{cut} of {len(rows)} prompts with completions were cut to {length} tokens")
        pad = _pad_id(config, tokenizer)
        batches = [
            _padded([row[:2] for row in rows[start : start + batch_size]], pad)
            for start in range(0, len(rows), batch_size)
        ]
    else:
        column = find_column("text", TEXT, columns, records.columns, records.source)
        documents = _enough(records, column, batch_size * num_batches * length, seed)
        try:
            batches = token_batches(
                documents, tokenizer, batch_size=batch_size, length=length, num_batches=num_batches, seed=seed
            )  # fmt: skip
        except SpecDefError as error:
            raise SpecDefError(f"{records.source}: {error}", hint=error.hint) from error
    _check_vocabulary(batches, config, records.source)
    return batches


def _enough(records: Records, column: str, num_tokens: int, seed: int) -> list[str]:
    """Return all texts in order, or of a large data set as many, drawn at random, as hold the tokens for certain."""
    generator = torch.Generator().manual_seed(seed)
    wanted, characters = num_tokens * _CHARACTERS_PER_TOKEN, 0
    texts: dict[int, str] = {}
    for i in torch.randperm(len(records), generator=generator).tolist():
        texts[i] = text_of(records, i, column)
        characters += len(texts[i])
        if characters >= wanted:
            break
    return [texts[i] for i in sorted(texts)]


def text_of(records: Records, i: int, column: str) -> str:
    """Return the text of a row.

    Args:
        records: The records.
        i: Which row.
        column: Which column.

    Returns:
        The text.

    Raises:
        SpecDefError: It is no string, or not valid Unicode.
    """
    value = records.rows[i].get(column)
    if not isinstance(value, str):
        raise SpecDefError(
            f'{records.places(i)}: no string under "{column}".',
            hint=f"Give every row a string under {column}.",
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can write half of a pair, which no tokenizer takes
        raise SpecDefError(
            f'{records.places(i)}: the string under "{column}" has half of a surrogate pair.',
            hint="Write the character itself, or both halves.",
        ) from error
    return value


def _completion(
    records: Records, i: int, pair: tuple[str, str], tokenizer: Any, length: int, chat: bool
) -> tuple[list[int], list[int], bool]:
    """Return (ids, labels, was cut) of one prompt with its completion."""
    prompt, completion = (text_of(records, i, column) for column in pair)
    if not completion.strip():
        raise SpecDefError(
            f'{records.places(i)}: the text under "{pair[1]}" is empty.',
            hint="Give every prompt a completion to predict, or remove the row.",
        )
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    special = {"add_special_tokens": not chat, "verbose": False}  # a template writes them itself
    if chat:
        prompt, completion = chat_texts(tokenizer, prompt, completion, records.places(i))
    elif records.chat:
        prompt += "\n"
    head = list(tokenizer(prompt, **special)["input_ids"])
    if end and not chat and head[-1:] == end and len(head) > 1:
        head = head[:-1]  # some tokenizers end every text; the prompt goes on
    tail = list(tokenizer(completion, add_special_tokens=False, verbose=False)["input_ids"])
    if not chat:
        tail += end
    elif end and end[0] in tail:
        tail = tail[: tail.index(end[0]) + 1]  # what a template writes behind it is said by nobody
    was_cut = len(head) + len(tail) > length
    # One token of the prompt stays: the first token of a row has nothing to be predicted from.
    tail = tail[: length - min(len(head), 1)]
    head = head[max(len(head) + len(tail) - length, 0) :]
    return head + tail, [IGNORED] * len(head) + tail, was_cut


def _pad_id(config: Any, tokenizer: Any) -> int:
    """Return a token to pad with; masked and unlabelled, it may be any."""
    for value in (tokenizer.pad_token_id, getattr(config, "pad_token_id", None), tokenizer.eos_token_id):  # fmt: skip
        if value is not None:
            return int(value[0] if isinstance(value, list) else value)
    return 0


def _padded(rows: list[tuple[list[int], list[int]]], pad: int) -> dict[str, Tensor]:
    """Pad rows on the right to the longest: position ids then begin at 0 everywhere."""
    longest = max(len(ids) for ids, _ in rows)
    shape = (len(rows), longest)
    out = {
        "input_ids": torch.full(shape, pad, dtype=torch.int64),
        "attention_mask": torch.zeros(shape, dtype=torch.int64),
        "labels": torch.full(shape, IGNORED, dtype=torch.int64),
    }
    for r, (ids, labels) in enumerate(rows):
        out["input_ids"][r, : len(ids)] = torch.tensor(ids)
        out["attention_mask"][r, : len(ids)] = 1
        out["labels"][r, : len(ids)] = torch.tensor(labels)
    return out


def _check_vocabulary(batches: list[dict[str, Tensor]], config: Any, source: str) -> None:
    get = getattr(config, "get_text_config", None)
    size = getattr(get() if get else config, "vocab_size", None)
    largest = max(int(batch["input_ids"].max()) for batch in batches)
    if size is not None and largest >= size:
        raise SpecDefError(
            f"{source}: the tokenizer gives token {largest}, the model has {size}.",
            hint="The tokenizer belongs to another model: put the right one into the model's folder.",
        )
