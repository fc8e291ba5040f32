"""Errors a user can meet. Each says what was found, where, and (in `hint`) what to do next."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


class SpecDefError(Exception):
    """Bad input or an operation that cannot be carried out; the command line exits with 2.

    Args:
        message: What was found, and where.
        hint: One sentence that says what to do next.
    """

    exit_code = 2

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class CheckpointError(SpecDefError):
    """A checkpoint folder, shard or tensor cannot be used.

    Args:
        message: What is wrong.
        path: File or folder concerned.
        tensor: Tensor concerned, where there is one.
        hint: What to do next.
    """

    def __init__(
        self, message: str, *, path: str | Path = "", tensor: str = "", hint: str = ""
    ) -> None:
        where = ", ".join(str(part) for part in (path, tensor) if str(part))
        super().__init__(f"{where}: {message}" if where else message, hint=hint)
        self.path = Path(path) if str(path) else None
        self.tensor = tensor


class SelectionError(SpecDefError):
    """`target_modules` or `layers` select nothing, or a model family has no table.

    Args:
        message: What was asked for.
        patterns: The patterns that matched nothing.
        nearest: Names in the model that come closest.
        hint: What to do next.
    """

    def __init__(
        self,
        message: str,
        *,
        patterns: Sequence[str] = (),
        nearest: Sequence[str] = (),
        hint: str = "",
    ) -> None:
        super().__init__(message, hint=hint)
        self.patterns = tuple(patterns)
        self.nearest = tuple(nearest)


class SecondOrderError(SpecDefError):
    """A model cannot be differentiated twice, or gives another value each time it is run."""


class StaleGraphError(SpecDefError):
    """The weights or the data changed under a curvature operator: it would mix the old point with the new."""


class KeyMismatch(SpecDefError):
    """A key does not belong to the locked model it is used on."""


class NotConverged(SpecDefError):
    """An iterative routine stopped before it met its tolerance; the command line exits with 3.

    Args:
        message: Which routine, and how far it came.
        result: The best result so far.
        hint: What to do next.
    """

    exit_code = 3

    def __init__(self, message: str, *, result: Any = None, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.result = result


class CertificateMismatch(SpecDefError):
    """A model is not what its certificate says; the command line exits with 1.

    Args:
        message: What differs.
        expected: What the certificate says.
        actual: What was found.
        hint: What to do next.
    """

    exit_code = 1

    def __init__(
        self, message: str, *, expected: object = None, actual: object = None, hint: str = ""
    ) -> None:
        super().__init__(message, hint=hint)
        self.expected = expected
        self.actual = actual
