"""Fixtures: tiny models of every family as ordinary folders, made once per session, and a cache of the test's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from specdef.models.tiny import save_tiny

torch.set_num_threads(1)  # the tensors are small; a second thread costs more than it gives


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function from (family, dtype, shards) to a folder that tests only read."""
    made: dict[tuple[object, ...], Path] = {}

    def make(family: str, dtype: torch.dtype = torch.float32, **options: object) -> Path:
        key = (family, dtype, *sorted(options.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp(family) / "model"
            save_tiny(family, made[key], dtype=dtype, **options)
        return made[key]

    return make


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep what is cached in a folder of this test, which is made when it is needed."""
    monkeypatch.setenv("SPECDEF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
