"""The table of results in README: every number of a paper beside ours, from the committed records.

`python -m specdef.experiments.paper.results docs/results` prints it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from specdef.experiments.paper.locks import ABSORBED, COMPENSATED, LOCKS
from specdef.experiments.paper.verdicts import HELD

TARGETS = (
    "figure1", "figure2", "figure3", "figure4", "table1-vision", "table1-text", "table2", "table3", "limits", "collapse",
)  # fmt: skip
"""The experiments of the papers, in their order."""


def results_table(records: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Put the comparisons of several records into one table, what is said of several locks in one row.

    Args:
        records: Name of the experiment to its record.

    Returns:
        Lines of Markdown: the command, the quantity, the paper's number, ours with its verdict, for the paper's lock (or without one)
        and for the two others. A dagger says that the record has a note.
    """
    lines = [
        f"| command | what | paper | here; under the paper's lock | {COMPENSATED} | {ABSORBED} |",
        "|---" * 6 + "|",
    ]
    for name, record in records.items():
        rows: dict[str, dict[str, Mapping[str, Any]]] = {}
        for c in record["comparisons"]:
            lock = next((lock for lock in (COMPENSATED, ABSORBED) if lock in c["quantity"]), "")
            rows.setdefault(_without_lock(c["quantity"]), {})[lock] = c
        for i, (quantity, found) in enumerate(rows.items()):
            command = "" if i else f"[`{name}`](docs/results/{name}.md)"
            paper = next(iter(found.values()))["paper"]
            cells = [_cell(found.get(lock)) for lock in ("", COMPENSATED, ABSORBED)]
            lines.append(f"| {command} | {quantity} | {paper} | {' | '.join(cells)} |")
    return lines


def _cell(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    verdict = found["verdict"] if found["verdict"] == HELD else f"**{found['verdict']}**"
    return f"{verdict}{'†' if found['note'] else ''}: {found['ours']}"


def _without_lock(quantity: str) -> str:
    """Return a quantity without the name of the lock it is about.

    >>> _without_lock("cars relearned under the lock: absorbed max")
    'cars relearned under the lock'
    """
    for lock in LOCKS:
        for words in (f", lock: {lock}", f": {lock}", f", {lock}", lock):
            quantity = quantity.replace(words, "")
    return " ".join(quantity.split()).strip(" ,:")


def read_records(folder: Path, names: Iterable[str] = TARGETS) -> dict[str, dict[str, Any]]:
    """Read committed records.

    Args:
        folder: Where they lie.
        names: Of the experiments.

    Returns:
        Name to record.
    """
    return {name: json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in names}  # fmt: skip


if __name__ == "__main__":
    print("\n".join(results_table(read_records(Path(sys.argv[1])))))
