"""A model folder on disk: its shards, tensors and other files, read tensor by tensor.

Knows the Hugging Face layout (`model.safetensors`, or shards behind `model.safetensors.index.json`) and imports no model
code. Nothing is unpickled, and no path named by the index leaves the folder.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

from torch import Tensor

from specdef.errors import CheckpointError
from specdef.weights.folder import (
    CERTIFICATE_NAME,
    COMPENSATION_NAME,
    INDEX_NAME,
    SIGNATURE_NAME,
    find_shards,
    inside,
    is_weights,
    read_json,
)
from specdef.weights.header import DTYPE_BITS, Header, TensorInfo, read_header
from specdef.weights.tensor_bytes import as_tensor

BLOCK_BYTES = 8 * 2**20
"""Size of the blocks tensors are read in: large enough for disks, small enough to stay in cache while hashed twice."""

_QUANTISED = re.compile(
    r"\.(qweight|qzeros|scales|absmax|quant_map|quant_state.*|weight_scale.*|SCB)$|_(blocks|scales)$"
)


@dataclass(frozen=True)
class Checkpoint:
    """An open folder; construct with `Checkpoint.open`.

    Args:
        folder: The folder.
        headers: Shard file name to parsed header, in the order of the names.
        location: Tensor name to shard file name.
        config: `config.json`, or {} where the folder has none.
    """

    folder: Path
    headers: dict[str, Header]
    location: dict[str, str]
    config: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        """Open a folder and check that its index, shards and headers agree.

        Args:
            folder: A local model folder.

        Returns:
            The checkpoint; only headers and JSON files have been read.

        Raises:
            CheckpointError: Anything is missing, damaged, contradictory or points outside the folder.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise CheckpointError(
                "is not a folder", path=folder, hint="Name a model folder or hub id."
            )
        try:
            names, weight_map = find_shards(folder)
        except OSError as error:
            raise CheckpointError(f"cannot be read ({error.strerror})", path=folder) from error
        headers = {name: read_header(inside(folder, name)) for name in names}
        location: dict[str, str] = {}
        for shard, header in headers.items():
            for tensor in header.tensors:
                if tensor in location:
                    raise CheckpointError(
                        f"stands in {location[tensor]} and in {shard}", path=folder, tensor=tensor,
                        hint="Remove the stale shard.",
                    )  # fmt: skip
                location[tensor] = shard
        if weight_map is not None and weight_map != location:
            odd = next(
                n for n in {**weight_map, **location} if weight_map.get(n) != location.get(n)
            )
            raise CheckpointError(
                f"index says {weight_map.get(odd, 'nothing')}, the shards say {location.get(odd, 'nothing')}",
                path=folder / INDEX_NAME, tensor=odd, hint="The download is incomplete or mixed; fetch it again.",
            )  # fmt: skip
        if not location:
            raise CheckpointError("holds no tensors", path=folder)
        path = inside(folder, "config.json")
        config = read_json(path) if os.path.lexists(path) else {}
        return cls(folder=folder, headers=headers, location=location, config=config)

    def __contains__(self, name: str) -> bool:
        return name in self.location

    @property
    def names(self) -> tuple[str, ...]:
        """Tensor names in file order."""
        return tuple(self.location)

    @cached_property
    def infos(self) -> dict[str, TensorInfo]:
        """Tensor name to header entry."""
        return {n: info for header in self.headers.values() for n, info in header.tensors.items()}

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor name to shape."""
        return {name: info.shape for name, info in self.infos.items()}

    @cached_property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(info.nbytes for info in self.infos.values())

    def info(self, name: str) -> TensorInfo:
        """Return the header entry of a tensor.

        Args:
            name: Its name.

        Returns:
            The entry.

        Raises:
            CheckpointError: There is no such tensor.
        """
        try:
            return self.infos[name]
        except KeyError:
            raise CheckpointError("no such tensor", path=self.folder, tensor=name) from None

    def read(self, name: str) -> Tensor:
        """Read a whole tensor.

        Args:
            name: Its name.

        Returns:
            The tensor, in memory of its own.
        """
        info = self.info(name)
        buffer = bytearray(info.nbytes)
        with TensorFile(self, name) as file:
            file.read_into(memoryview(buffer), 0)
        return as_tensor(buffer, info.dtype, info.shape)

    def require_float(self) -> None:
        """Refuse quantised weights.

        Raises:
            CheckpointError: The weights are stored in an integer, 8-bit or 4-bit format.
        """
        hint = "Lock the float checkpoint it was made from (docs/limits.md says what quantising a lock costs)."
        settings = self.config.get("quantization_config") or self.config.get("compression_config")
        if settings:
            method = (
                settings.get("quant_method", "unknown") if isinstance(settings, dict) else settings
            )
            raise CheckpointError(
                f"is quantised ({method!s:.80})", path=self.folder / "config.json", hint=hint
            )
        for name, info in self.infos.items():
            # 8-bit integers under other names are masks and tables
            packed = info.dtype.startswith(("F8_", "F6_", "F4")) or (
                info.dtype in ("I8", "U8") and name.endswith("weight")
            )
            if _QUANTISED.search(name) or (packed and len(info.shape) >= 2):
                raise CheckpointError(
                    f"is quantised ({info.dtype})", path=self.folder, tensor=name, hint=hint
                )

    def other_files(self) -> tuple[list[str], list[str]]:
        """List the files that are not the weights.

        Returns:
            (carried, dropped): relative paths of files to copy, and of other copies of the weights, which are not.

        Raises:
            CheckpointError: A link leaves the folder or leads nowhere, or something is no file (a pipe).
        """
        carried: list[str] = []
        dropped: list[str] = []
        ours = {*self.headers, INDEX_NAME, CERTIFICATE_NAME, COMPENSATION_NAME}
        for root, folders, files in os.walk(self.folder):
            folders[:] = sorted(d for d in folders if not d.startswith("."))
            for file in sorted(files):
                path = (Path(root) / file).relative_to(self.folder)
                if str(path) in ours or str(path) == SIGNATURE_NAME or file.startswith(".specdef"):
                    continue
                (dropped if is_weights(file) else carried).append(path.as_posix())
        for name in carried:
            if not inside(self.folder, name).is_file():
                raise CheckpointError(
                    "is a broken link or no ordinary file",
                    path=self.folder / name,
                    hint="The download is incomplete; fetch it again, or remove the entry.",
                )
        return carried, dropped


class TensorFile:
    """The bytes of one tensor, read at any offset; safe to use one per thread.

    Args:
        checkpoint: The folder.
        name: The tensor.
    """

    def __init__(self, checkpoint: Checkpoint, name: str) -> None:
        self.info = checkpoint.info(name)
        # A row of 4- or 6-bit elements may end inside a byte: such a tensor is cut as the bytes it is.
        whole = DTYPE_BITS[self.info.dtype] % 8 == 0
        self.shape = self.info.shape if whole else (self.info.nbytes,)
        shard = checkpoint.location[name]
        self._path = checkpoint.folder / shard
        self._offset = checkpoint.headers[shard].data_start + self.info.begin

    def __enter__(self) -> TensorFile:
        try:
            self._handle = os.open(self._path, os.O_RDONLY)
        except OSError as error:
            raise CheckpointError(f"cannot be read ({error.strerror})", path=self._path) from error
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._handle)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` with the tensor's bytes from `offset` on.

        Raises:
            CheckpointError: The file ends early or cannot be read.
        """
        done = 0
        while done < len(buffer):
            try:
                got = os.preadv(self._handle, [buffer[done:]], self._offset + offset + done)
            except OSError as error:
                raise CheckpointError(
                    f"cannot be read ({error.strerror})", path=self._path, tensor=self.info.name
                ) from error
            if got == 0:
                raise CheckpointError("file ends early", path=self._path, tensor=self.info.name)
            done += got

    def blocks(
        self, max_bytes: int = BLOCK_BYTES
    ) -> Iterator[tuple[tuple[int, ...], int, int, int]]:
        """Cut the tensor into blocks of whole rows.

        Args:
            max_bytes: Largest size of a block, unless one row of the last axis is larger.

        Yields:
            (prefix, start, rows, offset): fixed indices of the leading axes, first row and number of rows along the
            axis behind them, and the block's first byte. A scalar is one block of one row.
        """
        shape = self.shape
        if self.info.nbytes == 0 or not shape:
            yield (), 0, shape[0] if shape else 1, 0
            return
        axis, row = 0, self.info.nbytes // shape[0]
        while row > max_bytes and axis + 1 < len(shape):
            axis += 1
            row //= shape[axis]
        step = max(1, max_bytes // row)
        offset = 0
        for prefix in product(*map(range, shape[:axis])):
            for start in range(0, shape[axis], step):
                rows = min(step, shape[axis] - start)
                yield prefix, start, rows, offset
                offset += rows * row

    def sha256(self) -> str:
        """Hash the tensor's bytes, a block at a time.

        Returns:
            Hex digest.
        """
        digest = hashlib.sha256()
        buffer = memoryview(bytearray(min(BLOCK_BYTES, self.info.nbytes)))
        for offset in range(0, self.info.nbytes, BLOCK_BYTES):
            part = buffer[: min(BLOCK_BYTES, self.info.nbytes - offset)]
            self.read_into(part, offset)
            digest.update(part)
        return digest.hexdigest()
