"""Output appears whole or not at all: occupied targets, full disks, read-only places, interruptions."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from helpers import every_call, leftovers, snapshot, write_folder
from specdef.errors import CheckpointError
from specdef.weights.atomic import atomic_file, atomic_folder, refuse_existing
from specdef.weights.checkpoint import Checkpoint
from specdef.weights.edit import Edit, ReplaceEdit, ScaleEdit
from specdef.weights.rewrite import copy_other_files, rewrite_tensors

EDITS: dict[str, Edit] = {
    "a": (ScaleEdit(axis=0, position=1, exponent=3),),
    "b": ReplaceEdit(compute=torch.neg),
}


@pytest.fixture
def source(tmp_path: Path) -> Checkpoint:
    generator = torch.Generator().manual_seed(0)
    shards = {
        "model-00001-of-00002.safetensors": {"a": torch.rand(30, 20, generator=generator) + 1},
        "model-00002-of-00002.safetensors": {"b": torch.rand(99, generator=generator), "c": torch.ones(2)},
    }  # fmt: skip
    folder = write_folder(tmp_path / "source", shards, config={"model_type": "x"})
    (folder / "sub").mkdir()
    (folder / "sub" / "tokenizer.json").write_text("{}")
    return Checkpoint.open(folder)


def write_all(source: Checkpoint, target: Path) -> None:
    """Write a model as a lock does: folder with shards and files, and a file beside it."""
    with atomic_folder(target) as work:
        rewrite_tensors(source, work, EDITS)
        copy_other_files(source, work)
        with atomic_file(target.with_name("key")) as path:
            path.write_bytes(b"key" * 1000)


@pytest.fixture
def complete(source: Checkpoint, tmp_path: Path) -> dict[str, str]:
    write_all(source, tmp_path / "reference" / "out")
    return snapshot(tmp_path / "reference" / "out")


def count_calls(source: Checkpoint, target: Path, names: tuple[str, ...] | None = None) -> int:
    """Count the hooked calls an undisturbed write makes."""
    count = 0

    def act(n: int, _name: str) -> None:
        nonlocal count
        count = n

    with every_call(act, names) if names else every_call(act):
        write_all(source, target)
    return count


@contextlib.contextmanager
def failing(
    at: int, error: Callable[[], BaseException], names: tuple[str, ...]
) -> Iterator[list[str]]:
    """Raise in the call of that number; yield a list that gets the function's name."""
    failed: list[str] = []

    def act(n: int, name: str) -> None:
        if n == at:
            failed.append(name)
            raise error()

    with every_call(act, names):
        yield failed


@pytest.mark.parametrize(
    "kind",
    ["folder with a file", "folder with a folder", "hidden file", "file", "dangling link", "link to a file",
     "link to an empty folder", "pipe"],
)  # fmt: skip
def test_what_exists_is_refused_and_left_alone(
    kind: str, source: Checkpoint, tmp_path: Path
) -> None:
    target = tmp_path / "place" / "out"
    target.parent.mkdir()
    if kind.startswith(("folder", "hidden")):
        target.mkdir()
        inside = target / (".hidden" if kind == "hidden file" else "x")
        inside.mkdir() if kind.endswith("folder") else inside.write_text("mine")
    elif kind == "file":
        target.write_text("mine")
    elif kind == "pipe":
        os.mkfifo(target)
    else:
        other = tmp_path / "other"
        if kind == "link to a file":
            other.write_text("mine")
        elif kind == "link to an empty folder":
            other.mkdir()
        target.symlink_to(other)
    before = snapshot(tmp_path), sorted(tmp_path.rglob("*"))
    for attempt in (lambda: refuse_existing(target), lambda: write_all(source, target)):
        with pytest.raises(CheckpointError, match="already exists") as caught:
            attempt()
        assert (caught.value.path, caught.value.exit_code) == (target, 2)
        assert (snapshot(tmp_path), sorted(tmp_path.rglob("*"))) == before


def test_an_empty_folder_is_taken(
    source: Checkpoint, complete: dict[str, str], tmp_path: Path
) -> None:
    target = tmp_path / "out"
    target.mkdir()
    write_all(source, target)
    assert snapshot(target) == complete
    assert leftovers(tmp_path) == []


def test_parents_are_made(source: Checkpoint, complete: dict[str, str], tmp_path: Path) -> None:
    write_all(source, tmp_path / "new" / "deep" / "out")
    assert snapshot(tmp_path / "new" / "deep" / "out") == complete


@pytest.mark.parametrize("name", ["a[1]", "*", "out?", "ü b", "-rf", "a.b-c", ".hidden", "x" * 230])
def test_any_name(name: str, source: Checkpoint, complete: dict[str, str], tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    gone = dead_process()
    stale = [place / f".{name}.specdef-{gone}", place / f".key.specdef-{gone}"]
    stale[0].mkdir()
    (stale[0] / "half").write_text("half")
    stale[1].write_text("half")
    write_all(source, place / name)
    assert snapshot(place / name) == complete
    assert sorted(path.name for path in place.iterdir()) == sorted([name, "key"])


def test_a_name_that_is_too_long(source: Checkpoint, tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    for name in ("x" * 250, "x" * 300):
        with pytest.raises(CheckpointError):
            write_all(source, place / name)
        assert list(place.iterdir()) == []


@pytest.mark.parametrize("name", [".", "..", "/"])
def test_names_that_are_no_new_folder(
    name: str, source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "place").mkdir()
    monkeypatch.chdir(tmp_path / "place")
    before = snapshot(tmp_path)
    with pytest.raises(CheckpointError), atomic_folder(Path(name)) as work:
        rewrite_tensors(source, work, {})
    assert snapshot(tmp_path) == before
    assert leftovers(tmp_path) == leftovers(tmp_path / "place") == []


def test_a_parent_that_is_a_file(source: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_all(source, tmp_path / "file" / "out")
    with (
        pytest.raises(CheckpointError, match="cannot be written"),
        atomic_file(tmp_path / "file" / "key"),
    ):
        raise AssertionError("the block is not entered")
    with (
        pytest.raises(CheckpointError, match="cannot be written"),
        atomic_file(tmp_path / "file" / "sub" / "key"),
    ):
        raise AssertionError("the block is not entered")
    assert (tmp_path / "file").read_text() == "mine"


def dead_process() -> int:
    """Return the number of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_leftovers_of_the_living_and_of_others_stay(source: Checkpoint, tmp_path: Path) -> None:
    place = tmp_path / "place"
    gone = dead_process()
    living = subprocess.Popen(["sleep", "60"])
    try:
        kept = [f".out.specdef-{living.pid}", f".other.specdef-{gone}", ".out.specdef-x", ".out.specdef-"]  # fmt: skip
        for name in [*kept, f".out.specdef-{gone}", f".out.specdef-{os.getpid()}"]:
            (place / name).mkdir(parents=True)
        write_all(source, place / "out")
        assert leftovers(place) == sorted(kept)
    finally:
        living.kill()
        living.wait()


def test_a_file_replaces_the_old_one_or_leaves_it(tmp_path: Path) -> None:
    target = tmp_path / "key"
    target.write_text("old")
    with pytest.raises(RuntimeError, match="stop"), atomic_file(target) as work:
        work.write_text("half")
        assert target.read_text() == "old"
        raise RuntimeError("stop")
    assert target.read_text() == "old"
    with atomic_file(target) as work:
        work.write_text("new")
    assert target.read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


def test_the_target_is_not_there_before_the_end(source: Checkpoint, tmp_path: Path) -> None:
    target = tmp_path / "out"
    with atomic_folder(target) as work:
        rewrite_tensors(source, work, {})
        assert not target.exists()
        assert work.parent == target.parent  # or the rename would be a copy
    assert target.exists()


def test_everything_is_synced_before_the_rename(
    source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[str] = set()
    renamed: list[set[str]] = []
    real_sync, real_rename = os.fsync, os.rename

    def fsync(handle: int) -> None:
        synced.add(os.path.realpath(f"/proc/self/fd/{handle}"))
        real_sync(handle)

    def rename(old: Path, new: Path) -> None:
        renamed.append({str(p) for p in [old, *Path(old).rglob("*")]} - synced)
        real_rename(old, new)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    write_all(source, tmp_path / "out")
    assert renamed == [set()]
    assert str(tmp_path) in synced  # the rename itself


WRITING = ("mkdir", "posix_fallocate", "pwrite", "fsync", "rename", "replace")


@pytest.mark.parametrize(
    "number,hint",
    [
        (errno.ENOSPC, "disk is full"),
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "read-only"),
        (errno.EIO, ""),
        (errno.EACCES, ""),
    ],
)
def test_a_failure_at_any_point_leaves_nothing(
    number: int, hint: str, source: Checkpoint, complete: dict[str, str], tmp_path: Path
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    calls = count_calls(source, place / "first", WRITING)
    assert calls > 20
    before = snapshot(source.folder)
    for at in range(1, calls + 1):
        target = place / f"out{at}"
        try:
            with failing(at, lambda: OSError(number, os.strerror(number)), WRITING) as failed:
                write_all(source, target)
        except CheckpointError as error:
            assert "cannot be written" in str(error)
            assert error.exit_code == 2
            assert hint in error.hint
            # the last call syncs the parent, behind the rename
            assert not target.exists() or (at == calls and snapshot(target) == complete)
        else:  # only the making of a folder that is there already may fail
            assert failed == ["mkdir"]
            assert snapshot(target) == complete
        assert leftovers(place) == []
    assert snapshot(source.folder) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, MemoryError, SystemExit])
def test_an_exception_at_any_point_leaves_nothing(
    error: type[BaseException], source: Checkpoint, complete: dict[str, str], tmp_path: Path
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    names = (*WRITING, "open", "preadv", "chmod")
    calls = count_calls(source, place / "first", names)
    seen = set()
    for at in range(1, calls + 1):
        target = place / f"out{at}"
        with pytest.raises(error, match="stop"), failing(at, lambda: error("stop"), names):
            write_all(source, target)
        assert leftovers(place) == []
        seen.add(target.exists())
        if target.exists():
            assert snapshot(target) == complete
    assert seen == {True, False}  # only the very last calls come behind the rename


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 256 KiB."""
    place = tmp_path / "small"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("cannot mount a file system here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("kibibytes", [1, 100, 200, 246, 252, 300])
def test_a_disk_that_is_really_full(kibibytes: int, tmpfs: Path, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", {
        "model.safetensors": {"a": torch.ones(30, 20), "c": torch.ones(kibibytes, 256)}})  # fmt: skip
    (folder / "tokenizer.json").write_text("x" * 10_000)
    source = Checkpoint.open(folder)
    room = os.statvfs(tmpfs).f_bavail
    if kibibytes <= 200:
        with atomic_folder(tmpfs / "out") as work:
            rewrite_tensors(source, work, {})
            copy_other_files(source, work)
        assert snapshot(tmpfs / "out") == snapshot(folder)
        return
    with pytest.raises(CheckpointError, match="No space left") as caught, atomic_folder(tmpfs / "out") as work:  # fmt: skip
        rewrite_tensors(source, work, {})
        copy_other_files(source, work)
    assert "disk is full" in caught.value.hint
    assert list(tmpfs.iterdir()) == []
    assert os.statvfs(tmpfs).f_bavail == room


def test_a_full_disk_is_met_before_any_work(tmpfs: Path, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", {"model.safetensors": {"a": torch.ones(300, 256)}})
    seen: list[int] = []
    with pytest.raises(CheckpointError, match="No space left"), atomic_folder(tmpfs / "out") as work:  # fmt: skip
        rewrite_tensors(Checkpoint.open(folder), work, {}, progress=lambda *x: seen.append(x[0]))
    assert seen == []


def test_a_place_that_is_really_read_only(tmpfs: Path, source: Checkpoint) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(tmpfs)], check=True)
    with pytest.raises(CheckpointError, match="Read-only") as caught:
        write_all(source, tmpfs / "out")
    assert "read-only" in caught.value.hint
    with pytest.raises(CheckpointError, match="Read-only"):
        write_all(source, tmpfs / "new" / "out")


def test_a_place_one_may_not_write(source: Checkpoint, tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    place.chmod(0o500)
    if os.access(place, os.W_OK):
        pytest.skip("root may write anywhere")
    with pytest.raises(CheckpointError, match="denied"):
        write_all(source, place / "out")
