"""The key: what the owner keeps to undo a lock, one safetensors file.

absorbed: the list of exact scalings. compensated and scaled: the basis U_k and scale of every matrix, and the residual
that rounding W~ to its dtype lost. deformation: the difference to the original, of every tensor that training changed.
Anything else in the world can be rebuilt; the key alone makes it exact.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from specdef.errors import CheckpointError, KeyMismatch
from specdef.lock.config import LockConfig
from specdef.lock.deformation.config import DeformationConfig
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
        residuals: Tensor name to what restores its exact bytes, see `encode_residual`; for deformation from the locked
            tensor itself, and only of tensors that changed.
        hashes: Tensor name to SHA-256 of the original and of the locked tensor, as they were at lock time.
    """

    method: str
    config: LockConfig | DeformationConfig
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
    def tensors(self) -> tuple[str, ...]:
        """Names of the tensors the lock changed."""
        return (*self.scalings, *(self.projections or self.residuals))

    @property
    def lock_id(self) -> str:
        """Name of the transformation: equal for equal scalings, bases or differences, whatever the weights are by now."""
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
        tensors |= self._residual_tensors()
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

    def _residual_tensors(self) -> dict[str, Tensor]:
        return {f"residual.{name}": value for name, value in self.residuals.items()}

    def _transformation(self) -> tuple[dict[str, Tensor], list[str]]:
        if self.method == "deformation":
            return self._residual_tensors(), sorted(self.residuals)
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
        deformed = meta["method"] == "deformation"
        scalings, projections = ({}, {}) if deformed else _read_transformation(tensors, names)
        recipe = json.loads(meta["config"])
        key = Key(
            method=meta["method"],
            config=DeformationConfig.from_dict(recipe)
            if deformed
            else LockConfig.from_dict(recipe),
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
        KeyMismatch: The certificate names another lock, or another lock on top of the key's.
    """
    if certificate.get("lock_id") != key.lock_id:
        own = f"the key is of lock {key.lock_id[:12]} ({key.method})"
        top = f"{str(certificate.get('lock_id'))[:12]} ({certificate.get('method')})"
        if (certificate.get("below") or {}).get("lock_id") == key.lock_id:
            raise KeyMismatch(
                f"{own}, and lock {top} is on top of that",
                hint="Unlock with the key of the lock on top, and what comes out with this one.",
            )
        raise KeyMismatch(
            f"{own}, the model was locked as {top}",
            hint="Use the key that was written when this model was locked.",
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
