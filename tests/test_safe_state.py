"""Whatever goes wrong, a model in memory is either as it was or locked; it is never left unlocked in silence."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import specdef
from helpers import same, state
from specdef.errors import CheckpointError, KeyMismatch, SpecDefError
from specdef.lock.compensated import Compensated
from specdef.models.tiny import tiny_inputs, tiny_model
from specdef.weights.edit import OutOfRange, ScaleEdit, apply_all, inverses

COMPENSATED = specdef.LockConfig(method="compensated", scale=100.0, k=2)


@pytest.fixture
def locked(tiny_folder, tmp_path):
    """Return the folder of an absorbed lock and its key."""
    certificate = specdef.lock_checkpoint(tiny_folder("llama"), tmp_path / "locked")
    return tmp_path / "locked", certificate.key


def test_a_lock_in_memory_that_does_not_fit_changes_nothing():
    model = tiny_model("llama")
    with torch.no_grad():
        for (
            layer
        ) in model.model.layers:  # room for 2^8 and 2^30, not for 2^70, in no channel of any site
            for module in layer.modules():
                if isinstance(module, torch.nn.Linear):
                    module.weight[3] = 1e-25
                    module.weight[:, 3] = 1e-25
    before = state(model)
    with pytest.raises(SpecDefError):
        specdef.lock_model(model, specdef.LockConfig(scale=2.0**70, schedule="uniform"))
    assert same(state(model), before)


@pytest.mark.parametrize("side", ["readers", "writers"])
def test_a_lock_in_memory_takes_another_channel_where_one_does_not_fit(side):
    source = tiny_model("llama")
    config = specdef.LockConfig(scale=2.0**70)

    def highest(model):
        sites = specdef.lock_model(model, config).certificate.sites
        return next(site for site in sites if site["side"] == side)  # the highest exponents first

    top = highest(tiny_model("llama"))
    # An entry that the lock would divide by 2^70, and lose.
    small = top["covers"][0]
    with torch.no_grad():
        if side == "readers":
            source.get_parameter(small)[3, top["channel"]] = 1e-25
        else:
            source.get_parameter(small)[top["channel"]] = 1e-25
    inputs = tiny_inputs("llama")
    with torch.no_grad():
        before = source(**inputs).logits
        found = highest(source)
        assert torch.equal(source(**inputs).logits, before)
    assert found["name"] == top["name"] and found["channel"] != top["channel"]


@pytest.mark.parametrize("config", [specdef.LockConfig(), COMPENSATED], ids=["absorbed", "compensated"])  # fmt: skip
def test_a_locked_model_is_not_locked_again(config):
    """Two locks would need two keys, and only the second one's would be remembered."""
    model = tiny_model("llama")
    specdef.lock_model(model, config)
    before = state(model)
    with pytest.raises(SpecDefError, match="locked already"):
        specdef.lock_model(model)
    assert same(state(model), before)


def test_scaled_beyond_the_dtype_is_refused_in_memory():
    model = tiny_model("llama", dtype=torch.bfloat16)
    before = state(model)
    with pytest.raises(SpecDefError, match="overflows"):
        specdef.lock_model(model, specdef.LockConfig(method="scaled", scale=1e39, k=1))
    assert same(state(model), before)


def test_scalings_are_all_applied_or_none():
    tensors = {"a": torch.ones(2, 2), "b": torch.full((2,), 1e-30)}
    edits = {
        "a": (ScaleEdit(axis=0, position=1, exponent=9),),
        "b": (ScaleEdit(axis=0, position=0, exponent=-40),),
    }
    with pytest.raises(OutOfRange):
        apply_all(tensors, edits)
    assert torch.equal(tensors["a"], torch.ones(2, 2))
    apply_all(tensors, edits, exact=False)
    assert tensors["a"][1].tolist() == [512, 512] and 0 < tensors["b"][0] < 1e-41


def test_crossing_scalings_are_undone_in_the_other_order():
    """Undone in the same order, the value in between would overflow."""
    edits = {
        "w": (
            ScaleEdit(axis=1, position=0, exponent=-100),
            ScaleEdit(axis=0, position=0, exponent=120),
        )
    }
    before = torch.tensor([[1e3, 1e-3], [1e3, 1e3]])
    tensors = {"w": before.clone()}
    apply_all(tensors, edits)
    apply_all(tensors, {name: inverses(scalings) for name, scalings in edits.items()})
    assert torch.equal(tensors["w"], before)


@pytest.mark.parametrize("raises", [False, True])
def test_diverged_training_is_locked_and_reported(locked, raises):
    folder, key = locked
    model, reference = specdef.load_model(folder), specdef.load_model(folder).state_dict()
    expected = RuntimeError if raises else SpecDefError
    with pytest.raises(expected) as caught, specdef.authorised(model, key):
        with torch.no_grad():
            model.model.norm.weight.fill_(float("nan"))
        if raises:
            raise RuntimeError("the loss is NaN")
    text = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    assert "model.norm.weight" in text and "no longer fit" in text
    for name, tensor in model.state_dict().items():
        assert name == "model.norm.weight" or torch.equal(tensor, reference[name]), name


def test_a_weight_that_was_replaced_inside_is_locked_too(locked):
    folder, key = locked
    model = specdef.load_model(folder)
    with specdef.authorised(model, key):
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight = nn.Parameter(module.weight.detach().clone())
    assert same(state(model), state(specdef.load_model(folder)))


def test_an_adapter_left_around_a_weight_is_reported(locked):
    """It was trained on unlocked inputs, so behind the lock it would compute something else."""

    class Adapter(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base_layer = base

    folder, key = locked
    model = specdef.load_model(folder)
    mlp = model.model.layers[0].mlp
    with pytest.raises(SpecDefError, match="wrapped"), specdef.authorised(model, key):
        mlp.down_proj = Adapter(mlp.down_proj)
    mlp.down_proj = mlp.down_proj.base_layer
    assert same(state(model), state(specdef.load_model(folder)))


def test_flags_and_gradients(locked, tiny_folder, tmp_path):
    certificate = specdef.lock_checkpoint(tiny_folder("llama"), tmp_path / "pairs", COMPENSATED)
    model = specdef.load_model(tmp_path / "pairs")
    inputs = tiny_inputs("llama")
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    model.requires_grad_(False)
    with specdef.authorised(model, certificate.key):
        assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("residual", [torch.zeros(5, dtype=torch.uint8), None], ids=["broken", "swapped"])  # fmt: skip
def test_a_damaged_key_unlocks_nothing(residual, tiny_folder, tmp_path):
    certificate = specdef.lock_checkpoint(tiny_folder("llama"), tmp_path / "pairs", COMPENSATED)
    key = specdef.load_key(certificate.key)
    shapes = {name: value.shape for name, value in tiny_model("llama").state_dict().items()}
    twins = [n for n in key.residuals if shapes[n] == shapes[next(iter(key.residuals))]]
    other = key.residuals[twins[1]] if residual is None else residual
    key = replace(key, residuals={**key.residuals, twins[0]: other})
    model = specdef.load_model(tmp_path / "pairs")
    before = state(model)
    with pytest.raises(CheckpointError, match="damaged"), specdef.authorised(model, key):
        raise AssertionError("a damaged key was accepted")
    assert same(state(model), before)


def test_a_model_that_was_never_locked_is_not_saved_as_locked(locked, tiny_folder, tmp_path):
    folder, key = locked
    with pytest.raises(KeyMismatch, match="saved unlocked"):
        specdef.save_locked(
            specdef.load_model(tiny_folder("llama")), tmp_path / "out", key, like=folder
        )
    assert not (tmp_path / "out").exists()


def test_a_model_loaded_by_transformers_can_be_trained_and_saved(locked, tmp_path):
    from transformers import AutoModelForCausalLM

    folder, key = locked
    model = AutoModelForCausalLM.from_pretrained(folder)
    with specdef.authorised(model, key), torch.no_grad():
        model.model.norm.weight.add_(0.25)
    specdef.save_locked(model, tmp_path / "next", key, like=folder)
    assert specdef.verify_checkpoint(tmp_path / "next", key=key).key_matches


def test_the_inserted_layer_is_made_where_the_weight_is():
    pair = Compensated(nn.Linear(3, 3, device="meta"), torch.eye(3))
    assert pair.compensation.device == pair.weight.device
