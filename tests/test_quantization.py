"""Rounding of weights and back against closed forms; the model comes back bit for bit; what it costs is measured as defined."""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch
from torch import Tensor, nn

import specdef
from specdef.curvature.losses import LMLoss, model_outputs
from specdef.lock import quantization
from specdef.lock.config import LockConfig
from specdef.lock.quantization import (
    GGUF_FORMATS,
    Format,
    formats,
    quantized,
    round_to_gguf,
    round_to_grid,
    weight_matrices,
)
from specdef.lock.quantization_cost import compare_quantization, measure_quantization
from specdef.models.tiny import tiny_inputs, tiny_model

GGUF = pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="needs gguf")
NAMED = {form.name: form for form in formats()[0]}


def matrix(rows: int = 4, columns: int = 64) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))


def batch() -> dict[str, Tensor]:
    inputs = tiny_inputs("llama")
    return {**inputs, "labels": inputs["input_ids"]}


@pytest.mark.parametrize(
    ("name", "bits", "shape"), [("int8", 8, (4, 64)), ("int8-tensor", 8, (1, 256)), ("int4-group32", 4, (8, 32))]
)  # fmt: skip
def test_what_shares_a_step(name: str, bits: int, shape: tuple[int, int]) -> None:
    """Every value is a whole number of steps, the largest of those that share one is kept, and none moves further than half."""
    form, values = NAMED[name], matrix()
    assert form.weights is not None
    got = form.weights(values).reshape(shape).double()
    want = values.reshape(shape).double()
    step = want.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    assert torch.allclose((got / step).round() * step, got, rtol=1e-6, atol=0)
    assert bool(((got - want).abs() <= step * 0.5001).all()) and not torch.equal(got, want)


@GGUF
@pytest.mark.parametrize(("name", "levels"), [("q8_0", 127), ("q5_0", 16), ("q4_0", 8)])
def test_gguf_blocks(name: str, levels: int) -> None:
    """Blocks of 32 along a row, with one step in float16 each."""
    values = matrix()
    got = round_to_gguf(values, name)
    blocks = values.view(-1, 32)
    step = blocks.abs().amax(1, keepdim=True) / levels
    assert bool(((got.view(-1, 32) - blocks).abs() <= 1.01 * step).all())
    other = values.clone()
    other[0, :32] *= 2.0  # a block knows nothing of its neighbours
    assert torch.equal(round_to_gguf(other, name)[:, 32:], got[:, 32:])
    assert torch.equal(round_to_gguf(other, name)[0, :32], 2 * got[0, :32])


@GGUF
def test_a_step_beyond_float16_is_seen() -> None:
    values = matrix()
    values[0, 0] = 2.0**30
    got = round_to_gguf(values, "q8_0")
    assert not bool(got[0, :32].isfinite().all()) and bool(got[1:].isfinite().all())


def test_formats_that_cannot_be_written_are_named(monkeypatch) -> None:
    found, skipped = formats()
    assert {f.name for f in found} | set(skipped) >= {"int8", "int4-group32", *GGUF_FORMATS}
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    found, skipped = formats()
    assert set(skipped) == set(GGUF_FORMATS) and "int8" in {f.name for f in found}
    assert "extra: gguf" in skipped["q8_0"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "resnet"])
def test_the_model_comes_back_bit_for_bit(family: str) -> None:
    model = tiny_model(family)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    names = set(weight_matrices(model))
    assert names and not any("embed_tokens" in n or "wte" in n or "norm" in n for n in names)
    with pytest.raises(KeyError), quantized(model, NAMED["int4-group32"]):
        changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
        assert changed == names
        raise KeyError
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_rows_of_a_transposed_layer_are_its_outputs() -> None:
    model = tiny_model("gpt2")
    name = next(n for n in weight_matrices(model) if n.endswith("c_attn.weight"))
    stored = model.get_parameter(name).detach().clone()
    with quantized(model, NAMED["int8"]):
        assert torch.equal(model.get_parameter(name), round_to_grid(stored.T, 8).T)


def test_frozen_parameters_are_quantised_and_stay_frozen() -> None:
    model = tiny_model("llama").requires_grad_(False)
    assert len(weight_matrices(model)) == len(weight_matrices(tiny_model("llama")))
    assert not any(p.requires_grad for p in model.parameters())


def test_activations_are_rounded_per_token() -> None:
    layer = nn.Linear(8, 3, bias=False)
    inputs = matrix(5, 8)
    with torch.no_grad(), quantized(nn.Sequential(layer), NAMED["int8-activations"]):
        got = layer(inputs)
    assert torch.equal(got, layer(round_to_grid(inputs, 8)))
    assert torch.equal(layer(inputs), inputs @ layer.weight.T)


def test_matrices_of_no_whole_blocks_stay() -> None:
    def refuse(weights: Tensor) -> Tensor:
        if weights.shape[-1] == 24:
            raise ValueError("no whole number of blocks")
        return torch.zeros_like(weights)

    model = nn.Sequential(nn.Linear(24, 8), nn.Linear(8, 2))
    with quantized(model, Format(name="blocks", summary="", weights=refuse)) as left:
        assert left == 1 and model[0].weight.any() and not model[1].weight.any()


def test_cost_is_what_it_is_called() -> None:
    """Against the definition, on two batches of which only the first is kept for the error."""
    model, form = tiny_model("llama"), NAMED["int4-group32"]
    batches = [batch(), {**tiny_inputs("llama", seed=1), "labels": tiny_inputs("llama", seed=1)["input_ids"]}]  # fmt: skip
    found = measure_quantization(model, batches, forms=[form])

    def losses() -> tuple[list[Tensor], float]:
        logits = [model_outputs(model, b).detach() for b in batches]
        terms = [LMLoss().terms(x, LMLoss().targets(b)).sum() for x, b in zip(logits, batches, strict=True)]  # fmt: skip
        return logits, float(sum(terms)) / 44  # 11 of 12 tokens, 2 rows, 2 batches

    exact, loss = losses()
    with quantized(model, form):
        rounded, after = losses()
    assert found.loss == pytest.approx(loss) and found.formats[0].loss == pytest.approx(after)
    distance = torch.stack(rounded) - torch.stack(exact)
    assert found.formats[0].relative_logit_error == pytest.approx(float(distance.norm() / torch.stack(exact).norm()), rel=1e-5)  # fmt: skip


def test_a_lock_makes_quantising_dear(tiny_folder, tmp_path) -> None:
    """Per matrix, the scaled row takes the step of all others; the original pays a little. Without a lock both pay the same."""
    folder = tiny_folder("llama")
    specdef.lock_checkpoint(
        folder, tmp_path / "locked", LockConfig(scale=2.0**20, schedule="convex")
    )
    forms = [NAMED["int8"], NAMED["int8-tensor"]]
    report = compare_quantization(folder, tmp_path / "locked", [batch()], forms=forms)
    values = report.to_dict()
    assert values["loss"]["original"] == values["loss"]["locked"]
    per_matrix = values["formats"][1]
    assert per_matrix["locked"]["relative_logit_error"] > 5 * per_matrix["original"]["relative_logit_error"]  # fmt: skip
    first, last = report.sentences()[0], report.sentences()[-1]
    assert "int8-tensor" in first and "carries no lock" in last
    same = compare_quantization(folder, folder, [batch()], forms=forms)
    assert same.original == same.locked and "no more than the original" in same.sentences()[0]
    assert len(same.lines()) == 5


def test_what_is_not_a_number_is_said(monkeypatch) -> None:
    model = tiny_model("llama")
    form = Format(name="broken", summary="", weights=lambda w: torch.full_like(w, math.nan))
    cost = measure_quantization(model, [batch()], forms=[form])
    assert math.isnan(cost.formats[0].loss) and cost.formats[0].to_dict()["loss"] is None
    report = quantization_report(cost)
    assert report.sentences()[0] == "Quantising makes the locked model unusable: broken."
    assert report.sentences()[-1] == "q9 was not measured: there is none."
    assert "not a number" in report.lines()[-1]


def quantization_report(locked):
    from specdef.lock.quantization_cost import FormatCost, ModelCost, QuantizationReport

    fine = FormatCost(format="broken", relative_logit_error=0.1, loss=locked.loss)
    original = ModelCost(loss=locked.loss, formats=(fine,))
    return QuantizationReport(original=original, locked=locked, skipped={"q9": "there is none"})


def test_the_attack_rounds_by_the_same_code() -> None:
    from specdef.attacks.structural import quantise

    assert quantise.round_to_grid is quantization.round_to_grid


@GGUF
def test_rows_of_no_whole_blocks_are_left() -> None:
    layer = nn.Linear(24, 8)
    before = layer.weight.detach().clone()
    with quantized(nn.Sequential(layer), NAMED["q8_0"]) as left:
        assert left == 1 and torch.equal(layer.weight, before)
