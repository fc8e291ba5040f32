"""The safetensors header: parsed strictly, kept byte for byte when nothing in it changes.

A safetensors file is 8 bytes of little-endian header length N, N bytes of JSON, then the tensors end to end. Everything
here treats the header as hostile: it is read from a file anyone may have written.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specdef.errors import CheckpointError

DTYPE_BITS = {
    "U64": 64, "I64": 64, "F64": 64, "C64": 64, "F32": 32, "U32": 32, "I32": 32,
    "BF16": 16, "F16": 16, "U16": 16, "I16": 16,
    "F8_E5M2FNUZ": 8, "F8_E4M3FNUZ": 8, "F8_E8M0": 8, "F8_E4M3": 8, "F8_E5M2": 8, "I8": 8, "U8": 8,
    "F6_E3M2": 6, "F6_E2M3": 6, "F4": 4, "BOOL": 8,
}  # fmt: skip
"""Bits per element of every dtype the safetensors format names, in the order the reference implementation writes them."""

FLOAT_DTYPES = ("F64", "F32", "BF16", "F16")
"""Dtypes whose values can be edited; all others are carried over untouched."""

MAX_HEADER_BYTES = 100_000_000
"""The limit the reference implementation of safetensors sets."""

MAX_AXES = 64
"""The most axes torch and numpy compute with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """One entry of a header.

    Args:
        name: Tensor name.
        dtype: Name of the dtype, as in the header ("BF16").
        shape: Lengths of the axes.
        begin: First byte, counted from the end of the header.
        end: One past the last byte.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.end - self.begin

    @property
    def is_float(self) -> bool:
        """Whether the values can be edited."""
        return self.dtype in FLOAT_DTYPES


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """A parsed header.

    Args:
        tensors: Entries in file order.
        metadata: The `__metadata__` entry; strings only.
        raw: The bytes it was parsed from, length prefix included.
    """

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    raw: bytes

    @property
    def data_start(self) -> int:
        """Offset of the first tensor byte in the file."""
        return len(self.raw)


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file.

    Args:
        path: The file.

    Returns:
        The header; its tensors tile the rest of the file exactly.

    Raises:
        CheckpointError: The file is missing, truncated, or its header lies about it.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited on forever
            raise CheckpointError("is not a regular file", path=path)
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            if len(prefix) < 8:
                raise _bad(path, f"is {size} bytes long, too short for a safetensors file")
            length = int.from_bytes(prefix, "little")
            if length > min(MAX_HEADER_BYTES, size - 8):
                raise _bad(path, f"header claims {length} bytes, the file holds {size - 8}")
            body = file.read(length)
    except OSError as error:
        raise CheckpointError(f"cannot be read ({error.strerror})", path=path) from error
    return parse_header(prefix + body, size, path=path)


def parse_header(raw: bytes, file_size: int, *, path: str | Path = "") -> Header:
    """Parse header bytes and check them against the size of the file.

    Differs from the reference implementation in that duplicate keys and more than 64 axes are refused too.

    Args:
        raw: Length prefix and JSON.
        file_size: Size of the whole file in bytes.
        path: Named in errors.

    Returns:
        The header.

    Raises:
        CheckpointError: Anything is not as the format demands.
    """
    if len(raw) < 8 or int.from_bytes(raw[:8], "little") != len(raw) - 8:
        raise _bad(path, "header length does not match")
    if raw[8:9] != b"{":
        raise _bad(path, "header is not a JSON object")
    try:
        entries = json.loads(raw[8:].decode("utf-8"), object_pairs_hook=_unique)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise _bad(path, f"header is not valid JSON ({error})") from error
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(map(_is_text, metadata.values())):
        raise _bad(path, "__metadata__ must map strings to strings")
    infos = sorted(
        (_entry(name, entry, path) for name, entry in entries.items()),
        key=lambda info: (info.begin, info.end),
    )
    end = 0
    for info in infos:  # tensors tile the data: no hole, no overlap, nothing behind the end
        if info.begin != end:
            what = (
                "overlaps the tensor before it" if info.begin < end else "leaves a hole before it"
            )
            raise _bad(path, f"data_offsets [{info.begin}, {info.end}] {what}", info.name)
        end = info.end
    if len(raw) + end != file_size:
        raise _bad(path, f"header describes {len(raw) + end} bytes, the file has {file_size}")
    return Header(tensors={info.name: info for info in infos}, metadata=metadata, raw=raw)


def build_header(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> Header:
    """Build a header for tensors laid end to end in the given order, as the reference implementation writes it.

    Args:
        tensors: Name to (dtype name, shape).
        metadata: Strings carried in `__metadata__`.

    Returns:
        The header, its JSON padded with spaces to a multiple of 8 bytes.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    infos, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + _nbytes(dtype, shape)
        infos[name] = TensorInfo(name=name, dtype=dtype, shape=tuple(shape), begin=begin, end=end)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    body = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    body += b" " * (-len(body) % 8)
    return Header(
        tensors=infos, metadata=dict(metadata), raw=len(body).to_bytes(8, "little") + body
    )


def _entry(name: str, entry: Any, path: str | Path) -> TensorInfo:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _bad(path, "entry must have dtype, shape and data_offsets alone", name)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _bad(path, f"unknown dtype {dtype!r:.80}", name)
    if not _naturals(shape) or len(shape) > MAX_AXES:
        raise _bad(path, f"shape {shape!r:.80} is not a list of non-negative integers", name)
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _bad(path, f"data_offsets {offsets!r:.80} are not two rising integers", name)
    if DTYPE_BITS[dtype] * _prod(shape) != 8 * (offsets[1] - offsets[0]):
        raise _bad(path, f"{dtype} {shape} does not fill data_offsets {offsets}", name)
    return TensorInfo(name=name, dtype=dtype, shape=tuple(shape), begin=offsets[0], end=offsets[1])


def _naturals(value: Any) -> bool:
    # bool is an int in Python, but not in JSON; 2**48 elements are more than any file system holds
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**48 for n in value)


def _prod(shape: list[int] | tuple[int, ...]) -> int:
    out = 1
    for n in shape:
        out *= n
    return out


def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    return DTYPE_BITS[dtype] * _prod(shape) // 8


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("duplicate key")
    if not all(map(_is_text, out)):
        raise ValueError("key is no Unicode text")
    return out


def _is_text(value: Any) -> bool:
    """Say whether a value is a string that can be encoded: JSON can escape half of a surrogate pair."""
    return isinstance(value, str) and (
        value.isascii() or not any("\ud800" <= char <= "\udfff" for char in value)
    )


def _bad(path: str | Path, message: str, tensor: str = "") -> CheckpointError:
    return CheckpointError(
        message,
        path=path,
        tensor=tensor,
        hint="The file is damaged or was not written by safetensors; fetch it again.",
    )
