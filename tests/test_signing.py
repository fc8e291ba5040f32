"""Signatures: made and checked through OpenSSF's model-signing, or one clear error where it is not installed."""

from __future__ import annotations

import subprocess
import sys

import pytest

import specdef
from specdef.errors import CertificateMismatch, CheckpointError, SpecDefError
from specdef.lock.signing import sign_folder, verify_signature


@pytest.fixture
def keys(tmp_path):
    """An elliptic-curve key pair, made with the openssl command."""
    private, public = tmp_path / "private.pem", tmp_path / "public.pem"
    make = ["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", str(private)]
    subprocess.run(make, check=True)
    subprocess.run(
        ["openssl", "ec", "-in", str(private), "-pubout", "-out", str(public)],
        check=True,
        capture_output=True,
    )
    return private, public


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_signed_folder_verifies_until_a_file_changes(tiny_folder, keys, tmp_path):
    private, public = keys
    specdef.lock_checkpoint(tiny_folder("llama"), tmp_path / "locked")
    sign_folder(tmp_path / "locked", private)
    verify_signature(tmp_path / "locked", public)
    assert specdef.verify_checkpoint(
        tmp_path / "locked"
    ).valid  # the signature is not one of the certified files
    (tmp_path / "locked" / "README.md").write_text("trust me")
    with pytest.raises(CertificateMismatch, match="signature does not hold"):
        verify_signature(tmp_path / "locked", public)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_missing_signature_and_bad_keys_are_named(tiny_folder, keys, tmp_path):
    _, public = keys
    with pytest.raises(CheckpointError, match=r"model\.sig.*does not exist"):
        verify_signature(tiny_folder("llama"), public)
    (tmp_path / "no.pem").write_text("no key")
    specdef.lock_checkpoint(tiny_folder("llama"), tmp_path / "locked")
    with pytest.raises(CheckpointError, match="cannot be used to sign"):
        sign_folder(tmp_path / "locked", tmp_path / "no.pem")


def test_without_the_extra_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "model_signing.signing", None)
    with pytest.raises(SpecDefError, match="model-signing") as caught:
        sign_folder(tmp_path, tmp_path / "key.pem")
    assert "specdef[signing]" in caught.value.hint
