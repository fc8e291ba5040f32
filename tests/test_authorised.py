"""Authorised training: full speed inside the block, locked outside, the same key afterwards."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

import specdef
from specdef.errors import KeyMismatch, SpecDefError
from specdef.lock.compensated import compensated_layers
from specdef.models.tiny import tiny_inputs

CONFIGS = {
    "absorbed": specdef.LockConfig(scale=2.0**24),
    "compensated": specdef.LockConfig(method="compensated", scale=100.0, k=2),
}


def train(model, steps=4, learning_rate=1e-2):
    """A few steps of SGD; returns the losses."""
    inputs = tiny_inputs("llama", seed=5)
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
    losses = []
    for _ in range(steps):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.fixture(params=CONFIGS)
def locked(request, tiny_folder, tmp_path):
    source = tiny_folder("llama")
    certificate = specdef.lock_checkpoint(source, tmp_path / "locked", CONFIGS[request.param])
    return request.param, source, tmp_path / "locked", certificate.key


def test_training_inside_the_block_is_training_the_original(locked):
    _, source, folder, key = locked
    reference = train(specdef.load_model(source))
    assert reference[-1] < reference[0] - 0.01
    model = specdef.load_model(folder)
    with specdef.authorised(model, key) as unlocked:
        losses = train(unlocked)
    assert (
        losses == reference
    )  # the very same numbers: the unlocked weights are the original's, bit for bit
    outside = train(specdef.load_model(folder))
    assert outside != reference
    assert not any(layer.unlocked for layer in compensated_layers(model).values())


def test_saved_result_verifies_and_the_same_key_unlocks_it(locked, tmp_path):
    method, source, folder, key = locked
    reference = specdef.load_model(source)
    train(reference)
    model = specdef.load_model(folder)
    with specdef.authorised(model, key):
        train(model)
    certificate = specdef.save_locked(model, tmp_path / "next", key, like=folder)
    assert certificate.history == ["locked", "authorised training"]
    assert certificate.lock_id == specdef.load_key(key).lock_id
    verification = specdef.verify_checkpoint(tmp_path / "next", key=key)
    assert verification.valid and verification.key_matches, verification.problems
    specdef.unlock_checkpoint(tmp_path / "next", tmp_path / "trained", key)
    trained = load_file(tmp_path / "trained" / "model.safetensors")
    expected = reference.state_dict()
    changed = 0
    for name, tensor in trained.items():
        if method == "absorbed":
            assert torch.equal(tensor, expected[name]), name
        else:  # rounding W~ to float32 loses some 1e-7 * scale
            torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-4)
        changed += not torch.equal(tensor, load_file(source / "model.safetensors")[name])
    assert changed > 5
    if method == "absorbed":
        result = specdef.verify_checkpoint(tmp_path / "next", tmp_path / "trained", key)
        assert result.valid and result.bit_identical


def test_model_is_locked_again_when_the_block_raises(locked):
    method, _, folder, key = locked
    model = specdef.load_model(folder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="training failed"), specdef.authorised(model, key):
        raise RuntimeError("training failed")
    for name, tensor in model.state_dict().items():
        if method == "absorbed":
            assert torch.equal(tensor, before[name]), name
        else:
            torch.testing.assert_close(tensor, before[name], rtol=1e-5, atol=1e-5)


def test_another_key_leaves_the_model_alone(locked, tiny_folder, tmp_path):
    method, _, folder, _ = locked
    other = specdef.lock_checkpoint(tiny_folder("qwen3"), tmp_path / "other", CONFIGS[method])
    model = specdef.load_model(folder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with (
        pytest.raises((SpecDefError, RuntimeError, IndexError)),
        specdef.authorised(model, other.key),
    ):
        raise AssertionError("a foreign key was accepted")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(KeyMismatch):
        specdef.save_locked(model, tmp_path / "out", other.key, like=folder)
    assert not (tmp_path / "out").exists()


def test_saving_while_unlocked_is_refused(locked, tmp_path):
    _, _, folder, key = locked
    model = specdef.load_model(folder)
    with specdef.authorised(model, key):
        with pytest.raises(SpecDefError, match="unlocked"):
            specdef.save_locked(model, tmp_path / "out", key, like=folder)
        assert not (tmp_path / "out").exists()
