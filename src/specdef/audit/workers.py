"""Which worker runs a trial, and whether it is still alive: a killed one must not hold its rate for ever."""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

BEAT_SECONDS = 20.0
"""A running trial says this often that it is alive."""

SILENCE_SECONDS = 300.0
"""A trial of another machine that was silent for so long is dead."""

ORPHAN_SECONDS = 30.0
"""A trial that nobody has claimed for so long is dead: its worker fell between taking a number and writing its name."""

_ACTIVE: set[str] = set()


def _machine() -> str:
    """Name the set of processes among which a process id means something; empty where the system does not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> str:
    """Return when a process started, in clock ticks; empty where there is none. Process ids are used again, pairs are not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
        fields = stat.rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in ("Z", "X") else fields[19]


@contextmanager
def claim(trial: optuna.Trial) -> Iterator[None]:
    """Hold a trial: write who runs it, and go on saying so until it ends.

    Args:
        trial: The trial.

    Yields:
        Nothing.
    """
    token = uuid.uuid4().hex
    owner = {"machine": _machine(), "pid": os.getpid(), "started": _started(os.getpid()), "token": token}  # fmt: skip
    _ACTIVE.add(token)
    trial.set_user_attr("worker", owner)
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(BEAT_SECONDS):
            try:
                trial.set_user_attr("beat", time.time())
            except optuna.exceptions.UpdateFinishedTrialError:  # given up on by another worker
                return
            except Exception:
                continue  # a full disk, or a database that is gone for a while: the run itself will tell

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        _ACTIVE.discard(token)


class Watchman:
    """Tells dead trials from running ones, by what it sees itself: clocks of machines differ.

    Args:
        silence: Seconds after which a silent trial of another machine is dead.
        orphan: Seconds after which an unclaimed trial is dead.
    """

    def __init__(self, silence: float = SILENCE_SECONDS, orphan: float = ORPHAN_SECONDS) -> None:
        self.silence = silence
        self.orphan = orphan
        self._seen: dict[int, tuple[object, float]] = {}

    def dead(self, trial: FrozenTrial) -> bool:
        """Tell whether the worker of a running trial is gone.

        Args:
            trial: A running trial.

        Returns:
            True at once for a process of this machine that is gone; after a time of silence for others.
        """
        owner: Mapping[str, Any] | None = trial.user_attrs.get("worker")
        if owner and owner["machine"] and owner["machine"] == _machine():
            if owner["pid"] == os.getpid() and owner["started"] == _started(os.getpid()):
                return owner["token"] not in _ACTIVE
            return _started(int(owner["pid"])) != str(owner["started"])
        sign = (bool(owner), trial.user_attrs.get("beat"))
        last, since = self._seen.get(trial.number, (None, 0.0))
        if last != sign:
            self._seen[trial.number] = (sign, time.monotonic())
            return False
        limit = self.silence if owner else self.orphan
        return time.monotonic() - since > limit

    def bury(self, study: optuna.Study) -> None:
        """Fail the running trials whose workers are gone, so that their rates are tried again.

        Args:
            study: The study.
        """
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if self.dead(trial):
                with suppress(
                    optuna.exceptions.UpdateFinishedTrialError
                ):  # another worker was faster
                    study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
