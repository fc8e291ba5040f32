"""Locks on top of locks: what may be put on what, and which locks a folder or a model carries.

Only an exact lock goes on top, so that undoing it gives back every bit of the lock beneath, which its own key then undoes.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from torch import nn

from specdef.errors import CertificateMismatch, CheckpointError, SpecDefError
from specdef.lock.certificate import LockCertificate, load_certificate
from specdef.lock.files import changed_files
from specdef.weights.checkpoint import Checkpoint
from specdef.weights.folder import CERTIFICATE_BELOW_NAME, CERTIFICATE_NAME

ON_TOP = frozenset({("absorbed", "deformation")})
"""(method, method of the lock it may be put on)."""

_LOCKS = "_specdef_locks"
"""Attribute of a model that names its locks."""

_UNLOCK = "Unlock it first, or lock the original."
_REASONS: dict[tuple[str, str], tuple[str, str]] = {
    ("absorbed", "absorbed"): (
        "its exponents would only be added to those that are there",
        "Unlock it first, and lock the original with the scales you want.",
    ),
    ("deformation", "absorbed"): (
        "training would meet the very scales that hinder it, and their singular values for those of the weights",
        "The other way round works: unlock it, deform the original, and put the absorbed lock on top.",
    ),
    ("deformation", "deformation"): (
        "a second training goes on from the first",
        "Unlock it first, and train the original for longer.",
    ),
    ("compensated", "deformation"): (
        "it would round what the key beneath has to find bit for bit, and reach for the same singular values",
        "Put an absorbed lock on top, or lock the original.",
    ),
    ("compensated", "absorbed"): (
        "the largest singular values are its scales, not those of the weights",
        _UNLOCK,
    ),
}
_REASONS_BELOW = {
    "compensated": ("its inserted layers are part of the function", _UNLOCK),
    "scaled": ("it does not keep the function, so there is nothing left to protect", _UNLOCK),
}


class Lock(NamedTuple):
    """A lock that a model carries.

    Args:
        method: Its method.
        lock_id: Its identity, as in key and certificate.
    """

    method: str
    lock_id: str


def refusal(method: str, below: str) -> tuple[str, str]:
    """Say why a lock does not go on top of another.

    Args:
        method: Method of the lock that is to go on top.
        below: Method of the lock that is there.

    Returns:
        (what is wrong, hint); both empty where it may be done.
    """
    if (method, below) in ON_TOP:
        return "", ""
    reason, hint = _REASONS.get((method, below)) or _REASONS_BELOW.get(
        below, (f"{method} goes on top of no other lock", _UNLOCK)
    )
    return f"is locked already, by {below}, and {method} does not go on top of that: {reason}", hint


def lower_lock(checkpoint: Checkpoint, method: str) -> LockCertificate | None:
    """Return the certificate of the lock that a folder carries, refusing what cannot be locked on top of it.

    Args:
        checkpoint: The open folder.
        method: Method of the lock that is to go on top.

    Returns:
        The certificate; None where the folder is not locked.

    Raises:
        CheckpointError: The method does not go on top of that lock, or its certificate is none.
        CertificateMismatch: Files were changed since it was locked, so its own key would no longer undo it.
    """
    if not (checkpoint.folder / CERTIFICATE_NAME).exists():
        return None
    below = load_certificate(checkpoint.folder)
    problem, hint = refusal(method, below.method)
    if problem:
        raise CheckpointError(problem, path=checkpoint.folder, hint=hint)
    if problems := changed_files(checkpoint.folder, below):
        raise CertificateMismatch(problems[0], hint="Fetch the locked model again.")
    return below


def certificate_below(folder: Path, certificate: LockCertificate) -> LockCertificate | None:
    """Read the certificate of the lock beneath the one on top.

    Args:
        folder: The locked folder.
        certificate: That of the lock on top.

    Returns:
        The certificate; None where there is no lock beneath.

    Raises:
        CheckpointError: It is missing or no certificate.
        CertificateMismatch: It was changed, or is not that of the lock the upper certificate names and of its tensors.
    """
    if not certificate.below:
        return None
    below = load_certificate(folder, CERTIFICATE_BELOW_NAME)
    named = (below.method, below.lock_id)
    beneath = {name: row["sha256_original"] for name, row in certificate.tensors.items()}
    if named != (certificate.below["method"], certificate.below["lock_id"]) or beneath != {
        name: row["sha256"] for name, row in below.tensors.items()
    }:
        raise CertificateMismatch(
            f"{folder / CERTIFICATE_BELOW_NAME}: is not the certificate of the lock beneath",
            expected=certificate.below["lock_id"], actual=below.lock_id, hint="Fetch the locked model again.",
        )  # fmt: skip
    return below


def locks(model: nn.Module) -> tuple[Lock, ...]:
    """Return the locks of a model in memory, the lowest first; empty where there are none, or none are known."""
    return tuple(getattr(model, _LOCKS, ()))


def set_locks(model: nn.Module, carried: tuple[Lock, ...]) -> None:
    """Name the locks of a model in memory, the lowest first."""
    setattr(model, _LOCKS, carried)


def require_lockable(model: nn.Module, method: str) -> None:
    """Refuse to lock a model in memory on top of a lock where that cannot be done.

    Raises:
        SpecDefError: The model is locked, and the method does not go on top of that.
    """
    if carried := locks(model):
        problem, hint = refusal(method, carried[-1].method)
        if problem:
            raise SpecDefError(f"the model {problem}", hint=hint)
