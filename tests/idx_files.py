"""Tiny IDX files, and pictures that a small net learns in seconds."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np


def idx_bytes(array: Any, *, shape: tuple[int, ...] | None = None, kind: int = 8) -> bytes:
    """Return an array as an IDX file; `shape` and `kind` let the header lie."""
    array = np.asarray(array, np.uint8)
    shape = array.shape if shape is None else shape
    lengths = b"".join(length.to_bytes(4, "big") for length in shape)
    return bytes([0, 0, kind, len(shape)]) + lengths + array.tobytes()


def write_idx(path: Path, content: bytes) -> Path:
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def write_split(
    folder: Path, start: str, images: Any, labels: Any, *, mark: str = "-", end: str = ""
) -> Path:
    """Write the two files of a split; `start` is train, t10k or test."""
    folder.mkdir(exist_ok=True)
    write_idx(folder / f"{start}-images{mark}idx3-ubyte{end}", idx_bytes(images))
    write_idx(folder / f"{start}-labels{mark}idx1-ubyte{end}", idx_bytes(labels))
    return folder


def blobs(n: int, *, side: int = 12, classes: int = 4, seed: int = 0) -> tuple[Any, Any]:
    """Return noisy pictures with a bright patch whose place is the class."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, n).astype(np.uint8)
    labels[:classes] = range(classes)
    images = generator.integers(0, 100, (n, side, side)).astype(np.uint8)
    for image, label in zip(images, labels, strict=True):
        row, column = divmod(int(label), 2)
        image[row * side // 2 :, column * side // 2 :][: side // 2, : side // 2] += 100
    return images, labels
