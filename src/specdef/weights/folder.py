"""The files of a model folder: their names, which of them are the weights, and that none lies outside.

The Hugging Face layout: `model.safetensors`, or shards behind `model.safetensors.index.json`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from specdef.errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
SIGNATURE_NAME = "model.sig"
CERTIFICATE_NAME = "specdef_certificate.json"
CERTIFICATE_BELOW_NAME = "specdef_certificate_below.json"
"""Where a folder locked on top of a lock keeps the certificate of the lower one, byte for byte."""
COMPENSATION_NAME = "specdef_compensation.safetensors"
BASE_CONFIG_NAME = "specdef_base_config.json"
"""Where a compensated folder keeps the original config.json, byte for byte."""

_SHARD = re.compile(r"(.*)-\d{5}-of-\d{5}\.safetensors$")
# Other copies of the weights. Carried over, an unlocked one would sit beside the locked model.
_WEIGHT_SUFFIXES = {
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".onnx_data", ".gguf",
    ".ggml", ".pkl", ".pickle", ".npz", ".npy", ".tflite", ".mlmodel", ".nemo", ".ot", ".pte", ".distcp",
    ".engine", ".llamafile",
}  # fmt: skip
_WRAPPERS = {".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".bak", ".old", ".orig", ".data"}


def find_shards(folder: Path) -> tuple[list[str], dict[str, str] | None]:
    """Return the names of the shards that make up the model, and the index's tensor to shard table if there is one.

    Raises:
        CheckpointError: No whole model can be made out, or more than one.
    """
    files = sorted(p.name for p in folder.iterdir() if p.suffix == ".safetensors")
    files = [name for name in files if name != COMPENSATION_NAME]
    has_index = os.path.lexists(inside(folder, INDEX_NAME))
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
            path = inside(folder, name)
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


def inside(folder: Path, name: str) -> Path:
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


def is_weights(file: str) -> bool:
    """Say whether a file name is that of another copy of the weights, also of a packed or renamed one."""
    suffixes = [suffix.lower() for suffix in Path(file).suffixes]
    while suffixes and suffixes[-1] in _WRAPPERS:
        suffixes.pop()
    return bool(suffixes) and (
        suffixes[-1] in _WEIGHT_SUFFIXES or suffixes[-2:] == [".index", ".json"]
    )


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


def file_sha256(path: Path) -> str:
    """Hash a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
