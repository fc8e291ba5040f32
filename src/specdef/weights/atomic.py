"""Output that appears whole or not at all: written beside its place, synced, then renamed.

A killed process leaves at most a `.NAME.specdef-PID` beside the target, never a half-written target; the next run for
the same target removes it.
"""

from __future__ import annotations

import errno
import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from specdef.errors import CheckpointError


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield a fresh folder that becomes `target` when the block ends without an exception.

    Args:
        target: Must not exist, or be an empty folder.

    Yields:
        The folder to write into, on the same file system.

    Raises:
        CheckpointError: The target exists, or its place cannot be written.
    """
    refuse_existing(target)
    work = _work_path(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target)
        work.mkdir()
        yield work
        for path in sorted(work.rglob("*")):
            if not path.is_symlink():
                _sync(path)
        _sync(work)
        os.rename(work, target)  # over an empty folder too; over anything else it fails
        _sync(target.parent)
    except OSError as error:
        raise _unwritable(target, error) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yield a path that becomes `target` (replacing it) when the block ends without an exception.

    Args:
        target: The file.

    Yields:
        The path to write to.

    Raises:
        CheckpointError: The place cannot be written.
    """
    work = _work_path(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target)
        yield work
        _sync(work)
        os.replace(work, target)
        _sync(target.parent)
    except OSError as error:
        raise _unwritable(target, error) from error
    finally:
        with suppress(OSError):
            work.unlink()


def refuse_existing(target: Path) -> None:
    """Raise unless `target` is free: absent, or an empty folder.

    Args:
        target: Where output is to appear.

    Raises:
        CheckpointError: Something is there already.
    """
    try:
        if target.is_dir() and not target.is_symlink() and not any(target.iterdir()):
            return
    except OSError as error:
        raise _unwritable(target, error) from error
    if os.path.lexists(target):
        raise CheckpointError(
            "already exists", path=target, hint="Name a new folder, or remove this one first."
        )


def _work_path(target: Path) -> Path:
    return target.parent / f".{target.name}.specdef-{os.getpid()}"


def _remove_leftovers(target: Path) -> None:
    for path in target.parent.glob(f".{glob.escape(target.name)}.specdef-*"):
        pid = path.name.rpartition("-")[2]
        if pid.isdigit() and not _alive(int(pid)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _alive(pid: int) -> bool:
    if pid == os.getpid():
        return False  # our own name from an earlier process of the same number
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems sync no folders
            raise
    finally:
        os.close(handle)


def _unwritable(target: Path, error: OSError) -> CheckpointError:
    hints = {
        errno.ENOSPC: "The disk is full: free space or name another place; nothing was left behind.",
        errno.EDQUOT: "The quota is used up: free space or name another place.",
        errno.EROFS: "The place is read-only: name another one.",
        errno.EACCES: "The place is read-only for you: name another one.",
    }
    return CheckpointError(
        f"cannot be written ({error.strerror or error})",
        path=target,
        hint=hints.get(error.errno or 0, "Check the place and try again; nothing was left behind."),
    )
