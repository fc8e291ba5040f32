"""A model folder on disk: its shards, tensors and other files, read tensor by tensor.

Knows the Hugging Face layout (`model.safetensors`, or shards behind `model.safetensors.index.json`) and imports no model
code. Nothing is unpickled, and no path named by the index leaves the folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdef.errors import CheckpointError
from specdef.weights.header import DTYPE_BITS, Header, TensorInfo, read_header

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
SIGNATURE_NAME = "model.sig"
CERTIFICATE_NAME = "specdef_certificate.json"
COMPENSATION_NAME = "specdef_compensation.safetensors"
BASE_CONFIG_NAME = "specdef_base_config.json"
"""Where a compensated folder keeps the original config.json, byte for byte."""

BLOCK_BYTES = 8 * 2**20
"""Size of the blocks tensors are read in: large enough for disks, small enough to stay in cache while hashed twice."""

TORCH_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32,
    "F64": torch.float64, "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
    "C64": torch.complex64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}

_SHARD = re.compile(r"(.*)-\d{5}-of-\d{5}\.safetensors$")
# Other copies of the weights. Carried over, an unlocked one would sit beside the locked model.
_WEIGHT_SUFFIXES = {
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".onnx_data", ".gguf",
    ".ggml", ".pkl", ".pickle", ".npz", ".npy", ".tflite", ".mlmodel", ".nemo", ".ot", ".pte", ".distcp",
    ".engine", ".llamafile",
}  # fmt: skip
_WRAPPERS = {".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".bak", ".old", ".orig", ".data"}
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
            names, weight_map = _shards(folder)
        except OSError as error:
            raise CheckpointError(f"cannot be read ({error.strerror})", path=folder) from error
        headers = {name: read_header(_inside(folder, name)) for name in names}
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
        path = _inside(folder, "config.json")
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
                (dropped if _is_weights(file) else carried).append(path.as_posix())
        for name in carried:
            if not _inside(self.folder, name).is_file():
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
        for prefix in _prefixes(shape[:axis]):
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


def as_tensor(buffer: bytes | bytearray | memoryview, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """View writable bytes as a tensor.

    Args:
        buffer: The bytes.
        dtype: Dtype name from a header.
        shape: Shape of the result.

    Returns:
        A tensor that shares the memory.

    Raises:
        CheckpointError: torch has no such dtype.
    """
    if dtype not in TORCH_DTYPES:
        raise CheckpointError(f"dtype {dtype} cannot be read here")
    if len(buffer) == 0:
        return torch.empty(shape, dtype=TORCH_DTYPES[dtype])
    return torch.frombuffer(buffer, dtype=TORCH_DTYPES[dtype]).view(shape)


def as_bytes(tensor: Tensor) -> memoryview:
    """View a contiguous CPU tensor as bytes."""
    flat = tensor.detach().contiguous().reshape(-1)
    if not flat.numel():
        return memoryview(b"")
    view: Any = flat.view(torch.uint8).numpy()
    return memoryview(view)


def tensor_sha256(tensor: Tensor) -> str:
    """Hash a tensor's bytes as they would stand in a file."""
    return hashlib.sha256(as_bytes(tensor.cpu())).hexdigest()


def file_sha256(path: Path) -> str:
    """Hash a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: The file.

    Returns:
        The object.

    Raises:
        CheckpointError: It cannot be read or is no object.
    """
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited on forever
            raise CheckpointError("is not a regular file", path=path)
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot be read ({error.strerror})", path=path) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"is not valid JSON ({error})", path=path) from error
    if not isinstance(value, dict):
        raise CheckpointError("is not a JSON object", path=path)
    return value


def _shards(folder: Path) -> tuple[list[str], dict[str, str] | None]:
    files = sorted(p.name for p in folder.iterdir() if p.suffix == ".safetensors")
    files = [name for name in files if name != COMPENSATION_NAME]
    has_index = os.path.lexists(_inside(folder, INDEX_NAME))
    if has_index and SINGLE_NAME in files:
        raise CheckpointError(
            f"holds both {SINGLE_NAME} and {INDEX_NAME}", path=folder,
            hint="Runtimes differ in which they load; remove the stale one.",
        )  # fmt: skip
    if has_index:
        weight_map = read_json(folder / INDEX_NAME).get("weight_map")
        if not isinstance(weight_map, dict) or not all(
            isinstance(v, str) for v in weight_map.values()
        ):
            raise CheckpointError("has no weight_map of file names", path=folder / INDEX_NAME)
        names = sorted(set(weight_map.values()))
        for name in names:
            path = _inside(folder, name)
            if path.suffix != ".safetensors" or path.relative_to(folder).as_posix() != name:
                raise CheckpointError(
                    f"names {name!r:.80}, which is no plain name of a safetensors file",
                    path=folder / INDEX_NAME,
                )
            if not path.is_file():
                raise CheckpointError(
                    "shard is missing",
                    path=folder / name,
                    hint="The download is incomplete; fetch it again.",
                )
        # A second set under another name (consolidated-…) is another copy of the weights: not read, not carried
        sets = {match[1] for name in names if (match := _SHARD.match(name))}
        extra = [
            name
            for name in files
            if (match := _SHARD.match(name)) and match[1] in sets and name not in names
        ]
        if extra:
            raise CheckpointError(
                "shard is not named in the index",
                path=folder / extra[0],
                hint="Remove it, or fix the index.",
            )
        return names, weight_map
    if SINGLE_NAME in files:
        return [SINGLE_NAME], None
    if any(_SHARD.match(name) for name in files):
        raise CheckpointError(
            f"holds shards but no {INDEX_NAME}", path=folder, hint="Fetch the index too."
        )
    if len(files) == 1 and files[0] != "adapter_model.safetensors":
        return files, None
    if files:
        raise CheckpointError(
            f"holds {', '.join(files)}, none of which is a whole model", path=folder,
            hint="Merge an adapter into its base model first.",
        )  # fmt: skip
    pickled = [p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt")]
    raise CheckpointError(
        f"holds no safetensors file{f', only pickled ones ({pickled[0]})' if pickled else ''}", path=folder,
        hint="Pickled weights are never read; save the model with save_pretrained(…) first.",
    )  # fmt: skip


def _inside(folder: Path, name: str) -> Path:
    """Join, refusing names and links that leave the folder (a hub cache links to its own blobs)."""
    path = folder / name
    parts = Path(name).parts
    try:
        root = folder.resolve()
        target = path.resolve()
    except (ValueError, RuntimeError) as error:  # a NUL character; links in a circle
        raise CheckpointError(f"path {name!r:.80} cannot be followed", path=folder) from error
    blobs = root.parent.parent / "blobs"
    at_home = target.is_relative_to(root) or (
        root.parent.name == "snapshots" and target.is_relative_to(blobs)
    )
    if not name or "\\" in name or Path(name).is_absolute() or ".." in parts or not at_home:
        raise CheckpointError(
            f"path {name!r:.80} leaves the folder",
            path=folder,
            hint="Do not trust this checkpoint.",
        )
    return path


def _is_weights(file: str) -> bool:
    """Say whether a file name is that of another copy of the weights, also of a packed or renamed one."""
    suffixes = [suffix.lower() for suffix in Path(file).suffixes]
    while suffixes and suffixes[-1] in _WRAPPERS:
        suffixes.pop()
    return bool(suffixes) and (
        suffixes[-1] in _WEIGHT_SUFFIXES or suffixes[-2:] == [".index", ".json"]
    )


def _prefixes(shape: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    if not shape:
        yield ()
        return
    for i in range(shape[0]):
        for rest in _prefixes(shape[1:]):
            yield (i, *rest)
