"""Pictures and classes in IDX files, the format of MNIST: a header of big-endian numbers, then unsigned bytes.

Bytes 0 and 1 of a file are 0, byte 2 is the type (8: unsigned bytes), byte 3 the number of axes; the length of each axis
follows in four bytes, then the values, row by row. Plain and gzip-compressed files are read.
"""

from __future__ import annotations

import gzip
import math
import os
import zlib
from io import BufferedIOBase
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from specdef.data.records import Records
from specdef.errors import SpecDefError

SPLITS = {"train": ("train",), "test": ("t10k", "test")}
"""Split -> how the names of its files begin."""

_UNSIGNED_BYTES = 8
_TYPES = {9: "signed bytes", 11: "int16", 12: "int32", 13: "float32", 14: "float64"}
_CHUNK = 1 << 20  # read at a time: a header may claim more than there is memory
_HINT = (
    "Fetch or write the file again; `python -m specdef.data.mnist` makes a folder of such files."
)


def is_idx_folder(folder: Path) -> bool:
    """Say whether a folder holds IDX files under the names that MNIST's have.

    Args:
        folder: Any path.

    Returns:
        True where there is at least one file of pictures or classes, such as `train-images-idx3-ubyte`,
        `t10k-labels.idx1-ubyte` or `test-images-idx3-ubyte.gz`.
    """
    return os.path.isdir(folder) and any(
        _file(folder, split, kind) for split in SPLITS for kind in ("images", "labels")
    )


def read_idx_folder(
    folder: Path, split: str | None = None
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Read the pictures and classes of one split.

    Args:
        folder: A folder for which `is_idx_folder` is true.
        split: "train" or "test" (files that begin with `t10k` or `test`). Default: "train" where there is one.

    Returns:
        Pictures `[n, height, width]` and classes `[n]`, n at least 1.

    Raises:
        SpecDefError: There is no such split, a file is missing or damaged, or the two do not fit each other.
    """
    files = _files(folder, split)
    images, labels = read_idx(files["images"], axes=3), read_idx(files["labels"], axes=1)
    if len(images) != len(labels):
        raise SpecDefError(
            f"{folder}: {len(images)} pictures in {files['images'].name}, {len(labels)} labels in {files['labels'].name}.",
            hint="Name a folder whose files belong together.",
        )
    if 0 in images.shape:
        raise SpecDefError(
            f"{files['images']}: no pictures; its shape is {list(images.shape)}.", hint=_HINT
        )
    return images, labels


def idx_records(folder: Path, split: str | None = None) -> Records:
    """Read one split as records, to be prepared like grey picture files.

    Args:
        folder: A folder for which `is_idx_folder` is true.
        split: As for `read_idx_folder`.

    Returns:
        The records: uint8 `[1, height, width]` under "image", integers under "label".

    Raises:
        SpecDefError: As for `read_idx_folder`.
    """
    images, labels = read_idx_folder(folder, split)
    source = str(_files(folder, split)["images"])
    return Records(
        source=source,
        columns=("image", "label"),
        rows=[
            {"image": image, "label": label}
            for image, label in zip(images[:, None], labels.tolist(), strict=True)
        ],
        places=lambda i: f"{source}, picture {i}",
    )


def read_idx(path: Path, *, axes: int) -> NDArray[np.uint8]:
    """Read one IDX file of unsigned bytes.

    Args:
        path: The file, gzip-compressed where its name ends in `.gz`.
        axes: How many axes the array must have.

    Returns:
        The array, read-only.

    Raises:
        SpecDefError: The file cannot be read, is no IDX file, holds other numbers or another number of axes, or is
            shorter or longer than its header says.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            shape = _shape(stream, path, axes)
            expected = math.prod(shape)
            values = _read(stream, expected)
            longer = bool(stream.read(1))
    except (OSError, EOFError, zlib.error) as error:
        raise SpecDefError(f"{path}: the file cannot be read ({error}).", hint=_HINT) from error
    if longer or len(values) < expected:
        found = "more" if longer else f"{len(values)}"
        raise SpecDefError(
            f"{path}: its header says {expected} bytes ({' x '.join(map(str, shape))}), {found} follow it.",
            hint=_HINT,
        )
    return np.frombuffer(values, np.uint8).reshape(shape)


def _shape(stream: BufferedIOBase, path: Path, axes: int) -> tuple[int, ...]:
    """Read the header."""
    magic = _read(stream, 4)
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in (_UNSIGNED_BYTES, *_TYPES):
        raise SpecDefError(
            f"{path}: no IDX file; it begins with {magic.hex(' ') or 'nothing'}.", hint=_HINT
        )
    if magic[2] != _UNSIGNED_BYTES:
        raise SpecDefError(
            f"{path}: an IDX file of {_TYPES[magic[2]]}; only unsigned bytes are read.",
            hint="Write pictures in 0..255 and classes below 256 as unsigned bytes.",
        )
    if magic[3] != axes:
        raise SpecDefError(
            f"{path}: an array of {magic[3]} axes; {axes} were expected.",
            hint="Pictures have the axes number, height and width; labels have one axis.",
        )
    lengths = _read(stream, 4 * axes)
    if len(lengths) < 4 * axes:
        raise SpecDefError(f"{path}: the file ends in its header.", hint=_HINT)
    return tuple(int(length) for length in np.frombuffer(lengths, ">u4"))


def _read(stream: BufferedIOBase, count: int) -> bytes:
    """Read `count` bytes, or fewer where the file ends."""
    parts = []
    while count > 0 and (part := stream.read(min(count, _CHUNK))):
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def _files(folder: Path, split: str | None) -> dict[str, Path]:
    """Find the two files of a split."""
    found = {
        name: {kind: _file(folder, name, kind) for kind in ("images", "labels")} for name in SPLITS
    }
    there = [name for name, files in found.items() if any(files.values())]
    if split is not None and split not in there:
        raise SpecDefError(
            f"{folder}: no split {split!r}; the IDX files there make up {' and '.join(there)}.",
            hint="Files of the split test begin with t10k or test.",
        )
    name = split or there[0]
    files = {kind: path for kind, path in found[name].items() if path is not None}
    for kind, axes in (("images", 3), ("labels", 1)):
        if kind not in files:
            raise SpecDefError(
                f"{folder}: no {kind} of the split {name!r} beside {next(iter(files.values())).name}.",
                hint=f"Add {SPLITS[name][0]}-{kind}-idx{axes}-ubyte, plain or with .gz.",
            )
    return files


def _file(folder: Path, split: str, kind: str) -> Path | None:
    """Find one file; a plain one comes before a compressed one."""
    number = {"images": 3, "labels": 1}[kind]
    names = (
        f"{start}-{kind}{mark}idx{number}-ubyte{end}"
        for end in ("", ".gz")
        for start in SPLITS[split]
        for mark in "-."
    )
    return next((path for name in names if (path := folder / name).is_file()), None)
