"""Whole sets of pictures in one `.npz` file, pixel arrays or JPEG bytes end to end, as tensors for a classifier."""

from __future__ import annotations

import io
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from specdef.errors import SpecDefError

_HINT = "Write it with numpy.savez(path, images=…, labels=…), uint8 [n, height, width] or [n, height, width, 3]."
TRAIN_SHARE = 0.8
"""Of a file that does not say which pictures are for training: its first part."""


def read_pictures(
    path: Path, split: str, rows: int, *, seed: int = 0, side: int = 28, channels: int = 1
) -> tuple[Tensor, Tensor]:
    """Draw pictures of one split without replacement.

    Args:
        path: `.npz` with `images` and `labels`; or with `data` (JPEG files end to end, uint8), `size` (their lengths) and
            `label`. A boolean `train` tells the splits apart; without one the first 80 % are for training.
        split: train or test.
        rows: How many; at most as many as there are.
        seed: Decides which, and their order.
        side: Height and width they are resized to, bilinearly where they differ.
        channels: 1 for grey, 3 for colours.

    Returns:
        (float32 [rows, channels, side, side] in [0, 1], int64 [rows]).

    Raises:
        SpecDefError: There is no such file, it cannot be read, or it has fewer pictures.
        ValueError: The split has another name.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be train or test, got {split!r}.")
    if not path.is_file():
        raise SpecDefError(f"{path}: there is no such file.", hint=_HINT)
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored}
        labels = np.asarray(arrays["labels"] if "labels" in arrays else arrays["label"])
        chosen = _chosen(arrays.get("train"), split, len(labels), rows, seed, path)
        pictures = [_picture(arrays, int(i), side, channels) for i in chosen]
    except (OSError, ValueError, KeyError, IndexError, TypeError, EOFError, zlib.error, zipfile.BadZipFile) as error:  # fmt: skip
        raise SpecDefError(f"{path}: pictures cannot be read ({error}).", hint=_HINT) from error
    stacked = np.stack(pictures).astype(np.float32) / 255.0
    return torch.from_numpy(stacked), torch.from_numpy(labels[chosen].astype(np.int64))


def picture_batches(pictures: Tensor, labels: Tensor, size: int) -> list[dict[str, Tensor]]:
    """Cut pictures into batches as an image classifier takes them.

    Args:
        pictures: [rows, channels, height, width].
        labels: [rows].
        size: Rows of a batch; the last may be smaller.

    Returns:
        Dicts of `pixel_values` and `labels`.
    """
    parts = zip(torch.split(pictures, size), torch.split(labels, size), strict=True)
    return [{"pixel_values": x, "labels": y} for x, y in parts]


def _chosen(
    train: NDArray[np.bool_] | None, split: str, count: int, rows: int, seed: int, path: Path
) -> NDArray[np.int64]:
    if train is None:
        train = np.arange(count) < TRAIN_SHARE * count
    (own,) = np.nonzero(np.asarray(train, dtype=bool) == (split == "train"))
    if len(own) < rows:
        raise SpecDefError(
            f"{path}: {len(own)} pictures of the split {split}; {rows} were asked for.",
            hint="Take another size, or a file with more.",
        )
    order = torch.randperm(len(own), generator=torch.Generator().manual_seed(seed))[:rows]
    found: NDArray[np.int64] = own[order.numpy()]
    return found


def _picture(
    arrays: dict[str, NDArray[np.uint8]], index: int, side: int, channels: int
) -> NDArray[np.uint8]:
    """Return one picture [channels, side, side]."""
    if "images" in arrays:
        opened: Image.Image = Image.fromarray(arrays["images"][index])
    else:
        ends = arrays.setdefault("ends", np.cumsum(arrays["size"], dtype=np.int64))
        start = 0 if index == 0 else int(ends[index - 1])
        opened = Image.open(io.BytesIO(arrays["data"][start : int(ends[index])].tobytes()))
    picture = opened.convert("RGB" if channels == 3 else "L")
    if picture.size != (side, side):
        picture = picture.resize((side, side), Image.Resampling.BILINEAR)
    pixels = np.asarray(picture, dtype=np.uint8)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)
