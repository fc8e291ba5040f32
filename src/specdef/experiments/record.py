"""What an experiment leaves behind: a JSON record with its claims, and a figure, each written whole or not at all."""

from __future__ import annotations

import itertools
import json
import math
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy
import torch
from matplotlib.figure import Figure

import specdef
from specdef.weights.atomic import atomic_file

Progress = Callable[[str], None]

_LISTS = re.compile(r"\[\n[^\[\]{}]*\n *\]")
"""Innermost lists, one number to a line; they are put on one line."""
_BREAKS = re.compile(r"\n *")


def claim(text: str, held: bool, **numbers: Any) -> dict[str, Any]:
    """State a claim and whether the numbers bear it out.

    Args:
        text: The claim, one sentence.
        held: Computed from the numbers.
        numbers: What decides it.

    Returns:
        One entry of a record's `claims`.
    """
    return {"claim": text, "held": bool(held), "numbers": numbers}


def versions() -> dict[str, str]:
    """Return the versions that decide the numbers."""
    return {
        "specdef": specdef.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "matplotlib": matplotlib.__version__,
    }


def make_record(
    experiment: str,
    options: Mapping[str, Any],
    *,
    seconds: float,
    claims: Sequence[Mapping[str, Any]],
    data: Any,
    **more: Any,
) -> dict[str, Any]:
    """Put a record together.

    Args:
        experiment: Name of the module whose `run` made it.
        options: What `run` was called with besides the folder.
        seconds: Wall time.
        claims: As `claim` makes them.
        data: The numbers.
        more: Further entries.

    Returns:
        JSON values: command, the options, versions, the further entries, seconds, claims, a summary of one line per claim, data.
    """
    values = {n: tuple(v) if isinstance(v, Sequence) and not isinstance(v, str) else v for n, v in options.items()}  # fmt: skip
    arguments = "".join(f", {name}={value!r}" for name, value in values.items())
    return dict(
        plain(
            {
                "command": f"specdef.experiments.{experiment}.run(out{arguments})",
                **options,
                "versions": versions(),
                **more,
                "seconds": round(seconds, 2),
                "claims": claims,
                "summary": [f"{'held' if c['held'] else 'NOT held'}: {c['claim']}" for c in claims],
                "data": data,
            }
        )
    )


def write_record(out: Path, name: str, record: Mapping[str, Any], figure: Figure) -> None:
    """Write NAME.json, NAME.png and NAME.md.

    Args:
        out: Folder; made if absent.
        name: Of the experiment.
        record: JSON values; infinite and undefined numbers become null.
        figure: Drawn with the object interface of matplotlib.
    """
    out.mkdir(parents=True, exist_ok=True)
    with atomic_file(out / f"{name}.png") as path:
        figure.savefig(path, dpi=120, format="png")
    text = _LISTS.sub(lambda found: _BREAKS.sub(" ", found[0]), json.dumps(plain(record), indent=1, allow_nan=False))  # fmt: skip
    with atomic_file(out / f"{name}.json") as path:
        path.write_text(text + "\n", encoding="utf-8")
    with atomic_file(out / f"{name}.md") as path:
        path.write_text(markdown(name, plain(record)), encoding="utf-8")


def markdown(name: str, record: Mapping[str, Any]) -> str:
    """Return a record as a page for people.

    Args:
        name: Of the experiment.
        record: As `make_record` makes it; `comparisons` (of `paper.verdicts`) and `table` are optional.

    Returns:
        Markdown: command and versions, the papers' numbers beside ours, claims, tables, the figure.
    """
    used = ", ".join(f"{n} {v}" for n, v in record.get("versions", {}).items())
    lines = [f"# {name}", "", f"`{record.get('command', name)}`: {record['seconds']:.0f} s{f' ({used})' if used else ''}.", ""]  # fmt: skip
    if comparisons := record.get("comparisons"):
        lines += ["## The paper's numbers beside ours", "", *comparison_table(comparisons), ""]
    said = {c["quantity"] for c in comparisons or ()}
    claims = [c for c in record["claims"] if c["claim"].split(": the paper has")[0] not in said]
    if claims:
        lines += ["## Claims", ""]
        lines += [f"- {'held' if c['held'] else '**NOT held**'}: {c['claim']}" for c in claims] + [""]  # fmt: skip
    if table := record.get("table"):
        lines += ["## Tables", ""]
        for before, line in itertools.pairwise(["", *table]):
            between = bool(line and before) and not (line.startswith("|") and before.startswith("|"))  # fmt: skip
            lines += [""] * between + [line]
        lines.append("")
    lines.append(f"![{name}]({name}.png)")
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)) + "\n"


def comparison_table(comparisons: Sequence[Mapping[str, Any]]) -> list[str]:
    """Write numbers of a paper beside ours as a table in Markdown.

    Args:
        comparisons: As `paper.verdicts.comparison` makes them.

    Returns:
        Lines.
    """
    lines = ["| what | paper | here | verdict |", "|---|---|---|---|"]
    for c in comparisons:
        what = c["quantity"] + (f" ({c['note']})" if c["note"] else "")
        lines.append(f"| {what} | {c['paper']} | {c['ours']} | {c['verdict']} |")
    return lines


def plain(value: Any) -> Any:
    """Return a value with infinite and undefined numbers replaced by None, at any depth."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """Fit y ~ x^p by least squares in logarithms.

    Args:
        x: Positive.
        y: Positive.

    Returns:
        p; nan with fewer than two points.

    >>> round(exponent([1.0, 10.0, 100.0], [2.0, 200.0, 20000.0]), 12)
    2.0
    """
    if len(x) < 2:
        return math.nan
    return float(numpy.polyfit(numpy.log(x), numpy.log(y), 1)[0])
