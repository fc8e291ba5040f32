"""How an experiment of the papers ends: its record is written, and what was kept for resuming it is removed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from specdef.experiments.kept import Kept
from specdef.experiments.paper.verdicts import claims_of
from specdef.experiments.record import make_record, write_record


def conclude(
    out: Path,
    name: str,
    kept: Kept,
    *,
    options: Mapping[str, Any],
    seconds: float,
    comparisons: Sequence[Mapping[str, Any]],
    table: Sequence[str],
    settings: Mapping[str, Any],
    data: Mapping[str, Any],
    figure: Figure,
) -> dict[str, Any]:
    """Write NAME.json, NAME.md and NAME.png, then forget the state.

    Args:
        out: Folder; made if absent.
        name: Of the experiment, as on the command line.
        kept: Its state.
        options: What `run` was called with; a folder of data is named DIR, as it is the user's own.
        seconds: Wall time.
        comparisons: As `verdicts.comparison` makes them.
        table: Lines of Markdown.
        settings: What decides the numbers.
        data: The numbers.
        figure: Their drawing.

    Returns:
        The record, as JSON values.
    """
    named = {n: "DIR" if isinstance(v, Path) else v for n, v in options.items()}
    record = make_record(
        name.replace("-", "_"), named, seconds=seconds, claims=claims_of(comparisons), comparisons=comparisons, table=table,
        settings=settings, data=data,
    )  # fmt: skip
    write_record(out, name, record, figure)
    kept.forget()
    return record
