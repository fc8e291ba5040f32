"""Public data sets that no package carries, in a folder the user names."""

from __future__ import annotations

from pathlib import Path

from specdef.errors import SpecDefError


def data_file(data: Path | None, name: str, what: str) -> Path:
    """Find one file of the folder.

    Args:
        data: The folder; None where none was named.
        name: Of the file.
        what: The data set, for the message.

    Returns:
        Its path.

    Raises:
        SpecDefError: No folder was named, or it has no such file.
    """
    path = (data or Path()) / name
    if data is None or not path.is_file():
        raise SpecDefError(
            f"{what} is not there: {path}.",
            hint=f"Put it into a folder as {name}, as docs/reproduce.md says, and name the folder with --data DIR.",
        )
    return path
