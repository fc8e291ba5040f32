"""Every family passes lock -> verify -> unlock from its folder; bit-identical where that is claimed."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

import specdef
from specdef.errors import SpecDefError
from specdef.lock.verify import probe_inputs
from specdef.models.tiny import TINY_FAMILIES
from specdef.weights.checkpoint import Checkpoint
from specdef.weights.folder import COMPENSATION_NAME, file_sha256

ABSORBED = {
    "max": specdef.LockConfig(),
    "convex": specdef.LockConfig.preset("convex"),
    "staggered": specdef.LockConfig(scale=2.0**18, schedule="staggered"),
    "uniform most active": specdef.LockConfig(
        scale=1024, schedule="uniform", channel="most-active"
    ),
}
# Tensors whose name on disk is no module in memory, so that nothing can be inserted behind them.
STACKED = {"mixtral", "qwen3_moe", "gpt_oss"}


def files(folder):
    return {
        p.relative_to(folder).as_posix(): file_sha256(p) for p in folder.rglob("*") if p.is_file()
    }


@pytest.mark.parametrize("recipe", ABSORBED, ids=str)
@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_absorbed_keeps_every_bit_and_unlocks(family, recipe, tiny_folder, tmp_path):
    source = tiny_folder(family)
    certificate = specdef.lock_checkpoint(source, tmp_path / "locked", ABSORBED[recipe])
    assert certificate.sites and 0 < certificate.tensors_changed <= certificate.tensors_total
    sides = {record["side"] for record in certificate.sites}
    assert sides == ({"readers", "writers"} if recipe == "max" else {"readers"})
    assert certificate.sigma_max_after > 10 * certificate.sigma_max_before
    result = specdef.verify_checkpoint(tmp_path / "locked", source, certificate.key)
    assert result.valid and result.bit_identical, result.problems
    assert result.max_abs_logit_difference == 0.0 and result.source_matches and result.key_matches
    assert {o.dtype for o in result.outputs} == {"float32", "bfloat16"}
    assert specdef.unlock_checkpoint(
        tmp_path / "locked", tmp_path / "back", certificate.key
    ).sha256_equal
    assert files(tmp_path / "back") == files(source)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("recipe", ["max", "convex"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "resnet"])
def test_absorbed_in_other_stored_dtypes(family, recipe, dtype, tiny_folder, tmp_path):
    source = tiny_folder(family, dtype)
    certificate = specdef.lock_checkpoint(source, tmp_path / "locked", ABSORBED[recipe])
    result = specdef.verify_checkpoint(tmp_path / "locked", source, certificate.key)
    assert result.valid and result.bit_identical, result.problems
    specdef.unlock_checkpoint(tmp_path / "locked", tmp_path / "back", certificate.key)
    assert files(tmp_path / "back") == files(source)


def test_float16_is_refused_with_the_reason(tiny_folder, tmp_path):
    with pytest.raises(SpecDefError, match=r"exponent room|exact range") as caught:
        specdef.lock_checkpoint(tiny_folder("llama", torch.float16), tmp_path / "locked")
    assert "bfloat16" in caught.value.hint and not (tmp_path / "locked").exists()


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_compensated_keeps_the_function_and_unlocks(family, tiny_folder, tmp_path):
    source = tiny_folder(family)
    config = specdef.LockConfig(method="compensated", scale=1e3, k=3)
    certificate = specdef.lock_checkpoint(source, tmp_path / "locked", config)
    for record in certificate.sites:
        assert record["sigma_max_after"] == pytest.approx(1e3 * record["sigma_max_before"])
        assert record["relative_error"] < 1e-2
    assert (tmp_path / "locked" / COMPENSATION_NAME).exists()
    result = specdef.verify_checkpoint(
        tmp_path / "locked", source, certificate.key, dtypes=["float32"]
    )
    assert result.valid and result.bit_identical is False
    scale = result.outputs[0].max_abs_logit
    assert 0 < result.max_abs_logit_difference < 1e-2 * scale
    specdef.unlock_checkpoint(tmp_path / "locked", tmp_path / "back", certificate.key)
    assert files(tmp_path / "back") == files(source)


@pytest.mark.parametrize("family", ["llama", "gpt2", "resnet", "mixtral"])
def test_scaled_scales_the_top_singular_values_alone(family, tiny_folder, tmp_path):
    source = tiny_folder(family)
    config = specdef.LockConfig(method="scaled", scale=50.0, k=2, num_layers=1)
    certificate = specdef.lock_checkpoint(source, tmp_path / "locked", config)
    before, after = Checkpoint.open(source), Checkpoint.open(tmp_path / "locked")
    for record in certificate.sites:
        old = torch.linalg.svdvals(before.read(record["name"]).flatten(1).double())
        new = torch.linalg.svdvals(after.read(record["name"]).flatten(1).double())
        expected = torch.cat([50 * old[:2], old[2:]])
        torch.testing.assert_close(new, expected, rtol=1e-5, atol=1e-5 * float(expected[0]))
    specdef.unlock_checkpoint(tmp_path / "locked", tmp_path / "back", certificate.key)
    assert files(tmp_path / "back") == files(source)


def test_other_runtimes_refuse_a_compensated_folder(tiny_folder, tmp_path):
    """Loaded without its inserted layers, the model would be garbage; better not to load at all."""
    from transformers import AutoModelForCausalLM

    specdef.lock_checkpoint(
        tiny_folder("llama"),
        tmp_path / "locked",
        specdef.LockConfig(method="compensated", scale=100.0, k=2),
    )
    with pytest.raises(ValueError, match="specdef-compensated"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "locked")


def test_compensated_knows_its_budget(tiny_folder, tmp_path):
    source = tiny_folder("llama", torch.bfloat16)
    config = specdef.LockConfig(method="compensated", scale=1e4, k=3)
    with pytest.raises(SpecDefError, match="largest scale that fits is about") as caught:
        specdef.lock_checkpoint(source, tmp_path / "locked", config)
    fits = float(str(caught.value).rsplit(" ", 1)[1])
    assert 1 < fits < 100
    smaller = specdef.LockConfig(method="compensated", scale=fits, k=3)
    specdef.lock_checkpoint(source, tmp_path / "small", smaller)  # what it named fits indeed
    wider = specdef.LockConfig(method="compensated", scale=1e4, k=3, storage_dtype="float32")
    certificate = specdef.lock_checkpoint(source, tmp_path / "wide", wider)
    result = specdef.verify_checkpoint(
        tmp_path / "wide", source, certificate.key, dtypes=["bfloat16"]
    )
    assert result.valid and result.max_abs_logit_difference < 0.1 * result.outputs[0].max_abs_logit
    specdef.unlock_checkpoint(tmp_path / "wide", tmp_path / "back", certificate.key)
    assert files(tmp_path / "back") == files(source)


@pytest.mark.parametrize("method", ["absorbed", "compensated"])
def test_sharded_and_tied(method, tiny_folder, tmp_path):
    source = tiny_folder("llama", tie=True, shards=3)
    assert len(Checkpoint.open(source).headers) >= 3
    config = specdef.LockConfig(method=method, scale=256, k=2)
    certificate = specdef.lock_checkpoint(source, tmp_path / "locked", config)
    old, new = Checkpoint.open(source), Checkpoint.open(tmp_path / "locked")
    assert list(old.headers) == list(new.headers) and old.location == new.location
    assert all(old.headers[s].raw == new.headers[s].raw for s in old.headers)  # byte for byte
    assert specdef.verify_checkpoint(tmp_path / "locked", source, certificate.key).valid
    specdef.unlock_checkpoint(tmp_path / "locked", tmp_path / "back", certificate.key)
    assert files(tmp_path / "back") == files(source)


@pytest.mark.parametrize("family", sorted(set(TINY_FAMILIES) - STACKED - {"gemma"}))
def test_lock_in_memory_equals_lock_on_disk(family, tiny_folder, tmp_path):
    """Same scalings wherever names on disk and in memory are the same; same outputs everywhere."""
    source = tiny_folder(family)
    model = specdef.load_model(source)
    inputs = probe_inputs(model)
    with torch.no_grad():
        before = model(**inputs).logits
    locked = specdef.lock_model(model, ABSORBED["convex"])
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, before)
    assert locked.certificate.tensors_changed > 0
    on_disk = specdef.lock_checkpoint(source, tmp_path / "locked", ABSORBED["convex"])
    if set(locked.certificate.tensors) == set(on_disk.tensors):
        written = load_file(tmp_path / "locked" / "model.safetensors")
        state = model.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in written.items())
        assert locked.key.lock_id == on_disk.lock_id


def test_same_seed_same_lock(tiny_folder, tmp_path):
    for method in ("absorbed", "compensated"):
        config = specdef.LockConfig(method=method, scale=512, k=2, seed=3)
        first = specdef.lock_checkpoint(tiny_folder("llama"), tmp_path / f"{method}1", config)
        second = specdef.lock_checkpoint(tiny_folder("llama"), tmp_path / f"{method}2", config)
        assert first.lock_id == second.lock_id and first.tensors == second.tensors
