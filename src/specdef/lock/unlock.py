"""Undo a lock with its key: the original, to the last bit, or a refusal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from specdef.errors import CertificateMismatch, CheckpointError
from specdef.lock.card import remove_card
from specdef.lock.certificate import LockCertificate, load_certificate
from specdef.lock.files import changed_files
from specdef.lock.key import Key, load_key, require_match
from specdef.lock.merge import merge
from specdef.lock.residual import decode_residual
from specdef.weights.atomic import atomic_folder, refuse_existing
from specdef.weights.checkpoint import Checkpoint, TensorFile
from specdef.weights.edit import Edit, OutOfRange, ReplaceEdit, inverses
from specdef.weights.folder import (
    BASE_CONFIG_NAME,
    CERTIFICATE_BELOW_NAME,
    CERTIFICATE_NAME,
    COMPENSATION_NAME,
)
from specdef.weights.rewrite import Progress, TensorHashes, copy_other_files, rewrite_tensors
from specdef.weights.tensor_bytes import tensor_sha256


@dataclass(frozen=True, slots=True, kw_only=True)
class Unlocked:
    """What `unlock_checkpoint` did.

    Args:
        restored: Folder of the original.
        sha256_equal: Every tensor has the hash that was recorded at lock time (or at the last authorised training).
        tensors: Number of tensors restored.
        still_locked: Method of the lock that was beneath and is on top now; empty where there is none.
    """

    restored: str
    sha256_equal: bool
    tensors: int
    still_locked: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {
            "restored": self.restored,
            "sha256_equal": self.sha256_equal,
            "tensors": self.tensors,
            "still_locked": self.still_locked,
        }


def unlock_checkpoint(
    locked: str | Path,
    out: str | Path,
    key: str | Path | Key,
    *,
    progress: Progress | None = None,
    status: Callable[[str], None] | None = None,
) -> Unlocked:
    """Restore the original of a locked folder; of two locks, what the upper one was put on: with the lower one's certificate.

    Args:
        locked: Folder that `lock_checkpoint` wrote.
        out: Folder to create; appears whole or not at all.
        key: The key, or its path.
        progress: Called with (bytes done, bytes in all).
        status: Told what is being worked on.

    Returns:
        What was restored; `sha256_equal` is always true, everything else raises.

    Raises:
        CheckpointError: The folder, its certificate or the key is damaged, or the output cannot be written.
        KeyMismatch: The key belongs to another lock, or to the one beneath.
        CertificateMismatch: The weights were changed since they were locked, so the original cannot be had from them.
    """
    out = Path(out)
    refuse_existing(out)
    checkpoint = Checkpoint.open(locked)
    certificate = load_certificate(checkpoint.folder)
    key = key if isinstance(key, Key) else load_key(key)
    require_match(key, certificate.to_dict())
    if problems := changed_files(checkpoint.folder, certificate):
        raise CertificateMismatch(problems[0], hint="Fetch the locked model again.")
    if status:
        status("restoring")
    with atomic_folder(out) as work:
        try:
            hashes = rewrite_tensors(
                checkpoint,
                work,
                inverse_edits(key, certificate),
                progress=progress,
                workers=2 if key.scalings else 1,
            )
        except (OutOfRange, CheckpointError) as error:
            if changed_tensors(checkpoint, certificate, (error.tensor,)):
                raise _changed(error.tensor) from error
            raise
        compare_hashes(hashes, certificate)
        copy_other_files(checkpoint, work)
        (work / CERTIFICATE_NAME).unlink(missing_ok=True)
        (work / COMPENSATION_NAME).unlink(missing_ok=True)
        if (work / BASE_CONFIG_NAME).exists():
            (work / BASE_CONFIG_NAME).replace(work / "config.json")
        remove_card(work, certificate)
        if certificate.below:
            (work / CERTIFICATE_BELOW_NAME).replace(work / CERTIFICATE_NAME)
    return Unlocked(
        restored=str(out), sha256_equal=True, tensors=len(hashes), still_locked=certificate.below.get("method", "")
    )  # fmt: skip


def inverse_edits(key: Key, certificate: LockCertificate) -> dict[str, Edit]:
    """Return the edits that undo a lock.

    Args:
        key: The key.
        certificate: Tells whether the weights are those the key's residuals belong to.

    Returns:
        Tensor name to edit.

    Raises:
        CheckpointError: The key names a tensor that the model lacks.
    """
    missing = [name for name in key.tensors if name not in certificate.tensors]
    if missing:
        raise CheckpointError("the key names a tensor the model lacks", tensor=missing[0])
    edits: dict[str, Edit] = {name: inverses(edits) for name, edits in key.scalings.items()}
    for name, projection in key.projections.items():
        at_lock_time = (
            name in key.hashes and key.hashes[name].after == certificate.tensors[name]["sha256"]
        )

        def compute(locked: Tensor, name: str = name, exact: bool = at_lock_time) -> Tensor:
            return restore_matrix(key, name, locked, exact=exact)

        edits[name] = ReplaceEdit(compute=compute, dtype=projection.dtype)
    if key.method == "deformation":
        for name in key.residuals:
            edits[name] = ReplaceEdit(compute=partial(restore_difference, key, name))
    return edits


def restore_matrix(key: Key, name: str, locked: Tensor, *, exact: bool | None = None) -> Tensor:
    """Undo a projection.

    Args:
        key: The key.
        name: The tensor.
        locked: W~ as stored.
        exact: Whether the residual belongs to these weights; None finds out by their hash. After authorised training it
            does not: the weights in force are then the merge of what was saved.

    Returns:
        W in its original dtype.
    """
    if exact is None:
        exact = name in key.hashes and key.hashes[name].after == tensor_sha256(locked)
    try:
        rebuilt = merge(locked, key.projections[name])
        return decode_residual(key.residuals[name], rebuilt) if exact else rebuilt
    except (ValueError, KeyError, IndexError) as error:
        raise CheckpointError(
            f"cannot be unlocked: key or tensor is damaged ({error})", tensor=name
        ) from error


def restore_difference(key: Key, name: str, locked: Tensor) -> Tensor:
    """Undo a deformation of one tensor.

    Args:
        key: The key.
        name: The tensor.
        locked: The tensor as stored, on the CPU.

    Returns:
        The original in the same dtype.

    Raises:
        CheckpointError: Key or tensor is damaged.
    """
    try:
        return decode_residual(key.residuals[name], locked)
    except (ValueError, KeyError) as error:
        raise CheckpointError(
            f"cannot be unlocked: key or tensor is damaged ({error})", tensor=name
        ) from error


def require_locked_tensors(hashes: Mapping[str, str], certificate: LockCertificate) -> None:
    """Refuse tensors that are not those that were locked.

    Args:
        hashes: Tensor name to SHA-256 of what was read.
        certificate: What they should be.

    Raises:
        CertificateMismatch: A tensor differs, is missing, or is one too many.
    """
    for name in {**certificate.tensors, **hashes}:
        expected = certificate.tensors.get(name, {}).get("sha256")
        if expected is None or hashes.get(name) != expected:
            raise _changed(name, expected=expected, actual=hashes.get(name))


def compare_hashes(hashes: Mapping[str, TensorHashes], certificate: LockCertificate) -> None:
    """Refuse unless what was read and what came out are what the certificate says.

    Raises:
        CertificateMismatch: A tensor differs, is missing, or is one too many.
    """
    require_locked_tensors({name: found.before for name, found in hashes.items()}, certificate)
    for name, found in hashes.items():
        expected = certificate.tensors[name]
        if found.after != expected["sha256_original"]:
            raise CertificateMismatch(
                f"tensor {name} does not unlock to the original",
                expected=expected["sha256_original"], actual=found.after,
                hint="Key and certificate disagree; use the key that was written when this model was locked.",
            )  # fmt: skip


def changed_tensors(
    checkpoint: Checkpoint, certificate: LockCertificate, names: Iterable[str]
) -> list[str]:
    """Name those tensors whose bytes are not what the certificate says; works where values no longer compute.

    Args:
        checkpoint: The locked folder.
        certificate: Its certificate.
        names: Tensors to look at; unknown ones are passed over.

    Returns:
        Names.
    """
    out = []
    for name in names:
        if name in checkpoint:
            with TensorFile(checkpoint, name) as file:
                if certificate.tensors.get(name, {}).get("sha256") != file.sha256():
                    out.append(name)
    return out


def _changed(name: str, *, expected: object = None, actual: object = None) -> CertificateMismatch:
    return CertificateMismatch(
        f"tensor {name} is not the one that was locked", expected=expected, actual=actual,
        hint="The weights were changed after locking; fetch the locked model again.",
    )  # fmt: skip
