"""Signatures of a whole model folder, through OpenSSF's `model-signing` (extra `signing`).

A certificate says what a folder should be; a signature says who says so. Every file is signed, the model card included.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from specdef.errors import CertificateMismatch, CheckpointError, SpecDefError
from specdef.weights.folder import SIGNATURE_NAME


def sign_folder(folder: str | Path, private_key: str | Path) -> Path:
    """Sign every file of a folder.

    Args:
        folder: The model folder; gets a `model.sig`.
        private_key: Elliptic-curve key, PEM.

    Returns:
        Path of the signature.

    Raises:
        SpecDefError: The extra is not installed.
        CheckpointError: The key cannot be used.
    """
    signing, hashing = _library("signing", "hashing")
    path = Path(folder) / SIGNATURE_NAME
    try:
        config = signing.Config().use_elliptic_key_signer(private_key=Path(private_key))
        config.set_hashing_config(hashing.Config().set_ignored_paths(paths=[path]))
        config.sign(folder, path)
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"cannot be used to sign ({error})", path=private_key) from error
    return path


def verify_signature(folder: str | Path, public_key: str | Path) -> None:
    """Check the signature of a folder.

    Args:
        folder: The model folder with its `model.sig`.
        public_key: The publisher's key, PEM.

    Raises:
        SpecDefError: The extra is not installed.
        CheckpointError: There is no signature, or the key cannot be read.
        CertificateMismatch: A file was changed, added or removed, or another key signed.
    """
    verifying, hashing = _library("verifying", "hashing")
    path = Path(folder) / SIGNATURE_NAME
    for file in (path, Path(public_key)):
        if not file.is_file():
            raise CheckpointError("does not exist", path=file, hint="Ask the publisher for it.")
    try:
        config = verifying.Config().use_elliptic_key_verifier(public_key=Path(public_key))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"is no public key ({error})", path=public_key) from error
    config.set_hashing_config(hashing.Config().set_ignored_paths(paths=[path]))
    try:
        config.verify(folder, path)
    except Exception as error:  # the library raises ValueError and its crypto backend's own kinds
        raise CertificateMismatch(
            f"{folder}: the signature does not hold ({error})", hint="Do not trust this copy."
        ) from error


def _library(*names: str) -> list[Any]:
    import importlib

    try:
        return [importlib.import_module(f"model_signing.{name}") for name in names]
    except ImportError as error:
        raise SpecDefError(
            f"signing needs the package model-signing ({error})",
            hint="Run `pip install 'specdef[signing]'`.",
        ) from error
