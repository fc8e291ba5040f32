"""Where studies live: one file that survives kills and takes several processes, or a database."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import optuna
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend

from specdef.errors import SpecDefError

FAILURES = (OSError, optuna.exceptions.StorageInternalError)
"""What an audit stops with when its storage fails it."""

try:
    import fcntl
except ImportError:  # no POSIX
    fcntl = None  # type: ignore[assignment]


class KernelLock:
    """A lock that the kernel lets go of when its holder dies.

    Differs from Optuna's own, a link that a killed process leaves behind and others wait half a minute for. Whoever gets the
    lock also cuts off a line that a killed process left unfinished: Optuna would append to it, and the file could not be
    read again.

    Args:
        path: The journal.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._held: IO[bytes] | None = None

    def acquire(self) -> bool:
        """Wait for the lock.

        Returns:
            True.
        """
        handle = self._path.with_name(f"{self._path.name}.lock").open("ab")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            drop_unfinished_line(self._path)
        except BaseException:  # Ctrl-C while waiting among them
            handle.close()
            raise
        self._held = handle
        return True

    def release(self) -> None:
        """Let go."""
        held, self._held = self._held, None  # whoever waits may have it as soon as it is closed
        if held is not None:
            held.close()


def drop_unfinished_line(path: Path) -> None:
    """Cut a file off after its last newline.

    Args:
        path: The file; it must not be written to meanwhile.
    """
    with path.open("rb+") as file:
        end = size = file.seek(0, os.SEEK_END)
        while end:
            begin = max(0, end - 65536)
            file.seek(begin)
            newline = file.read(end - begin).rfind(b"\n")
            if newline >= 0:
                end = begin + newline + 1
                break
            end = begin
        if end < size:
            file.truncate(end)


def open_storage(storage: str | Path | None) -> BaseStorage:
    """Open where studies are kept.

    Args:
        storage: A file, made where there is none; an address that SQLAlchemy knows (postgresql://…, mysql://…), for several
            machines; None keeps everything in memory.

    Returns:
        Optuna's storage.

    Raises:
        SpecDefError: It cannot be opened or read.
    """
    if storage is None:
        return InMemoryStorage()
    with silent_optuna():
        if "://" in str(storage):
            return _database(str(storage))
        path = Path(storage)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Optuna asks of a lock to acquire and to release; the base class it names is not public.
            lock: Any = KernelLock(path) if fcntl else None
            backend = JournalFileBackend(str(path), lock)
            return JournalStorage(backend)
        except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
            raise SpecDefError(
                f"{path} cannot be used to keep studies in: {error}",
                hint="Name a file this audit may write, or one written by an earlier audit.",
            ) from error


@contextmanager
def silent_optuna() -> Iterator[None]:
    """Keep Optuna from printing; what it was set to before comes back."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


def _database(url: str) -> BaseStorage:
    from sqlalchemy import NullPool
    from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

    refused: Exception | None = None
    for _ in range(3):  # of several workers that make the tables at once, all but one fail
        try:
            # No connection stays open between two questions: runs are long, and databases drop idle ones.
            return optuna.storages.RDBStorage(url, engine_kwargs={"poolclass": NullPool})
        except (ArgumentError, NoSuchModuleError, ImportError) as error:
            raise SpecDefError(
                f"the address of the database cannot be used: {str(error).splitlines()[0]}",
                hint="It looks like postgresql+psycopg://user@host/name; its driver (psycopg) must be installed.",
            ) from error
        except SQLAlchemyError as error:
            refused = error
    raise SpecDefError(
        f"the database cannot be used: {str(refused).splitlines()[0]}",
        hint="Check that it runs, and that the user may create tables in it.",
    ) from refused
