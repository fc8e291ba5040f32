"""The folder in which fetched data and converted models are kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """Return the folder for fetched data and converted models.

    Returns:
        `SPECDEF_CACHE`, else `XDG_CACHE_HOME/specdef`, else `~/.cache/specdef`; it need not exist.
    """
    if own := os.environ.get("SPECDEF_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path("~/.cache")).expanduser() / "specdef"
