"""Activations are watched at every module; what overflows is named, and only a lock's own fault is held against it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import specdef
from specdef.errors import SpecDefError
from specdef.lock import activations
from specdef.lock.activations import (
    check_activations,
    measure_activations,
    require_finite_activations,
)
from specdef.lock.config import LockConfig
from specdef.models.tiny import tiny_inputs, tiny_model


class Net(nn.Module):
    """Three layers with known activations: 3, then 3 * gain, then a square."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        self.first.weight.data.fill_(3.0)
        self.second.weight.data.fill_(gain)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)) ** 2


ONE = [[torch.ones(1, 1), torch.zeros(1)]]


def test_every_module_and_the_largest() -> None:
    found = measure_activations(Net(4.0), ONE)
    assert [(m.module, m.input, m.output) for m in found.modules] == [
        ("first", 1.0, 3.0), ("second", 3.0, 12.0), ("the model", 0.0, 144.0),
    ]  # fmt: skip
    assert found.finite and found.largest == 144.0 and found.where == "the model"
    assert found.room == 120 and not found.problem  # 2^128 / 144 = 2^120.8
    assert found.subnormal == 0.0


@pytest.mark.parametrize(
    ("gain", "where"), [(1e30, "the model"), (3e38, "second"), (math.nan, "second")]
)
def test_the_first_module_that_overflows_is_named(gain: float, where: str) -> None:
    found = measure_activations(Net(gain), ONE)
    assert not found.finite and found.where == where and found.room is None
    assert math.isnan(found.largest) == math.isnan(gain)
    assert where in found.problem and "float32" in found.problem
    assert where in found.sentence()


def test_the_largest_of_all_batches_counts() -> None:
    found = measure_activations(Net(1.0), [*ONE, [5 * torch.ones(1, 1), torch.zeros(1)], *ONE])
    assert found.modules[0].output == 15.0


def test_subnormal_outputs_are_counted() -> None:
    assert measure_activations(Net(1e-39), ONE).subnormal == pytest.approx(1 / 3)  # its square is 0


@pytest.mark.parametrize("family", ["llama", "gpt2", "vit", "resnet"])
def test_masks_are_no_activations(family: str) -> None:
    found = measure_activations(tiny_model(family), [tiny_inputs(family)])
    assert found.finite and found.largest < 1e4
    assert len(found.modules) > 5


@pytest.fixture(scope="module")
def pair(tiny_folder, tmp_path_factory) -> tuple[Path, Path]:
    """Original and locked folder, in bfloat16."""
    original = tiny_folder("llama", torch.bfloat16)
    locked = tmp_path_factory.mktemp("activations") / "locked"
    specdef.lock_checkpoint(original, locked, LockConfig(scale=2.0**30, schedule="convex"))
    return original, locked


def test_a_lock_is_compared_with_its_original_in_every_dtype(pair) -> None:
    original, locked = pair
    found = check_activations(locked, original, [tiny_inputs("llama")], ("float32", "bfloat16", "float16"))  # fmt: skip
    assert [a.dtype for a in found] == ["float32", "bfloat16", "float16"]
    for item in found[:2]:
        assert item.finite and item.max_abs_logit_difference == 0.0 and item.original_finite
        assert item.largest > 2.0**10  # the scaled channel
    assert not found[2].finite and found[2].original_finite and found[2].problem
    alone = check_activations(locked, None, [tiny_inputs("llama")], ("float32",))[0]
    assert alone.max_abs_logit_difference is None and alone.largest == found[0].largest


def test_without_operations_the_range_decides(pair, monkeypatch) -> None:
    run = activations._run

    def lacking(model, batches, **options):
        if next(model.parameters()).dtype == torch.float16:
            raise RuntimeError("\"addmm_impl_cpu_\" not implemented for 'Half'")
        return run(model, batches, **options)

    monkeypatch.setattr(activations, "_run", lacking)
    original, locked = pair
    found = check_activations(locked, original, [tiny_inputs("llama")], ("float16",))[0]
    assert found.by_range and found.dtype == "float16"
    assert not found.finite and math.isinf(found.largest) and "float16" in found.problem
    fine = check_activations(original, None, [tiny_inputs("llama")], ("float16",))[0]
    assert fine.by_range and fine.finite and fine.room is not None and "float32" in fine.sentence()

    def broken(model, batches, **options):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(activations, "_run", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        check_activations(locked, None, [tiny_inputs("llama")], ("float16",))


def test_an_original_that_overflows_is_no_fault_of_the_lock(tiny_folder, tmp_path) -> None:
    model = specdef.load_model(tiny_folder("llama"))
    model.model.norm.weight.data.fill_(3e38)
    model.save_pretrained(tmp_path / "broken")
    found = check_activations(tmp_path / "broken", tmp_path / "broken", [tiny_inputs("llama")], ("float32",))[0]  # fmt: skip
    assert not found.finite and found.original_finite is False and not found.problem
    with pytest.raises(SpecDefError, match=r"activations of .* float32") as error:
        require_finite_activations(tmp_path / "broken", [tiny_inputs("llama")])
    assert "--scale" in error.value.hint


def test_a_calibrated_lock_that_overflows_is_refused(tiny_folder, tmp_path) -> None:
    """Weights fit, activations do not: nothing is left behind, and the module is named."""
    model = specdef.load_model(tiny_folder("llama"))
    block = model.model.layers[0]
    block.post_attention_layernorm.weight.data.mul_(2.0**10)
    block.mlp.gate_proj.weight.data.mul_(2.0**60)
    block.mlp.down_proj.weight.data.mul_(2.0**-30)
    model.save_pretrained(tmp_path / "model")
    batch = tiny_inputs("llama")
    batches = [{**batch, "labels": batch["input_ids"]}]

    def lock(name: str, scale: float) -> None:
        config = LockConfig(scale=scale, schedule="convex", layers=(0,), target_modules=("down_proj",), channel="most-active")  # fmt: skip
        specdef.lock_checkpoint(tmp_path / "model", tmp_path / name, config, calibration=iter(batches))  # fmt: skip

    lock("locked", 2.0**8)
    with pytest.raises(SpecDefError, match=r"activations of model\.layers\.0\.mlp\S* overflow in float32") as error:  # fmt: skip
        lock("other", 2.0**60)
    assert "--scale" in error.value.hint
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"model", "locked", "locked.key.safetensors"}
