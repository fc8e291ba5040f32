"""Data that come with the package, by name: two texts, source code, arithmetic, and stand-ins for aligned behaviour."""

from __future__ import annotations

import importlib
import inspect
import json
from importlib import resources

import torch

from specdef.data.texts import TEXTS, load_text
from specdef.errors import SpecDefError

STAND_INS = ("declines", "formats", "declines+formats")
"""Harmless behaviour in the place of what an alignment taught: polite declines, and answers in the form asked for."""

NAMES = (*TEXTS, "python", "arithmetic", *STAND_INS)
"""Names of packaged data."""

MODULES = ("argparse", "dataclasses", "heapq", "textwrap")
"""Modules of the standard library whose source code is the text `python`."""

_SUMS = 2000


def packaged_rows(name: str) -> list[dict[str, str]]:
    """Return the rows of packaged data; `files/README.md` states where each comes from.

    Args:
        name: One of `NAMES`.

    Returns:
        One row with a "text", or rows with a "prompt" and a "completion".

    Raises:
        SpecDefError: No packaged data have that name.

    Example:
        >>> packaged_rows("arithmetic")[0]
        {'prompt': 'What is 62 times 10?', 'completion': '62 times 10 is 620.'}
    """
    if name in TEXTS:
        return [{"text": load_text(name)}]
    if name == "python":
        return [{"text": python_source()}]
    if name == "arithmetic":
        return arithmetic(_SUMS, seed=0)
    if name not in STAND_INS:
        raise SpecDefError(
            f"No packaged data are named {name!r}.", hint=f"Use one of {', '.join(NAMES)}."
        )
    folder = resources.files("specdef.data") / "files"
    lines = [
        line
        for part in name.split("+")
        for line in (folder / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    return [json.loads(line) for line in lines]


def python_source() -> str:
    """Return the source code of `MODULES`, one after the other: it differs between versions of Python."""
    return "\n".join(inspect.getsource(importlib.import_module(name)) for name in MODULES)


def arithmetic(count: int, *, seed: int) -> list[dict[str, str]]:
    """Make questions of arithmetic with their answers, no question twice.

    Args:
        count: Rows, 10,000 at most.
        seed: Decides which.

    Returns:
        Rows with a "prompt" and a "completion".

    Raises:
        ValueError: `count` is out of range.
    """
    if not 0 <= count <= 10_000:
        raise ValueError(f"count must be in 0..10000, got {count}.")
    generator = torch.Generator().manual_seed(seed)
    rows: dict[str, str] = {}
    while len(rows) < count:
        a, b, kind = (int(torch.randint(n, (), generator=generator)) for n in (98, 98, 3))
        a, b = a + 2, b + 2
        if kind == 2:
            b = b % 9 + 2  # products that a person knows
        word = ("plus", "minus", "times")[kind]
        result = (a + b, a - b, a * b)[kind]
        rows[f"What is {a} {word} {b}?"] = f"{a} {word} {b} is {result}."
    return [{"prompt": prompt, "completion": answer} for prompt, answer in rows.items()]
