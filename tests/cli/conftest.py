"""Fixtures of the command line's tests: run a verb in this process, and a model that is locked already."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import specdef
from specdef.cli.app import main
from specdef.models.tiny_tokenizer import save_tiny_tokenizer


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


@pytest.fixture(scope="session")
def ready(tiny_folder, tmp_path_factory) -> Callable[[str], Path]:
    """Return a function from a family to a tiny model's folder with a tokenizer, for tests that only read it."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp("ready") / family
            shutil.copytree(tiny_folder(family), made[family])
            if family not in ("vit", "resnet"):
                save_tiny_tokenizer(made[family], pair_separator=family == "bert")
        return made[family]

    return make


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> dict[str, Path | str]:
    """Return data for each family: text, labelled texts, pictures."""
    folder = tmp_path_factory.mktemp("data")
    rows = [{"text": "x" * (i + 2), "label": i % 3} for i in range(8)]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = np.random.default_rng(0).random((8, 3, 16, 16), dtype=np.float32)
    np.savez(folder / "a.npz", images=values, labels=np.arange(8) % 5)
    texts = dict.fromkeys(("llama", "gpt2"), "sotu")
    return {
        **texts,
        "bert": folder / "a.jsonl",
        "vit": folder / "a.npz",
        "resnet": folder / "a.npz",
    }
