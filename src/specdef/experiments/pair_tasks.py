"""The tasks of the papers' text experiments, and what stands in for those that cannot be had."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from specdef.data.pairs import WORDNET, Row, gloss_pairs, read_pairs, verse_pairs
from specdef.errors import SpecDefError
from specdef.experiments.paper.data_files import data_file

OWN, RTE, VERSES, GLOSSES = "MRPC", "RTE", "verses (for QQP)", "glosses (for QNLI)"
EASY = "verses, any other"
"""Short verses with any other for a wrong pair: easier than the paper's tasks, and learned in few steps."""

BY_F1 = (OWN, VERSES, EASY)
"""Tasks scored with F1, as the paper scores MRPC and QQP; others with accuracy."""

FILES = {OWN: "mrpc.jsonl", RTE: "rte.jsonl"}
EASY_WORDS = 14
_LETTERS = (("abcdef", "uvwxyz"), ("ghijkl", "mnopqr"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """The tasks' rows.

    Args:
        rows: Task -> split -> rows.
        left_out: Task -> why it is not run.
    """

    rows: Mapping[str, Mapping[str, Sequence[Row]]]
    left_out: Mapping[str, str] = field(default_factory=dict)


def read_tasks(
    data: Path | None, tasks: Sequence[str], *, made: bool = False, seed: int = 0
) -> Pairs:
    """Read MRPC and other tasks.

    Args:
        data: Folder with the files of `FILES`; WordNet may be in its folder `wordnet`.
        tasks: Besides MRPC.
        made: Make pairs of random words in their place, which need no files.
        seed: Of what is drawn.

    Returns:
        The rows; stand-ins whose packages are not installed are left out.

    Raises:
        SpecDefError: A file is missing or cannot be read.
    """
    if made:
        return Pairs(rows={task: made_pairs(seed, _LETTERS[task != OWN]) for task in (OWN, *tasks)})
    rows: dict[str, Mapping[str, Sequence[Row]]] = {}
    left_out: dict[str, str] = {}
    for task in (OWN, *tasks):
        if task in FILES:
            rows[task] = read_pairs(data_file(data, FILES[task], task))
        else:
            try:
                rows[task] = _stand_in(task, data, seed)
            except SpecDefError as error:
                left_out[task] = f"{error} {error.hint}"
    return Pairs(rows=rows, left_out=left_out)


def _stand_in(task: str, data: Path | None, seed: int) -> dict[str, list[Row]]:
    if task == VERSES:
        return verse_pairs(seed)
    if task == EASY:
        return verse_pairs(seed, most_words=EASY_WORDS, near=False)
    own = (data or Path()) / "wordnet"
    return gloss_pairs(own if data is not None and own.is_dir() else WORDNET, seed)


def made_pairs(seed: int, letters: tuple[str, str], *, count: int = 240) -> dict[str, list[Row]]:
    """Make pairs that anything learns: the second text is of other letters than the first where the label is 1.

    Args:
        seed: Decides them.
        letters: Those of the first text, and the others.
        count: Rows; a third is for testing.

    Returns:
        Rows by split: train and test.
    """
    draws = torch.Generator().manual_seed(seed)

    def word(letters: str) -> str:
        return "".join(letters[i] for i in torch.randint(len(letters), (4,), generator=draws).tolist())  # fmt: skip

    rows: list[Row] = []
    for _ in range(count):
        label = int(torch.randint(2, (), generator=draws))
        rows.append({"text": word(letters[0]), "text_pair": word(letters[label]), "label": label})
    return {"train": rows[: 2 * count // 3], "test": rows[2 * count // 3 :]}
