"""The files a certificate vouches for besides the tensors: their hashes, and which of them have changed."""

from __future__ import annotations

import hashlib
from pathlib import Path

from specdef.lock.certificate import LockCertificate
from specdef.weights.checkpoint import Checkpoint
from specdef.weights.folder import COMPENSATION_NAME, file_sha256


def other_files_sha256(folder: Path) -> dict[str, str]:
    """Hash the files a certificate vouches for: all but weights, certificate, model card and .gitattributes."""
    checkpoint = Checkpoint.open(folder)
    carried, _ = checkpoint.other_files()
    # people edit the card, and the hub writes the other
    names = [name for name in carried if name not in ("README.md", ".gitattributes")]
    if (folder / COMPENSATION_NAME).exists():
        names.append(COMPENSATION_NAME)
    # A tensor's hash covers its bytes; what dtype and shape they have, the header says.
    headers = {
        f"{shard} (header)": hashlib.sha256(header.raw).hexdigest()
        for shard, header in checkpoint.headers.items()
    }
    return {name: file_sha256(folder / name) for name in names} | headers


def changed_files(folder: Path, certificate: LockCertificate) -> list[str]:
    """Say which of the files a certificate vouches for are not what they were."""
    found = other_files_sha256(folder)
    return [
        f"file {name} {'is missing' if name not in found else 'was changed'} since the model was locked"
        for name, digest in certificate.files.items()
        if found.get(name) != digest
    ]
