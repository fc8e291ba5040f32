"""Studies: shared without duplicates, killed without losses, kept without a word on the terminal."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState
from tests import audit_toys as toys

from specdef.attacks.run import Run
from specdef.audit.grid import Sweep, Tried, outcomes
from specdef.audit.sampler import PARAMETER, RANGE, RETRIES
from specdef.audit.storage import drop_unfinished_line, open_storage, silent_optuna
from specdef.audit.study import facts, json_safe, run_from_json, run_study
from specdef.audit.workers import Watchman
from specdef.errors import SpecDefError

TOYS = Path(toys.__file__)


def alone(storage: object = None, name: str = "study", sweep: Sweep = toys.SWEEP) -> list[Run]:
    found = run_study(storage, name, sweep, toys.bowl_run, start=1.0, initial=1.0, steps=4)  # type: ignore[arg-type]
    return list(found.runs)


def written(runs: list[Run]) -> list[str]:
    """Runs as text: nan differs from itself."""
    return [repr(run) for run in runs]


def start(storage: str | Path, log: Path, pause: float = 0.05) -> subprocess.Popen[bytes]:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join((str(TOYS.parents[1]), os.environ.get("PYTHONPATH", "")))
    }
    return subprocess.Popen([sys.executable, str(TOYS), str(storage), str(log), json.dumps(pause)], env=environment)  # fmt: skip


def rates(path: Path) -> list[float]:
    return [float(line) for line in path.read_text().split()] if path.exists() else []


def wait_for(count: int, log: Path, *workers: subprocess.Popen[bytes]) -> None:
    """Wait until so many runs have begun."""
    while len(rates(log)) < count:
        assert all(worker.poll() is None for worker in workers)
        time.sleep(0.01)


def trials(storage: str | Path) -> list[optuna.trial.FrozenTrial]:
    with silent_optuna():
        return optuna.load_study(study_name="study", storage=open_storage(storage)).trials


def test_a_sweep_runs_every_rate_once_and_keeps_the_runs(tmp_path: Path) -> None:
    first = alone(tmp_path / "audit.log")
    assert [r.setting.learning_rate for r in first] == sorted(
        {r.setting.learning_rate for r in first}
    )
    assert min(r.best for r in first) < 0.15
    before = len(trials(tmp_path / "audit.log"))
    again = alone(tmp_path / "audit.log")
    assert written(again) == written(
        first
    )  # read back to the last digit, infinite losses among them
    assert len(trials(tmp_path / "audit.log")) == before == len(first)  # nothing is left to do
    assert any(math.isinf(r.losses[-1]) for r in first) and any(r.status == "pruned" for r in first)


def test_nothing_is_printed_and_optunas_own_setting_comes_back(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = optuna.logging.get_verbosity()
    alone(tmp_path / "audit.log")
    assert optuna.logging.get_verbosity() == before
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_an_error_in_a_run_is_told_and_the_rate_is_tried_again() -> None:
    storage = open_storage(None)

    def fail(rate: float, watch: object) -> Run:
        raise SpecDefError("no memory", hint="x")

    with pytest.raises(SpecDefError, match="no memory"):
        run_study(storage, "study", toys.SWEEP, fail, start=1.0, initial=1.0, steps=4)
    assert written(alone(storage)) == written(alone())


def test_a_rate_lost_with_its_worker_is_run_though_the_search_has_gone_on() -> None:
    storage = open_storage(None)
    complete = alone(storage)
    between = 2.34e-3  # of no grid: the search itself would never come back to it
    with silent_optuna():
        study = optuna.load_study(study_name="study", storage=storage)
        study.add_trial(
            optuna.trial.create_trial(
                state=TrialState.FAIL, params={PARAMETER: between}, distributions={PARAMETER: RANGE}
            )
        )
    again = alone(storage)
    assert {r.setting.learning_rate for r in again} == {between} | {
        r.setting.learning_rate for r in complete
    }


def test_a_run_survives_json() -> None:
    run = toys.run_at(1e-3, (1.0, math.inf), relative_change=math.inf, notes=("a",))
    text = json.dumps(json_safe(run.to_dict()), allow_nan=False)
    back = run_from_json(json.loads(text))
    assert back.losses == run.losses and back.relative_change == math.inf
    assert math.isnan(back.accuracies[0]) and back.setting == run.setting


@pytest.mark.parametrize("left", [b"", b"{}\n", b"{}\n{}\n"])
@pytest.mark.parametrize("torn", [b"", b'{"op_code":4', b"x" * 200_000])
def test_a_line_that_a_killed_process_left_is_cut_off(
    tmp_path: Path, left: bytes, torn: bytes
) -> None:
    path = tmp_path / "journal"
    path.write_bytes(left + torn)
    drop_unfinished_line(path)
    assert path.read_bytes() == left


def test_a_torn_journal_is_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "audit.log"
    complete = alone(path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[: len(lines) // 2]) + lines[len(lines) // 2][:20])
    # The trial that was running here belongs to this very process, which does not run it any more.
    assert written(alone(path)) == written(complete)


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    yield tmp_path / "audit.log", tmp_path / "rates"


def check_shared(storage: str | Path, log: Path, killed: int) -> None:
    """Assert that nothing was run twice but what a killed worker had begun, and that nothing is missing."""
    done = [t for t in trials(storage) if t.state in (TrialState.COMPLETE, TrialState.PRUNED) and PARAMETER in t.params]  # fmt: skip
    assert max(Counter(t.params[PARAMETER] for t in done).values()) == 1
    twice = [rate for rate, times in Counter(rates(log)).items() if times > 1]
    assert len(twice) <= killed
    failed = [t for t in trials(storage) if t.state is TrialState.FAIL]
    assert len(failed) <= killed
    assert not [t for t in trials(storage) if t.state is TrialState.RUNNING]
    best = min(t.user_attrs["tried"]["best"] for t in done)
    assert best <= min(run.best for run in alone()) + 0.01
    assert set(rates(log)) == {t.params[PARAMETER] for t in done}


def test_two_workers_share_a_file_and_one_is_killed(shared: tuple[Path, Path]) -> None:
    storage, log = shared
    workers = [start(storage, log) for _ in range(2)]
    wait_for(5, log, *workers)
    workers[0].send_signal(signal.SIGKILL)
    assert workers[0].wait() == -signal.SIGKILL
    assert workers[1].wait(60) == 0
    check_shared(storage, log, killed=1)


def test_many_workers_end_together(shared: tuple[Path, Path]) -> None:
    storage, log = shared
    workers = [start(storage, log, 0.1) for _ in range(4)]
    assert [worker.wait(60) for worker in workers] == [0] * 4
    check_shared(storage, log, killed=0)
    assert len([t for t in trials(storage) if PARAMETER not in t.params]) <= 12


def test_a_killed_study_is_resumed_and_loses_the_running_trial_alone(
    shared: tuple[Path, Path],
) -> None:
    storage, log = shared
    worker = start(storage, log)
    wait_for(4, log, worker)
    worker.kill()
    worker.wait()
    before = {t.params[PARAMETER] for t in trials(storage) if t.state is not TrialState.RUNNING}
    assert len(before) >= 3
    began = len(rates(log))
    assert start(storage, log, 0.0).wait(60) == 0
    assert not before & set(rates(log)[began:])  # what was done is not done again
    check_shared(storage, log, killed=1)


def test_a_silent_trial_of_another_machine_is_dead_after_a_while() -> None:
    with silent_optuna():
        study = optuna.create_study()
        trial = study.ask()
        trial.set_user_attr(
            "worker", {"machine": "elsewhere", "pid": 1, "started": "1", "token": "x"}
        )
        watchman = Watchman(silence=0.05)
        assert not watchman.dead(study.trials[0])
        trial.set_user_attr("beat", 1.0)
        time.sleep(0.1)
        assert not watchman.dead(study.trials[0])  # it has spoken since
        time.sleep(0.1)
        watchman.bury(study)
        assert study.trials[0].state is TrialState.FAIL


def test_a_rate_that_kills_its_workers_is_given_up() -> None:
    storage = open_storage(None)

    def deadly(rate: float, watch: Callable[[int, float], None]) -> Run:
        if rate > 0.5e-3:
            raise SpecDefError("killed", hint="x")
        return toys.bowl_run(rate, watch)

    for _ in range(20):
        try:
            found = run_study(storage, "study", toys.SWEEP, deadly, start=1.0, initial=1.0, steps=4)
            break
        except SpecDefError:
            continue
    assert found.lost >= 4 and max(r.setting.learning_rate for r in found.runs) < 0.5e-3


def test_a_run_that_was_stopped_by_hand_says_nothing_of_its_rate() -> None:
    storage = open_storage(None)

    def stopped(rate: float, watch: Callable[[int, float], None]) -> Run:
        raise KeyboardInterrupt

    for _ in range(RETRIES + 1):
        with pytest.raises(KeyboardInterrupt):
            run_study(storage, "study", toys.SWEEP, stopped, start=1.0, initial=1.0, steps=4)
    assert written(alone(storage)) == written(alone())


def test_a_disk_that_is_full_is_told_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = open_storage(tmp_path / "audit.log")

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def fill(rate: float, watch: Callable[[int, float], None]) -> Run:
        monkeypatch.setattr("optuna.storages.journal.JournalFileBackend.append_logs", full)
        return toys.bowl_run(rate, watch)

    with pytest.raises(OSError, match="No space left"):
        run_study(storage, "study", toys.SWEEP, fill, start=1.0, initial=1.0, steps=4)
    monkeypatch.undo()
    assert written(alone(tmp_path / "audit.log")) == written(alone())


def test_a_file_system_that_knows_no_locks_is_told_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("specdef.audit.storage.fcntl.flock", refuse)
    with pytest.raises(OSError, match="No locks available"):
        alone(tmp_path / "audit.log")


@pytest.mark.parametrize(
    ("storage", "message"),
    [("nonsense://x", "address"), ("/dev/null/x", "cannot be used")],
)
def test_storage_that_cannot_be_used_is_refused(storage: str, message: str) -> None:
    with pytest.raises(SpecDefError, match=message) as caught:
        open_storage(storage)
    assert caught.value.hint


def test_a_file_that_is_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n\x00\x00\n")
    with pytest.raises(SpecDefError, match="cannot be used"):
        open_storage(path)
    assert path.read_bytes().startswith(b"\x89PNG")


def binaries() -> Path | None:
    """Return the folder of PostgreSQL's programs; Debian's package puts it on no path."""
    found = shutil.which("pg_ctl")
    places = [Path(found).resolve()] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"))  # fmt: skip
    return places[-1].parent if places else None


@contextmanager
def database() -> Iterator[str]:
    """Start a PostgreSQL server of its own that listens on a socket alone; it refuses to run as root."""
    account = {"user": "nobody"} if os.getuid() == 0 else {}
    folder = Path(tempfile.mkdtemp(prefix="pg-"))

    def call(*command: str) -> None:
        path = {"PATH": f"{binaries()}:{os.environ['PATH']}", "LC_ALL": "C"}
        subprocess.run(
            command,
            check=True,
            stdout=subprocess.DEVNULL,
            cwd=folder,
            env=os.environ | path,
            **account,
        )  # type: ignore[call-overload]

    try:
        if account:
            shutil.chown(folder, "nobody")
        data = str(folder / "data")
        call("initdb", "-D", data, "-U", "auditor", "-A", "trust", "-N", "-E", "UTF8")
        call("pg_ctl", "-D", data, "-w", "-l", str(folder / "log"), "-o", f"-k {folder} -c listen_addresses='' -F", "start")  # fmt: skip
        try:
            yield f"postgresql+psycopg://auditor@/postgres?host={folder}"
        finally:
            call("pg_ctl", "-D", data, "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(folder)


@pytest.mark.skipif(binaries() is None, reason="PostgreSQL is not installed")
def test_two_workers_share_a_database_and_one_is_killed(tmp_path: Path) -> None:
    pytest.importorskip("psycopg")
    with database() as url:
        log = tmp_path / "rates"
        workers = [start(url, log, 0.1) for _ in range(2)]
        wait_for(5, log, *workers)
        workers[0].kill()
        workers[0].wait()
        assert workers[1].wait(60) == 0
        check_shared(url, log, killed=1)


def test_a_run_that_moves_only_the_scaled_channels_has_moved() -> None:
    """Of 576 channels a lock scales one: at the rate that trains it all others round to what they were."""
    few = toys.run_at(1e-11, (2.0, 1.9), swamped=0.998, relative_change=1e-12)
    none = toys.run_at(1e-30, (2.0, 2.0), swamped=1.0, relative_change=0.0)
    assert [facts(r, {}, start=2.0, steps=1)["still"] for r in (few, none)] == [False, True]
    tried = [
        Tried(rate=r.setting.learning_rate, **facts(r, {}, start=2.0, steps=1)) for r in (few, none)
    ]
    assert outcomes(tried, Sweep(gain=1.0)) == ["moved", "nothing"]
