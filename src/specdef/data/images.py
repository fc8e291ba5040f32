"""Batches for image classification: pictures from files, data sets and arrays."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from specdef.data.columns import IMAGE, LABEL, find_column
from specdef.data.draw import draw_rows
from specdef.data.labels import class_indices
from specdef.data.records import Records
from specdef.errors import SpecDefError

ARRAYS = ("images", "image", "data", "x")
"""Names of the array of pictures in a `.npz` file."""

LABELS = ("labels", "label", "target", "targets", "y")
"""Names of the array of classes in a `.npz` file."""

_DEFAULT_SIDE = 224  # what nearly all image classifiers without an image_size were trained on


def image_batches(
    records: Records,
    config: Any,
    processor: Any,
    *,
    batch_size: int,
    num_batches: int,
    seed: int,
    columns: Mapping[str, str],
    note: Callable[[str], None],
) -> list[dict[str, Tensor]]:
    """Draw batches for an image classifier.

    Args:
        records: Rows with a picture (file, bytes, array) and a label.
        config: The model's transformers config.
        processor: Its image processor. None: pictures are resized to `config.image_size` and scaled to [0, 1].
        batch_size: Rows per batch.
        num_batches: Batches to return.
        seed: Decides which rows are drawn.
        columns: Role -> column, as the caller gave it.
        note: Told how pictures were prepared without a processor, and how names of classes were translated.

    Returns:
        Dicts of `pixel_values` float32 `[batch_size, channels, height, width]` and `labels` int64 `[batch_size]`.

    Raises:
        SpecDefError: There are too few rows, a picture is damaged, or a label is missing or out of range.
    """
    column = find_column("image", IMAGE, columns, records.columns, records.source)
    label = find_column("label", LABEL, columns, records.columns, records.source)
    indices = class_indices(
        records.column(label), config, names=records.class_names.get(label), place=records.places, note=note
    )  # fmt: skip
    drawn = draw_rows(records, batch_size, num_batches, seed)
    if processor is None:
        side = _sides(config)
        note(f"no preprocessor_config.json: pictures are resized to {side[0]} x {side[1]} and scaled to [0, 1]")  # fmt: skip
    batches = []
    for start in range(0, len(drawn), batch_size):
        rows = drawn[start : start + batch_size]
        pictures = [_picture(records.rows[i].get(column), records.places(i), config) for i in rows]
        values = _plain(pictures, config) if processor is None else _processed(pictures, processor, records.source)  # fmt: skip
        batches.append(
            {"pixel_values": values, "labels": torch.tensor([indices[i] for i in rows], dtype=torch.int64)}
        )  # fmt: skip
    return batches


def read_arrays(path: Path, config: Any) -> Records:
    """Read pictures and classes from a `.npz` file.

    Args:
        path: The file: `images` `[n, height, width]`, `[n, height, width, channels]` or `[n, channels, height, width]`, and
            `labels` `[n]` (see `ARRAYS` and `LABELS` for other names). Pictures of type uint8 are prepared like files.
            Floating pictures are used as they are, apart from the order of their axes.
        config: The model's transformers config: `num_channels` tells the axes apart.

    Returns:
        The records: arrays under "image", integers under "label".

    Raises:
        SpecDefError: The file is damaged, holds pickled objects or no such arrays, or their shapes do not fit.
    """
    try:
        # numpy leaves a file open that it cannot read
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
            names = list(stored)
            image = _array_name(ARRAYS, names, path)
            label = _array_name(LABELS, names, path)
            images, labels = stored[image], stored[label]
    except (OSError, ValueError, TypeError, AttributeError, EOFError, zlib.error, zipfile.BadZipFile) as error:  # fmt: skip
        raise SpecDefError(
            f"{path}: not a readable .npz file ({error}).",
            hint="Write it with numpy.savez(path, images=…, labels=…), from arrays of numbers.",
        ) from error
    channels = _channels(config)
    if images.dtype != np.uint8 and not np.issubdtype(images.dtype, np.floating):
        raise SpecDefError(
            f"{path}: {image} has type {images.dtype}.",
            hint="Write uint8 in 0..255, or floats that are prepared already.",
        )
    if images.ndim == 3:
        images = images[:, None]  # no axis of channels: grey
    elif images.ndim != 4:
        raise SpecDefError(
            f"{path}: {image} has shape {list(images.shape)}.",
            hint="Write [n, height, width], with an axis of channels behind n or at the end.",
        )
    elif images.shape[1] not in (1, channels) or (
        # Both ends could be channels: raw pictures keep them last, prepared ones first.
        images.dtype == np.uint8 and images.shape[3] in (1, channels)
    ):
        images = images.transpose(0, 3, 1, 2)
    if images.shape[1] not in (1, channels) or 0 in images.shape:
        raise SpecDefError(
            f"{path}: {image} has no axis of {channels} channels, as the model takes them, nor one of 1.",
            hint="Write [n, height, width, channels].",
        )
    if labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer):
        raise SpecDefError(
            f"{path}: {label} has shape {list(labels.shape)} and type {labels.dtype} for {len(images)} pictures.",
            hint="Write one integer per picture.",
        )
    return Records(
        source=str(path),
        columns=("image", "label"),
        rows=[{"image": x, "label": int(y)} for x, y in zip(images, labels, strict=True)],
        places=lambda i: f"{path}, picture {i}",
    )


def _array_name(known: Sequence[str], found: Sequence[str], path: Path) -> str:
    for name in known:
        if name in found:
            return name
    raise SpecDefError(
        f"{path}: no array {known[0]!r} among {', '.join(found) or 'none'}.",
        hint=f"Call it one of {', '.join(known)}.",
    )


def _channels(config: Any) -> int:
    return int(getattr(config, "num_channels", 3))


def _sides(config: Any) -> tuple[int, int]:
    """Return (height, width) that the model expects."""
    size = getattr(config, "image_size", _DEFAULT_SIDE)
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return int(height), int(width)


def _picture(value: Any, place: str, config: Any) -> Any:
    """Return a PIL image with the model's channels, or a prepared array `[channels, height, width]`."""
    channels = _channels(config)
    if channels not in (1, 3):
        raise SpecDefError(
            f"The model takes pictures of {channels} channels; only 1 and 3 can be read.",
            hint="Use a model with num_channels 1 or 3.",
        )
    if isinstance(value, np.ndarray) and value.dtype != np.uint8:
        return np.repeat(value, channels // value.shape[0], axis=0)
    try:
        if isinstance(value, np.ndarray):
            planes = value[0] if value.shape[0] == 1 else value.transpose(1, 2, 0)
            picture: Image.Image = Image.fromarray(planes)
        else:
            # A path inside a data set is not followed: it may name any file, or an address.
            content = value.get("bytes") if isinstance(value, Mapping) else value
            if not isinstance(content, bytes | Path):
                raise SpecDefError(
                    f"{place}: no picture.",
                    hint="Pictures are files in class folders, or stored inside the data set (save_to_disk does so).",
                )
            picture = Image.open(io.BytesIO(content) if isinstance(content, bytes) else content)
        with picture:
            if picture.mode == "F" or picture.mode.startswith("I"):
                raise SpecDefError(
                    f"{place}: the picture has more than 8 bits per channel.",
                    hint="Convert it to 8 bits, or give prepared floats in a .npz file.",
                )
            return picture.convert("RGB" if channels == 3 else "L")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise SpecDefError(
            f"{place}: the picture cannot be read ({error}).",
            hint="Remove or replace it.",
        ) from error


def _plain(pictures: list[Any], config: Any) -> Tensor:
    """Resize pictures to the model's size and scale them to [0, 1]; prepared arrays stay as they are."""
    height, width = _sides(config)
    rows = []
    for picture in pictures:
        if isinstance(picture, Image.Image):
            resized = picture.resize((width, height), Image.Resampling.BILINEAR)
            array = np.asarray(resized, dtype=np.float32) / 255.0
            picture = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
        rows.append(torch.from_numpy(np.ascontiguousarray(picture, dtype=np.float32)))
    return torch.stack(rows)


def _processed(pictures: list[Any], processor: Any, source: str) -> Tensor:
    """Prepare pictures as the model's folder says; prepared arrays stay as they are."""
    if not isinstance(pictures[0], Image.Image):
        return torch.from_numpy(np.stack(pictures).astype(np.float32))
    try:
        values: Tensor = processor(images=pictures, return_tensors="pt")["pixel_values"]
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise SpecDefError(
            f"{source}: the model's image processor does not take these pictures ({error}).",
            hint="Check preprocessor_config.json in the model's folder.",
        ) from error
    return values.float()
