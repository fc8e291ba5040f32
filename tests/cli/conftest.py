"""Fixtures of the command line's tests: run a verb in this process, and a model that is locked already."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import specdef
from specdef.cli.app import main


class Result(NamedTuple):
    """What a run of the command line gave."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one JSON object on stdout; json.loads refuses anything before or behind it."""
        value = json.loads(self.out)
        assert isinstance(value, dict)
        return value


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Return a function from arguments to exit code, stdout and stderr."""

    def call(*arguments: object) -> Result:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return Result(int(ended.value.code or 0), captured.out, captured.err)

    return call


class Locked(NamedTuple):
    """A tiny model, its locked folder and its key. Tests only read them."""

    source: Path
    folder: Path
    key: Path


@pytest.fixture(scope="session")
def locked(tiny_folder, tmp_path_factory) -> Locked:
    """A llama under an absorbed lock."""
    folder = tmp_path_factory.mktemp("cli") / "locked"
    certificate = specdef.lock_checkpoint(tiny_folder("llama"), folder)
    return Locked(tiny_folder("llama"), folder, Path(certificate.key))


@pytest.fixture
def copy(tmp_path) -> Callable[..., Path]:
    """Return a function that copies a folder to where a test may change it."""

    def make(folder: Path, name: str = "copy") -> Path:
        shutil.copytree(folder, tmp_path / name)
        return tmp_path / name

    return make


@pytest.fixture
def tree(tmp_path) -> Callable[[], set[str]]:
    """Return a function that names everything below the test's folder, hidden work folders included."""
    return lambda: {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
