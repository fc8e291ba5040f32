"""What `verify` and `unlock` make of a folder that is not the one that was locked: a finding, never a crash."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import specdef
from specdef.errors import CertificateMismatch
from specdef.lock.residual import decode_residual, encode_residual


@pytest.fixture
def locked(tiny_folder, tmp_path):
    """Return the source, the locked folder and the key."""
    source = tiny_folder("llama")
    certificate = specdef.lock_checkpoint(source, tmp_path / "locked")
    return source, tmp_path / "locked", certificate.key


@pytest.mark.parametrize("value", [3e38, float("nan"), float("inf")])
def test_changed_to_values_that_cannot_be_unlocked(value, locked, tmp_path):
    _, folder, key = locked
    shutil.copytree(folder, tmp_path / "changed")
    path = tmp_path / "changed" / "model.safetensors"
    tensors = load_file(path)
    name = next(iter(specdef.load_key(key).scalings))
    tensors[name].fill_(value)
    save_file(tensors, path, metadata={"format": "pt"})
    for result in (
        specdef.verify_checkpoint(tmp_path / "changed", key=key),
        specdef.verify_checkpoint(tmp_path / "changed"),
    ):
        assert not result.valid and not result.key_matches
        assert any(name in problem and "changed" in problem for problem in result.problems)
    with pytest.raises(CertificateMismatch, match="not the one that was locked"):
        specdef.unlock_checkpoint(tmp_path / "changed", tmp_path / "back", key)
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("other", ["bert", "gpt2"])
def test_original_of_another_architecture(other, locked, tiny_folder):
    _, folder, _ = locked
    result = specdef.verify_checkpoint(folder, tiny_folder(other))
    assert not result.valid and result.source_matches is False and result.bit_identical is False


def test_float16_was_never_claimed(locked):
    source, folder, _ = locked
    result = specdef.verify_checkpoint(folder, source, dtypes=["float16"])
    assert result.valid and result.bit_identical is False
    assert result.outputs[0].max_abs_logit_difference != 0.0


def test_float64_is_as_exact_as_float32(locked):
    source, folder, _ = locked
    assert specdef.verify_checkpoint(folder, source, dtypes=["float64"]).bit_identical


def test_what_the_hub_changes_is_not_vouched_for(tiny_folder, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(tiny_folder("llama"), source)
    (source / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    certificate = specdef.lock_checkpoint(source, tmp_path / "locked")
    assert (tmp_path / "locked" / ".gitattributes").exists()
    (tmp_path / "locked" / ".gitattributes").unlink()
    assert specdef.verify_checkpoint(tmp_path / "locked", source, certificate.key).valid


def test_a_hub_model_is_fetched_with_every_file_that_is_vouched_for(monkeypatch, tmp_path):
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    from specdef.cli.common import find_model

    files = ["model.safetensors", "config.json", "figures/curve.png", "notes.yaml", "original/a.pth", "model.gguf"]  # fmt: skip
    fetched: list[str] = []

    def fetch(name, **patterns):
        fetched.extend(filter_repo_objects(files, **patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert find_model("someone/something", quiet=True) == tmp_path
    assert fetched == ["model.safetensors", "config.json", "figures/curve.png", "notes.yaml"]


def test_the_key_is_never_readable_by_others(locked, tmp_path, monkeypatch):
    from pathlib import Path

    modes = []
    write = Path.write_bytes

    def watched(path, data):
        modes.append(path.stat().st_mode & 0o777 if path.exists() else None)
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", watched)
    path = specdef.load_key(locked[2]).save(tmp_path / "copy.safetensors")
    assert modes == [0o600] and path.stat().st_mode & 0o777 == 0o600
    assert torch.equal(load_file(path)["scalings"], load_file(locked[2])["scalings"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_residual_of_a_key_is_exact_in_every_float_type(dtype):
    """In float64 the order of negative numbers once overflowed."""
    original = torch.randn(500, generator=torch.Generator().manual_seed(0)).to(dtype)
    original[:4] = torch.tensor([0.0, -0.0, 1e-300, -1e-300], dtype=torch.float64).to(dtype)
    rebuilt = (original.double() * (1 + 1e-12)).to(dtype)
    rebuilt[0] = -0.0
    again = decode_residual(encode_residual(original, rebuilt), rebuilt)
    assert torch.equal(again.view(torch.uint8), original.view(torch.uint8))
