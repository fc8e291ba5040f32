"""The certificate: what was done to a model, beside its weights, checkable by anyone without the key.

It names the method, the recipe, the versions, and the SHA-256 of every tensor before and after. It does not name the
channels and exponents: those are in the key (though whoever looks at the weights can find them, see docs/limits.md).
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from specdef.errors import CertificateMismatch, CheckpointError
from specdef.lock.config import LockConfig
from specdef.lock.deformation.config import DeformationConfig
from specdef.lock.key import Key
from specdef.lock.plan import LockPlan
from specdef.lock.threat_model import threat_model
from specdef.weights.atomic import atomic_file
from specdef.weights.folder import CERTIFICATE_NAME, read_json

_FORMAT = "specdef-certificate-1"


@dataclass(frozen=True, slots=True, kw_only=True)
class LockCertificate:
    """What `specdef_certificate.json` holds.

    Args:
        method: The lock method.
        config: The recipe.
        lock_id: Identity of the transformation; the key has the same.
        source: Name of the model and digest of all its tensors' hashes.
        sites: What was locked: per site in the result of a lock, counts by kind in the file.
        tensors: Tensor name to `sha256` and `sha256_original`.
        files: Other files of the folder to SHA-256; the model card is left out, people edit it.
        tensors_total: Number of tensors.
        tensors_changed: How many of them the lock changed.
        sigma_max_before: Largest singular value of the matrix where it is largest after the lock, before it.
        sigma_max_after: The same after.
        selection: How channels were chosen.
        output_difference: dtype to largest absolute difference of the logits, where it was measured.
        bit_identical: Whether the method promises outputs equal bit for bit (float32, bfloat16).
        uncovered: Linear inputs the lock does not reach: number by reason.
        utility: Held-out utility and retain loss before and after, as stored, and the data they were measured on
            (deformation; a lock on top of one keeps the function and with it the utility).
        training: Steps, why they ended, times, and one row per evaluation (deformation).
        dropped: Other copies of the weights in the source folder that were not carried over.
        notes: Sentences the user should read.
        threat_model: What the lock does not stop.
        history: What happened to the weights: "locked", then one entry per authorised training.
        below: The lock beneath this one: its method and lock_id, and in a folder the SHA-256 of its certificate.
        versions: Versions of what made it.
        seconds: Wall time of the lock.
        key: Path of the key; never in the file.
        certificate: Path of the certificate; never in the file.
    """

    method: str
    config: dict[str, Any]
    lock_id: str
    source: dict[str, str]
    sites: list[dict[str, Any]] | dict[str, int]
    tensors: dict[str, dict[str, str]]
    files: dict[str, str]
    tensors_total: int
    tensors_changed: int
    sigma_max_before: float
    sigma_max_after: float
    selection: str
    bit_identical: bool
    uncovered: dict[str, int]
    output_difference: dict[str, float] = field(default_factory=dict)
    utility: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    threat_model: str = ""
    history: list[str] = field(default_factory=lambda: ["locked"])
    below: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    key: str = ""
    certificate: str = ""

    @property
    def num_sites(self) -> int:
        """Number of places locked; one that is locked on both sides counts once."""
        counts = self.sites if isinstance(self.sites, dict) else count_kinds(self.sites)
        return sum(counts.values())

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return asdict(self)

    def write(self, folder: Path) -> Path:
        """Write the public part beside the weights.

        Args:
            folder: The model folder.

        Returns:
            Path of the file.
        """
        values = self.to_dict()
        for private in ("key", "certificate", "seconds"):
            values.pop(private)
        if isinstance(self.sites, list):
            values["sites"] = count_kinds(self.sites)
        values = {"format": _FORMAT, **values}
        values["sha256"] = _digest(values)
        path = folder / CERTIFICATE_NAME
        with atomic_file(path) as work:  # `specdef lock` writes it again once outputs are compared
            work.write_text(json.dumps(values, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        return path


def build_certificate(
    plan: LockPlan,
    key: Key,
    config: LockConfig | DeformationConfig,
    *,
    files: Mapping[str, str],
    source_name: str,
    calibrated: bool,
    dropped: Iterable[str] = (),
    utility: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    below: Mapping[str, str] | None = None,
) -> LockCertificate:
    """Put together what is known of a lock.

    Args:
        plan: What was done.
        key: Its key, hashes filled in.
        config: The recipe.
        files: Other files to SHA-256.
        source_name: Name of the model.
        calibrated: Whether channels were chosen on data.
        dropped: Files that were not carried over.
        utility: What was measured of a deformation.
        training: How it went.
        below: The lock beneath.

    Returns:
        The certificate.
    """
    return LockCertificate(
        method=plan.method,
        config=config.to_dict(),
        lock_id=key.lock_id,
        source={
            "name": source_name,
            "sha256": table_digest({name: h.before for name, h in key.hashes.items()}),
        },
        sites=[record.to_dict() for record in plan.sites],
        tensors={
            n: {"sha256": h.after, "sha256_original": h.before} for n, h in key.hashes.items()
        },
        files=dict(files),
        tensors_total=len(key.hashes),
        tensors_changed=sum(h.before != h.after for h in key.hashes.values()),
        sigma_max_before=plan.sigma_max_before,
        sigma_max_after=plan.sigma_max_after,
        selection=("calibrated" if calibrated else "data-free")
        if plan.method == "absorbed"
        else "",
        bit_identical=plan.method == "absorbed",
        uncovered=count_reasons(plan.uncovered),
        utility=dict(utility or {}),
        training=dict(training or {}),
        dropped=list(dropped),
        notes=[*plan.notes, *_order(plan.method, below)],
        threat_model=threat_model(plan.method, below["method"] if below else ""),
        below=dict(below or {}),
        versions=tool_versions(),
    )


def load_certificate(folder: str | Path, name: str = CERTIFICATE_NAME) -> LockCertificate:
    """Read the certificate of a locked model.

    Args:
        folder: The model folder.
        name: Of the file, where it is not that of the lock on top.

    Returns:
        The certificate.

    Raises:
        CheckpointError: There is none, or it is no certificate.
        CertificateMismatch: It was changed since it was written.
    """
    path = Path(folder) / name
    if not path.exists():
        raise CheckpointError(
            "has no specdef certificate",
            path=folder,
            hint="This is not a model that `specdef lock` wrote.",
        )
    values = read_json(path)
    if values.pop("format", None) != _FORMAT:
        raise CheckpointError(
            "is not a certificate of this version", path=path, hint="Update specdef."
        )
    stated = values.pop("sha256", None)
    actual = _digest({"format": _FORMAT, **values})
    if stated != actual:
        raise CertificateMismatch(
            f"{path}: the certificate was changed after it was written", expected=stated, actual=actual,
            hint="Fetch the model again from its publisher.",
        )  # fmt: skip
    names = {item.name for item in fields(LockCertificate)}
    try:
        certificate = LockCertificate(
            **{name: value for name, value in values.items() if name in names}
        )
    except TypeError as error:
        raise CheckpointError(f"is not a certificate ({error})", path=path) from error
    if odd := _malformed(certificate):
        raise CheckpointError(f"is not a certificate (its {odd} are of a wrong kind)", path=path)
    return certificate


def count_kinds(sites: list[dict[str, Any]]) -> dict[str, int]:
    """Count sites by kind; one that is locked on both sides counts once."""
    return dict(Counter({site["name"]: site["kind"] for site in sites}.values()))


def count_reasons(uncovered: Mapping[str, str]) -> dict[str, int]:
    """Count uncovered inputs by reason."""
    out: dict[str, int] = {}
    for reason in uncovered.values():
        out[reason] = out.get(reason, 0) + 1
    return out


def table_digest(hashes: Mapping[str, str]) -> str:
    """Return one digest for a table of hashes, in the order of the names."""
    text = "\n".join(f"{name} {hashes[name]}" for name in sorted(hashes))
    return hashlib.sha256(text.encode()).hexdigest()


def tool_versions() -> dict[str, str]:
    """Return the versions of what computes a lock."""
    out = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("specdef", "safetensors", "numpy", "transformers"):
        try:
            out[package] = version(package)
        except PackageNotFoundError:
            continue
    return out


def _malformed(certificate: LockCertificate) -> str:
    """Name a field whose value has another type than it should: a forger can make any checksum fit."""
    kinds: dict[str, type | tuple[type, ...]] = {
        "str": str,
        "float": (float, int),
        "int": int,
        "bool": bool,
    }
    for item in fields(certificate):
        kind = str(item.type)
        expected = kinds.get(
            kind, (dict, list) if "|" in kind else dict if kind.startswith("dict") else list
        )
        if not isinstance(getattr(certificate, item.name), expected):
            return item.name
    rows = certificate.tensors.values()
    if not all(isinstance(row, dict) and {"sha256", "sha256_original"} <= set(row) for row in rows):
        return "tensors"
    below = certificate.below
    if below and not all(isinstance(below.get(name), str) for name in ("method", "lock_id")):
        return "below"
    return ""


def _order(method: str, below: Mapping[str, str] | None) -> list[str]:
    if not below:
        return []
    return [
        f"The model was locked already, by {below['method']} (lock {below['lock_id'][:12]}). Both keys are needed: that of "
        f"{method} first, that of {below['method']} for what it gives."
    ]


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(
        json.dumps(values, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()
