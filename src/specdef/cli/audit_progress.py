"""Progress of an audit on stderr: a bar on a terminal, lines elsewhere, both with the time left."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from specdef.cli.common import say
from specdef.cli.training_progress import duration

if TYPE_CHECKING:
    from specdef.audit.sweeps import Progress

_LINE_SECONDS = 10.0


@contextmanager
def audit_view() -> Iterator[Callable[[Progress], None]]:
    """Show progress until the block ends.

    Yields:
        What is told of every run.
    """
    began = time.monotonic()
    if not sys.stderr.isatty():
        yield _Lines(began)
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bar

    columns = (BarColumn(bar_width=20), TextColumn("{task.fields[left]}"), TextColumn("{task.description}", markup=False))  # fmt: skip
    console = Console(stderr=True)
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task("before the first attack", total=None, left="")

        def show(progress: Progress) -> None:
            left = time_left(progress, time.monotonic() - began)
            room = max(console.width - 24 - len(left), 20)  # rich would shorten every column alike
            bar.update(
                task, completed=done(progress), total=progress.cells, left=left,
                description=describe(progress)[:room],
            )  # fmt: skip

        yield show


class _Lines:
    """Says a line when another cell begins, and every few seconds."""

    def __init__(self, began: float) -> None:
        self._began, self._last, self._cell = began, 0.0, -1

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        if progress.cell == self._cell and now - self._last < _LINE_SECONDS:
            return
        self._last, self._cell = now, progress.cell
        left = time_left(progress, now - self._began)
        say(f"audit: {describe(progress)}{'; ' if left else ''}{left}")


def done(progress: Progress) -> float:
    """Return cells that are done, the one under way as a half."""
    return max(progress.cell - 0.5, 0.0)


def time_left(progress: Progress, elapsed: float) -> str:
    """Say how long the rest takes, if its cells take as long as those so far.

    Args:
        progress: The run that has ended.
        elapsed: Seconds since the audit began.

    Returns:
        A few words; none before the first cell.
    """
    if not done(progress):
        return ""
    return f"about {duration(elapsed / done(progress) * (progress.cells - done(progress)))} left"


def describe(progress: Progress) -> str:
    """Say what was run, and what came of it.

    Args:
        progress: The run that has ended.

    Returns:
        One line.
    """
    where = f"{progress.cell}/{progress.cells} {progress.attack} with {progress.optimizer}"
    if not progress.cell:
        where = "from-scratch reference"
    text = f"{where}, {progress.side}, seed {progress.seed}, rate {progress.learning_rate:.3g}: loss {progress.loss:.4g}"
    return text if progress.status == "finished" else f"{text} ({progress.status})"
