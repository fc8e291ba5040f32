"""Texts and how they become batches: two short packaged texts, `.txt` and `.jsonl` files, windows of tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdef.errors import SpecDefError

TEXTS = ("sotu", "moby-dick")


def load_text(name: str) -> str:
    """Return a packaged text in the public domain; `files/README.md` states where each comes from.

    Args:
        name: "sotu" (two State of the Union addresses: for calibration and retained behaviour) or "moby-dick"
            (chapters 1 to 3: for a fine-tuning attack). About 50 kB each, 12,000 tokens.

    Returns:
        The text.

    Raises:
        SpecDefError: No text has that name.

    Example:
        >>> load_text("moby-dick")[22:38]
        'Call me Ishmael.'
    """
    if name not in TEXTS:
        raise SpecDefError(
            f"No packaged text is named {name!r}.",
            hint=f"Use one of {', '.join(TEXTS)}, or read_texts(path) for a file.",
        )
    return (resources.files("specdef.data") / "files" / f"{name}.txt").read_text(encoding="utf-8")


def read_texts(path: str | Path) -> list[str]:
    r"""Read the documents of a file in UTF-8.

    Args:
        path: A `.txt` file (one document) or a `.jsonl` file (one per line, `{"text": "…"}`; other fields are
            ignored, blank lines skipped).

    Returns:
        The documents, at least one, in the file's order.

    Raises:
        SpecDefError: The file is missing, empty, not UTF-8, of another type, or a line of it is malformed; the
            message names the line.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in {".txt", ".jsonl"}:
        raise SpecDefError(
            f"{path}: texts are read from .txt and .jsonl files, not from {suffix or 'a file without a suffix'}.",
            hint='Write one JSON object {"text": "…"} per line into a .jsonl file.',
        )
    content = decode_file(path)
    documents = [content] if suffix == ".txt" else list(_jsonl_texts(path, content))
    if not any(document.strip() for document in documents):
        raise SpecDefError(f"{path}: the file holds no text.", hint="Name a file with text in it.")
    return documents


def token_batches(
    text_or_path: str | Path | Sequence[str],
    tokenizer: Any,
    *,
    batch_size: int,
    length: int,
    num_batches: int,
    seed: int,
) -> list[dict[str, Tensor]]:
    """Cut a text into windows of tokens and draw batches of them without replacement.

    The documents are joined, each ended by the tokenizer's end-of-sequence token where it has one, and cut into
    windows that do not overlap; windows beyond `batch_size * num_batches` are left out. No window needs padding, so
    the mask is all ones. No token is added in front of a window.

    Args:
        text_or_path: A text (`str`), documents (a sequence of `str`), or a file (`Path`, see `read_texts`).
        tokenizer: A Hugging Face tokenizer.
        batch_size: Windows per batch.
        length: Tokens per window.
        num_batches: Batches to return.
        seed: Decides which windows are drawn and in what order; the global random state is left as it was.

    Returns:
        Dicts of `input_ids`, `attention_mask` and `labels`, each int64 `[batch_size, length]`. The labels equal the
        ids: Hugging Face causal models shift them inside.

    Raises:
        ValueError: A count is below 1, or `length` below 2 (one token has no next token to predict).
        SpecDefError: The text has too few tokens, or the file cannot be read.
    """
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("length", length, 2),
        ("num_batches", num_batches, 1),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}.")
    if isinstance(text_or_path, Path):
        documents: Sequence[str] = read_texts(text_or_path)
    else:
        documents = [text_or_path] if isinstance(text_or_path, str) else text_or_path

    # One long row of tokens, then windows of it: [num_windows, length].
    ids = _tokenize(documents, tokenizer)
    num_windows = len(ids) // length
    needed = batch_size * num_batches
    if num_windows < needed:
        raise SpecDefError(
            f"The text is too short: {needed} windows of {length} tokens were asked for "
            f"({num_batches} batches of {batch_size}), its {len(ids)} tokens make {num_windows}.",
            hint=_too_short_hint(text_or_path, num_windows // batch_size),
        )
    windows = torch.tensor(ids[: num_windows * length], dtype=torch.int64).view(num_windows, length)

    generator = torch.Generator().manual_seed(seed)
    drawn = windows[torch.randperm(num_windows, generator=generator)[:needed]]
    return [
        {
            "input_ids": rows.clone(),
            "attention_mask": torch.ones_like(rows),
            "labels": rows.clone(),
        }
        for rows in torch.split(drawn, batch_size)
    ]


def decode_file(path: Path) -> str:
    """Return the content of a file in UTF-8, with or without a byte-order mark.

    Args:
        path: The file.

    Returns:
        Its text.

    Raises:
        SpecDefError: It is missing, cannot be read, or is not UTF-8; the message names the line.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError as error:
        raise SpecDefError(f"{path}: there is no such file.", hint="Check the path.") from error
    except OSError as error:
        raise SpecDefError(f"{path}: {error.strerror}.", hint="Name a readable file.") from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # The decoder counts from after a byte-order mark; the line number is the same either way.
        line = error.object[: error.start].count(b"\n") + 1
        raise SpecDefError(
            f"{path}, line {line}: byte 0x{error.object[error.start]:02x} is not UTF-8.",
            hint="Convert the file, for example with `iconv -f LATIN1 -t UTF-8`.",
        ) from error


def _jsonl_texts(path: Path, content: str) -> Iterator[str]:
    """Yield the `text` of each line."""
    # Not str.splitlines: a JSON string may hold U+2028, which is no line end here.
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        hint = 'Each line is one JSON object such as {"text": "…"}.'
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise SpecDefError(f"{where}: not JSON ({error}).", hint=hint) from error
        if not isinstance(entry, dict) or not isinstance(entry.get("text"), str):
            raise SpecDefError(f'{where}: no string under "text".', hint=hint)
        yield entry["text"]


def _tokenize(documents: Sequence[str], tokenizer: Any) -> list[int]:
    """Return the tokens of all documents in one list, with an end token after each."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids: list[int] = []
    for document in documents:
        # verbose=False: a document longer than the model's context is expected here, and cut into windows below.
        ids += tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        ids += end
    return ids


def _too_short_hint(text_or_path: object, available: int) -> str:
    """Return what to do about a text that is too short."""
    if isinstance(text_or_path, str) and text_or_path.endswith((".txt", ".jsonl")):
        return "A str is taken as the text itself: pass pathlib.Path(…) to read a file."
    if available:
        return f"Ask for at most {available} batches, shorter windows, or pass a longer text."
    return "Ask for smaller batches or shorter windows, or pass a longer text."
