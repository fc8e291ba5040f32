"""`specdef lock --search`: halves of the calibration text, the search with its progress, and the state of one that was stopped."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specdef.cli.audit_progress import describe
from specdef.cli.common import say
from specdef.cli.training_progress import duration
from specdef.errors import SpecDefError

if TYPE_CHECKING:
    from specdef.audit.design_records import DesignProgress, DesignSearch, DesignTrial
    from specdef.lock.config import LockConfig

STEPS = 10
"""Optimiser steps of a run unless told otherwise."""

HELDOUT = 4
"""One batch in so many of the proxy task is held out, at least one."""

_LINE_SECONDS = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """A search for a design as the command line asks for it.

    Args:
        folder: Model folder.
        out: Folder the lock is going to create; the state is kept beside it.
        base: The design to begin from.
        batches: Calibration batches: channels are chosen on the first half, attacks train on the rest.
        trials: Designs in all.
        steps: Optimiser steps of a run; None takes `STEPS`.
        device: Where attacks train.
        keep: Keep the state of the search until `forget`.

    Raises:
        SpecDefError: There are no batches, or the design is none that can be searched.
        ValueError: A number is below 1.
    """

    folder: Path
    out: Path
    base: LockConfig
    batches: Sequence[Any] | None
    trials: int | None
    steps: int | None = None
    device: str = "cpu"
    keep: bool = True

    def __post_init__(self) -> None:
        if self.trials is None:
            raise SpecDefError("--search-steps is an option of --search", hint="Say how many designs to try: --search N.")  # fmt: skip
        for name, value in (("--search", self.trials), ("--search-steps", self.steps)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if self.base.schedule != "covering":
            raise SpecDefError(
                f"--search is for designs of the covering schedule, not {self.base.schedule}",
                hint="Use --strength max.",
            )
        if not self.batches:
            raise SpecDefError(
                "a search attacks every design on text: it needs some",
                hint="Name it with --calibration FILE, or --calibration builtin.",
            )

    @property
    def state(self) -> Path:
        """Where an unfinished search is kept."""
        out = self.out if self.out.name else self.out.absolute()
        return out.with_name(f"{out.name}.search.journal")

    @property
    def calibration(self) -> list[Any]:
        """The batches channels are chosen on, in the search and in the lock."""
        batches = self.batches or ()
        return list(batches[: len(batches) // 2])

    def run(self) -> DesignSearch:
        """Search.

        Returns:
            What was found.

        Raises:
            SpecDefError: The output is taken, the state cannot be kept, or no design can be measured.
            Interrupted: By Ctrl-C; the trials so far were kept.
        """
        from specdef.attacks.task import Budget, Task
        from specdef.audit.design import ATTACKS, search_design
        from specdef.audit.storage import FAILURES
        from specdef.cli.lock_deformation import Interrupted
        from specdef.lock.load import load_model
        from specdef.lock.lock import open_lockable

        open_lockable(
            self.folder, self.out, self.base.method
        )  # refuses before the work what a lock would
        proxy = list(self.batches or ())[len(self.calibration) :]
        held = max(1, len(proxy) // HELDOUT)
        task = Task(name="proxy", train=proxy[:-held], heldout=proxy[-held:])
        steps = self.steps or STEPS
        try:
            with search_view() as progress:
                return search_design(
                    load_model(self.folder).to(self.device), task, self.base, calibration=self.calibration, trials=self.trials or 1,
                    seed=self.base.seed, attacks=ATTACKS, budget=Budget(steps=steps, evaluations=min(steps, 5)), storage=self.state if self.keep else None,
                    progress=progress,
                )  # fmt: skip
        except KeyboardInterrupt:
            if not self.keep:
                raise
            raise Interrupted(
                f"interrupted; the search so far is in {self.state}",
                hint="The same command goes on with it; remove the file to begin anew.",
            ) from None
        except FAILURES as error:
            raise SpecDefError(
                f"{self.state} cannot be read or written: {(str(error).splitlines() or [type(error).__name__])[0]}",
                hint="See to its disk, then go on with the same command.",
            ) from error

    def forget(self) -> None:
        """Remove the state."""
        for path in (self.state, self.state.with_name(f"{self.state.name}.lock")):
            path.unlink(missing_ok=True)


@contextmanager
def search_view() -> Iterator[Callable[[DesignProgress], None]]:
    """Show progress on stderr until the block ends: a line for every trial, and what is being run in between.

    Yields:
        What is told of every run and trial.
    """
    if not sys.stderr.isatty():
        yield _Lines(say)
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bar

    columns = (BarColumn(bar_width=20), TextColumn("{task.description}", markup=False))
    console = Console(stderr=True)
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task("before the first attack", total=None)
        lines = _Lines(lambda text: console.print(text, highlight=False, markup=False), every=math.inf)  # fmt: skip

        def show(progress: DesignProgress) -> None:
            lines(progress)
            text = describe(progress.run) if progress.run else ""
            bar.update(task, completed=progress.ended, total=progress.trials, description=text[: max(console.width - 24, 20)])  # fmt: skip

        yield show


class _Lines:
    """Says a line for every trial that ends, and one every few seconds of the runs in between."""

    def __init__(self, out: Callable[[str], None], every: float = _LINE_SECONDS) -> None:
        self._out, self._every, self._last = out, every, time.monotonic()
        self._best: DesignTrial | None = None
        self._seconds = 0.0

    def __call__(self, progress: DesignProgress) -> None:
        if progress.trial is not None:
            trial = progress.trial
            self._best = min((t for t in (self._best, trial) if t), key=lambda t: t.rank)
            self._seconds += trial.seconds
            self._out(f"search: {trial_line(progress, trial, self._best)}; {self._left(progress)}")
        elif progress.run and time.monotonic() - self._last > self._every:
            self._out(f"search: {progress.ended}/{progress.trials} designs; {describe(progress.run)}")  # fmt: skip
        else:
            return
        self._last = time.monotonic()

    def _left(self, progress: DesignProgress) -> str:
        rest = progress.trials - progress.ended
        return f"about {duration(self._seconds / progress.ended * rest)} left" if rest else "done"


def trial_line(progress: DesignProgress, trial: DesignTrial, best: DesignTrial) -> str:
    """Say what a trial was, and what came of it.

    Args:
        progress: How far the search is.
        trial: The trial.
        best: The best one so far.

    Returns:
        One line.
    """
    config = trial.config
    design = f"top 2^{math.log2(config.top):.0f}, gap {config.gap}, slack {config.slack}, sides {config.sides}, {config.channel}"  # fmt: skip
    shares = ", ".join(f"{name} {share:.2%}" for name, share in trial.recovered.items())
    outcome = f"not measured ({trial.reason})" if trial.reason else f"{shares} recovered"
    so_far = "none so far" if best.reason else f"best {best.worst:.2%}"
    return f"{progress.ended}/{progress.trials} {design}: {outcome}; {so_far}"
