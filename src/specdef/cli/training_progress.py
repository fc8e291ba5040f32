"""Progress of a deformation lock on stderr: a bar on a terminal, lines elsewhere, and a line per evaluation on both."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from specdef.cli.common import say

if TYPE_CHECKING:
    from specdef.lock.deformation.records import Progress, Snapshot

_LINE_SECONDS = 10.0


class View(Protocol):
    """What is told how far the lock is."""

    def training(self, progress: Progress) -> None:
        """Show a step."""
        ...

    def bytes(self, done: int, total: int) -> None:
        """Show how much was written."""
        ...

    def status(self, text: str) -> None:
        """Show what begins now."""
        ...


@contextmanager
def training_view() -> Iterator[View]:
    """Show progress on stderr until the block ends.

    Yields:
        The view.
    """
    if not sys.stderr.isatty():
        yield _Lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("lock: {task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[note]}"))  # fmt: skip
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        yield _Bar(bar)


class _Lines:
    def __init__(self) -> None:
        self._last = time.monotonic()

    def training(self, progress: Progress) -> None:
        if progress.snapshot is not None:
            say(evaluation(progress.snapshot, progress))
        elif time.monotonic() - self._last < _LINE_SECONDS:
            return
        else:
            say(f"  step {progress.step}/{progress.steps}: {_note(progress)}")
        self._last = time.monotonic()

    def bytes(self, done: int, total: int) -> None:
        if time.monotonic() - self._last > _LINE_SECONDS:
            self._last = time.monotonic()
            say(f"lock: {done / max(total, 1):.0%}")

    def status(self, text: str) -> None:
        say(f"lock: {text}")


class _Bar:
    def __init__(self, bar: Any) -> None:
        self._bar, self._task = bar, bar.add_task("", total=None, note="")

    def training(self, progress: Progress) -> None:
        note = f"{progress.step}/{progress.steps}  {_note(progress)}"
        self._bar.update(self._task, completed=progress.step, total=progress.steps, note=note)
        if progress.snapshot is not None:
            self._bar.console.print(evaluation(progress.snapshot, progress), highlight=False)

    def bytes(self, done: int, total: int) -> None:
        self._bar.update(self._task, completed=done, total=total, note="")

    def status(self, text: str) -> None:
        self._bar.update(self._task, description=text, completed=0, total=None, note="")


def evaluation(snapshot: Snapshot, progress: Progress) -> str:
    """Return the line of an evaluation.

    Args:
        snapshot: What was measured.
        progress: When.
    """
    loss = "-" if snapshot.train_loss is None else f"{snapshot.train_loss:.4g}"
    return (
        f"  step {snapshot.step}/{progress.steps}, epoch {snapshot.epoch:.3g}: train loss {loss}, held-out loss "
        f"{snapshot.retain_loss:.4g}, utility {snapshot.utility:.4g}, sigma_max {snapshot.sigma_max:.4g}, growth "
        f"{snapshot.growth:.4g}, {_left(progress)}"
    )


def _note(progress: Progress) -> str:
    loss = "-" if progress.train_loss is None else f"{progress.train_loss:.4g}"
    return f"retain loss {loss}, sigma_max {progress.sigma_max:.4g}, {_left(progress)}"


def _left(progress: Progress) -> str:
    if progress.seconds_left is None:
        return "-"
    return f"{duration(progress.seconds_left)} left"


def duration(seconds: float) -> str:
    """Write a time as people read it: 42 s, 3:05 min, 1:02 h."""
    if seconds < 100:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02} min" if minutes < 100 else f"{minutes // 60}:{minutes % 60:02} h"
