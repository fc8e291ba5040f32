"""The key: what the owner keeps to undo a lock, one safetensors file.

absorbed: the list of exact scalings. compensated and scaled: the basis U_k and scale of every matrix, and the residual
that rounding W~ to its dtype lost. Anything else in the world can be rebuilt; the key alone makes it exact.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from specdef.errors import CheckpointError, KeyMismatch
from specdef.lock.config import LockConfig
from specdef.lock.plan import LockPlan, Projection
from specdef.weights.atomic import atomic_file
from specdef.weights.edit import ScaleEdit
from specdef.weights.header import FLOAT_DTYPES, read_header
from specdef.weights.rewrite import TensorHashes
from specdef.weights.tensor_bytes import as_bytes

_FORMAT = "specdef-key-1"
_COLUMNS = ("tensor", "axis", "position", "exponent", "lead")


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """What undoes a lock.

    Args:
        method: The lock method.
        config: The recipe.
        scalings: Tensor name to the scalings the lock applied.
        projections: Tensor name to projection.
        residuals: Tensor name to what restores its exact bytes, see `encode_residual`.
        hashes: Tensor name to SHA-256 of the original and of the locked tensor, as they were at lock time.
    """

    method: str
    config: LockConfig
    scalings: Mapping[str, tuple[ScaleEdit, ...]] = field(default_factory=dict)
    projections: Mapping[str, Projection] = field(default_factory=dict)
    residuals: Mapping[str, Tensor] = field(default_factory=dict)
    hashes: Mapping[str, TensorHashes] = field(default_factory=dict)

    @classmethod
    def from_plan(cls, plan: LockPlan, config: LockConfig) -> Key:
        """Start a key from a plan; residuals and hashes are added once the tensors are written."""
        return cls(
            method=plan.method, config=config, scalings=plan.scalings, projections=plan.projections
        )

    @property
    def lock_id(self) -> str:
        """Name of the transformation: equal for equal scalings and bases, whatever the weights are by now."""
        digest = hashlib.sha256(self.method.encode())
        tensors, names = self._transformation()
        digest.update(json.dumps(names).encode())
        for name in sorted(tensors):
            digest.update(name.encode() + as_bytes(tensors[name]))
        return digest.hexdigest()

    def save(self, path: str | Path) -> Path:
        """Write the key file, whole or not at all.

        Args:
            path: The file.

        Returns:
            The path.

        Raises:
            CheckpointError: It cannot be written, or another lock's key stands there.
        """
        path = Path(path)
        self.require_place(path)
        tensors, names = self._transformation()
        tensors |= {f"residual.{name}": value for name, value in self.residuals.items()}
        metadata = {
            "format": _FORMAT,
            "method": self.method,
            "config": json.dumps(self.config.to_dict()),
            "lock_id": self.lock_id,
            "names": json.dumps(names),
            "hashes": json.dumps({name: [h.before, h.after] for name, h in self.hashes.items()}),
        }
        data = save(tensors, metadata)
        with atomic_file(path) as work:
            work.touch(mode=0o600)  # before the first byte: nobody else may open it in between
            work.write_bytes(data)
        return path

    def require_place(self, path: Path) -> None:
        """Refuse to write over another lock's key, or over a file that is none.

        Args:
            path: Where the key is to go.

        Raises:
            CheckpointError: Something else stands there.
        """
        hint = "Name another --key; a lost key is a lost original."
        if path.is_dir():
            raise CheckpointError("is a folder", path=path, hint=hint)
        if not path.exists():
            return
        try:
            own = load_key(path).lock_id == self.lock_id
        except CheckpointError as error:
            raise CheckpointError("exists and is not a key", path=path, hint=hint) from error
        if not own:
            raise CheckpointError("is the key of another lock", path=path, hint=hint)

    def _transformation(self) -> tuple[dict[str, Tensor], list[str]]:
        if self.projections:
            names = list(self.projections)
            tensors = {f"basis.{n}": p.basis.contiguous() for n, p in self.projections.items()}
            numbers = [
                [p.scale, float(p.transposed), FLOAT_DTYPES.index(p.dtype)]
                for p in self.projections.values()
            ]
            return tensors | {"numbers": torch.tensor(numbers, dtype=torch.float64)}, names
        names = list(self.scalings)
        rows = [
            (i, edit.axis, edit.position, edit.exponent, edit.lead[0] if edit.lead else -1)
            for i, name in enumerate(names)
            for edit in self.scalings[name]
        ]
        return {"scalings": torch.tensor(rows, dtype=torch.int64).reshape(-1, len(_COLUMNS))}, names


def load_key(path: str | Path) -> Key:
    """Read a key file.

    Args:
        path: The file.

    Returns:
        The key.

    Raises:
        CheckpointError: It is missing, damaged, or not a specdef key.
    """
    path = Path(path)
    header = read_header(path)  # checked strictly before anything is loaded
    meta = header.metadata
    if meta.get("format") != _FORMAT:
        raise CheckpointError(
            f"is not a specdef key (format {meta.get('format')!r})",
            path=path,
            hint="Give the file that `specdef lock` wrote.",
        )
    try:
        tensors = load_file(path)
        names: list[str] = json.loads(meta["names"])
        hashes = {
            n: TensorHashes(before=b, after=a) for n, (b, a) in json.loads(meta["hashes"]).items()
        }
        scalings, projections = _read_transformation(tensors, names)
        key = Key(
            method=meta["method"],
            config=LockConfig.from_dict(json.loads(meta["config"])),
            scalings=scalings,
            projections=projections,
            residuals={
                n.removeprefix("residual."): t
                for n, t in tensors.items()
                if n.startswith("residual.")
            },
            hashes=hashes,
        )
    except (KeyError, ValueError, TypeError, IndexError, AttributeError, SafetensorError) as error:
        raise CheckpointError(f"is a damaged key ({error})", path=path) from error
    if key.lock_id != meta.get("lock_id"):
        raise CheckpointError(
            "is a damaged key (its identity does not match its content)", path=path
        )
    return key


def require_match(key: Key, certificate: Mapping[str, Any]) -> None:
    """Refuse a key that belongs to another lock.

    Raises:
        KeyMismatch: The certificate names another lock.
    """
    if certificate.get("lock_id") != key.lock_id:
        raise KeyMismatch(
            f"the key is of lock {key.lock_id[:12]}, the model was locked as {str(certificate.get('lock_id'))[:12]}",
            hint="Use the key that was written when this model was locked.",
        )


def encode_residual(original: Tensor, rebuilt: Tensor) -> Tensor:
    """Compress what `rebuilt` lacks to be `original`, to the last bit.

    The bits of a float, read as a sign-magnitude integer, count the floats in order; the residual is the difference of
    these counts, a few units in the last place times the scale, and compresses to little more than its entropy.

    Args:
        original: Any float tensor.
        rebuilt: Same shape and dtype, close to it.

    Returns:
        (n,) uint8.
    """
    difference = _order(original) - _order(rebuilt)
    zigzag = np.where(difference >= 0, 2 * difference, -2 * difference - 1).astype(np.uint64)
    planes = zigzag.reshape(-1).view(np.uint8).reshape(-1, 8).T
    return torch.frombuffer(
        bytearray(zlib.compress(np.ascontiguousarray(planes).tobytes(), 6)), dtype=torch.uint8
    )


def decode_residual(residual: Tensor, rebuilt: Tensor) -> Tensor:
    """Return the original from `rebuilt` and what `encode_residual` gave.

    Args:
        residual: (n,) uint8.
        rebuilt: The same tensor as at encoding.

    Returns:
        The original, bit for bit.

    Raises:
        ValueError: The residual does not fit the tensor.
    """
    try:
        planes = np.frombuffer(zlib.decompress(bytes(as_bytes(residual))), dtype=np.uint8)
    except zlib.error as error:
        raise ValueError(f"residual cannot be decompressed: {error}") from error
    if planes.size != 8 * rebuilt.numel():
        raise ValueError("residual does not fit the tensor")
    zigzag = np.ascontiguousarray(planes.reshape(8, -1).T).view(np.uint64).reshape(-1)
    difference = np.where(zigzag % 2 == 0, zigzag // 2, 0).astype(np.int64) - np.where(
        zigzag % 2 == 1, zigzag // 2 + 1, 0
    ).astype(np.int64)
    return _from_order(_order(rebuilt).reshape(-1) + difference, rebuilt)


_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _order(values: Tensor) -> np.ndarray[Any, np.dtype[np.int64]]:
    bits = values.contiguous().view(_INTEGERS[values.element_size()]).to(torch.int64).numpy()
    lowest = -(1 << (8 * values.element_size() - 1))
    # -0.0 counts as -1, so that it stays apart from +0.0. lowest - 1 alone would not fit 64 bits.
    return np.where(bits >= 0, bits, lowest - (bits + 1))


def _from_order(order: np.ndarray[Any, np.dtype[np.int64]], like: Tensor) -> Tensor:
    lowest = -(1 << (8 * like.element_size() - 1))
    bits = np.where(order >= 0, order, lowest - (order + 1))
    return (
        torch.from_numpy(bits)
        .to(_INTEGERS[like.element_size()])
        .view(like.dtype)
        .reshape(like.shape)
    )


def _read_transformation(
    tensors: Mapping[str, Tensor], names: list[str]
) -> tuple[dict[str, tuple[ScaleEdit, ...]], dict[str, Projection]]:
    if "scalings" in tensors:
        scalings: dict[str, list[ScaleEdit]] = {name: [] for name in names}
        for i, axis, position, exponent, lead in tensors["scalings"].tolist():
            edit = ScaleEdit(
                axis=axis, position=position, exponent=exponent, lead=() if lead < 0 else (lead,)
            )
            scalings[names[i]].append(edit)
        return {name: tuple(edits) for name, edits in scalings.items()}, {}
    numbers = tensors["numbers"].tolist()
    return {}, {
        name: Projection(
            basis=tensors[f"basis.{name}"],
            scale=scale,
            dtype=FLOAT_DTYPES[int(dtype)],
            transposed=bool(transposed),
        )
        for name, (scale, transposed, dtype) in zip(names, numbers, strict=True)
    }
