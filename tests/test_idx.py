"""IDX files: what is read, how it reaches each model, and every way in which a file can be wrong."""

from __future__ import annotations

import gzip
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from idx_files import blobs, idx_bytes, write_idx, write_split
from specdef.data.batches import load_batches
from specdef.data.idx import is_idx_folder, read_idx, read_idx_folder
from specdef.errors import SpecDefError
from specdef.models.tiny_tokenizer import tiny_tokenizer

IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def config(channels: int = 1, classes: int = 4, side: int = 12) -> Any:
    """Return what a model's config says about pictures."""
    return SimpleNamespace(
        num_channels=channels, num_labels=classes, image_size=side, label2id=None
    )


GREY, COLOUR = config(), config(3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with 20 pictures to train on and 8 to test with."""
    write_split(tmp_path / "data", "train", *blobs(20))
    return write_split(tmp_path / "data", "t10k", *blobs(8, seed=1))


def pictures(data: str | Path, model: Any, **options: Any) -> list[dict[str, torch.Tensor]]:
    options = {"batch_size": 4, "num_batches": 2, "processor": None} | options
    processor = options.pop("processor")
    return load_batches(data, model, processor, task="image-classification", **options)


# --- what is read


@pytest.mark.parametrize("shape", [(5,), (2, 3, 4), (0,)])
@pytest.mark.parametrize("end", ["", ".gz"])
def test_an_array_comes_back(tmp_path: Path, shape: tuple[int, ...], end: str) -> None:
    array = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    path = write_idx(tmp_path / f"a{end}", idx_bytes(array))
    read = read_idx(path, axes=len(shape))
    assert read.dtype == np.uint8 and np.array_equal(read, array)


@pytest.mark.parametrize("end", ["", ".gz"])
@pytest.mark.parametrize("mark", ["-", "."])
@pytest.mark.parametrize("start", ["t10k", "test"])
def test_every_name_in_use_is_found(tmp_path: Path, start: str, mark: str, end: str) -> None:
    images, labels = blobs(6)
    folder = write_split(tmp_path / "d", "train", images, labels, mark=mark, end=end)
    write_split(folder, start, images[::-1], labels[::-1], mark=mark, end=end)
    assert is_idx_folder(folder)
    for split, expected in ((None, labels), ("train", labels), ("test", labels[::-1])):
        found = read_idx_folder(folder, split)
        assert np.array_equal(found[1], expected) and found[0].shape == (6, 12, 12)
    (folder / "notes.md").write_text("notes")
    assert not is_idx_folder(tmp_path) and not is_idx_folder(folder / "notes.md")


def test_a_folder_of_one_split_is_that_split(tmp_path: Path) -> None:
    folder = write_split(tmp_path / "d", "t10k", *blobs(6))
    assert len(read_idx_folder(folder)[0]) == 6
    with pytest.raises(SpecDefError, match="no split 'train'; the IDX files there make up test"):
        read_idx_folder(folder, "train")


# --- how it reaches a model


def test_a_grey_model_gets_the_pixels_divided_by_255(folder: Path) -> None:
    images, labels = blobs(20)
    batches = pictures(folder, GREY, num_batches=5)
    values = torch.cat([batch["pixel_values"] for batch in batches])
    assert values.shape == (20, 1, 12, 12) and values.dtype == torch.float32
    given = {row.tobytes(): int(y) for row, y in zip(images.astype(np.float32) / 255, labels, strict=True)}  # fmt: skip
    for value, label in zip(values, torch.cat([batch["labels"] for batch in batches]), strict=True):
        assert given.pop(value.numpy().tobytes()) == label
    assert not given


def test_a_colour_model_gets_the_same_in_three_channels(folder: Path) -> None:
    grey, colour = pictures(folder, GREY)[0], pictures(folder, COLOUR)[0]
    assert torch.equal(colour["pixel_values"], grey["pixel_values"].expand(-1, 3, -1, -1))


def test_pictures_are_prepared_as_files_are(folder: Path, tmp_path: Path) -> None:
    """Resized and put through a processor like PNG files of the same pictures."""
    from transformers import ViTImageProcessor

    images, labels = blobs(20)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        place = tmp_path / "png" / str(label) / f"{i}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place)
    half = {"height": 6, "width": 6}
    processor = ViTImageProcessor(size=half, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    for model, chosen in ((COLOUR, processor), (config(side=6), None)):
        rows = [
            {value.numpy().tobytes() for batch in pictures(data, model, num_batches=5, processor=chosen) for value in batch["pixel_values"]}
            for data in (folder, tmp_path / "png")
        ]  # fmt: skip
        assert len(rows[0]) == 20 and rows[0] == rows[1]


def test_splits_and_seeds(folder: Path) -> None:
    test = pictures(folder, GREY, split="test", batch_size=8, num_batches=1)[0]
    assert sorted(test["labels"].tolist()) == sorted(blobs(8, seed=1)[1].tolist())
    assert not torch.equal(pictures(folder, GREY)[0]["pixel_values"], pictures(folder, GREY, seed=1)[0]["pixel_values"])  # fmt: skip
    with pytest.raises(SpecDefError, match="8 examples, 12 were asked for"):
        pictures(folder, GREY, split="test", num_batches=3)


def test_a_label_the_model_has_not_is_named(folder: Path) -> None:
    with pytest.raises(SpecDefError, match=f"{IMAGES}, picture 3"):
        pictures(folder, config(classes=3))


@pytest.mark.parametrize("data", ["mnist", None])
@pytest.mark.parametrize("task", ["causal-lm", "sequence-classification"])
def test_pictures_are_refused_for_text(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str, data: str | None
) -> None:
    monkeypatch.setenv("PATH", "")  # nothing is fetched to find that out
    monkeypatch.setenv("SPECDEF_CACHE", str(tmp_path / "cache"))
    with pytest.raises(SpecDefError, match="pictures; the model takes text"):
        load_batches(data or folder, GREY, tiny_tokenizer(), task=task, batch_size=1, num_batches=1)


# --- what can be wrong

PICTURES = blobs(20)[0]


@pytest.mark.parametrize("end", ["", ".gz"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no IDX file; it begins with nothing"),
        (b"\0\0", "no IDX file; it begins with 00 00"),
        (b"\x80\x04\x95\x10", "no IDX file; it begins with 80 04 95 10"),  # a pickle
        (b"\x93NUMPY", "no IDX file"),
        (b"\0\0\x07\x03", "no IDX file"),
        (idx_bytes(PICTURES, kind=13), "an IDX file of float32; only unsigned bytes"),
        (idx_bytes(PICTURES, kind=9), "an IDX file of signed bytes"),
        (idx_bytes(PICTURES[0]), "an array of 2 axes; 3 were expected"),
        (idx_bytes(PICTURES)[:10], "ends in its header"),
        (idx_bytes(PICTURES)[:-1], r"says 2880 bytes \(20 x 12 x 12\), 2879 follow"),
        (idx_bytes(PICTURES) + b"\0", "says 2880 bytes .*, more follow"),
        (idx_bytes(PICTURES, shape=(21, 12, 12)), "says 3024 bytes .*, 2880 follow"),
        (idx_bytes(PICTURES, shape=(2**32 - 1,) * 3), "2880 follow"),  # more than any memory
        (idx_bytes(PICTURES[:10]), "10 pictures in train-images.*, 20 labels in train-labels"),
        (idx_bytes(PICTURES[:, :0]), r"no pictures; its shape is \[20, 0, 12\]"),
    ],
)
def test_a_wrong_file_of_pictures(folder: Path, content: bytes, message: str, end: str) -> None:
    (folder / IMAGES).unlink()
    write_idx(folder / f"{IMAGES}{end}", content)
    with pytest.raises(SpecDefError, match=message) as caught:
        pictures(folder, GREY)
    assert str(folder) in str(caught.value) and caught.value.hint


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(gzip.compress(idx_bytes(PICTURES))[:-20], id="truncated"),
        pytest.param(gzip.compress(idx_bytes(PICTURES))[:-4] + b"abcd", id="other length"),
        pytest.param(idx_bytes(PICTURES), id="not compressed"),
        pytest.param(gzip.compress(idx_bytes(PICTURES))[:10] + b"\xff" * 50, id="damaged"),
    ],
)
def test_a_damaged_gz_file(folder: Path, content: bytes) -> None:
    (folder / IMAGES).unlink()
    (folder / f"{IMAGES}.gz").write_bytes(content)
    with pytest.raises(SpecDefError, match=rf"{IMAGES}\.gz: the file cannot be read"):
        pictures(folder, GREY)


@pytest.mark.parametrize(("missing", "kind"), [(IMAGES, "images"), (LABELS, "labels")])
def test_a_missing_file_is_named(folder: Path, missing: str, kind: str) -> None:
    (folder / missing).unlink()
    with pytest.raises(SpecDefError, match=f"no {kind} of the split 'train'") as caught:
        pictures(folder, GREY)
    assert missing in caught.value.hint
    assert len(read_idx_folder(folder, "test")[0]) == 8


def test_no_pictures_at_all(tmp_path: Path) -> None:
    folder = write_split(tmp_path / "d", "train", np.zeros((0, 12, 12)), np.zeros(0))
    with pytest.raises(SpecDefError, match="no pictures"):
        read_idx_folder(folder)


def test_an_unknown_split_is_named(folder: Path) -> None:
    with pytest.raises(SpecDefError, match=r"no split 'dev'; .* make up train and test"):
        pictures(folder, GREY, split="dev")
