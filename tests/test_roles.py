"""Roles of tensors, selections and layer numbers, against the modules of real architectures."""

from __future__ import annotations

import json
from typing import Any

import pytest
from torch import nn

from specdef.models.tiny import TINY_FAMILIES, tiny_model
from specdef.symmetries import is_transposed, layer_index, lockable_matrices, matches, role


def expected_roles(model: nn.Module) -> dict[str, str]:
    """Return the role of each tensor from the type of the module that holds it."""
    from transformers.pytorch_utils import Conv1D

    roles = {}
    tops = {"lm_head", "score", "classifier", "classifier.1"}
    for name, module in model.named_modules():
        kind = type(module).__name__
        for leaf, tensor in module.named_parameters(recurse=False):
            if "Experts" in kind:
                found = "expert"
            elif "Router" in kind:
                found = "router"
            elif "norm" in kind.lower():
                found = "norm"
            elif isinstance(module, nn.Embedding):
                found = "embedding"
            elif leaf == "bias":
                found = "bias"
            elif name in tops:
                found = "head"
            elif isinstance(module, nn.Linear | Conv1D):
                found = "linear"
            elif isinstance(module, nn.Conv2d):
                found = "conv"
            elif leaf in ("cls_token", "position_embeddings"):
                found = "embedding"
            else:
                assert leaf == "sinks" and tensor.ndim == 1
                found = "other"
            roles[f"{name}.{leaf}"] = found
        roles |= {f"{name}.{leaf}": "buffer" for leaf, _ in module.named_buffers(recurse=False)}
    return roles


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_roles_follow_the_modules(family: str) -> None:
    from transformers.pytorch_utils import Conv1D

    model = tiny_model(family)
    config: dict[str, Any] = json.loads(model.config.to_json_string(use_diff=False))
    expected = expected_roles(model)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, shape in shapes.items():
        assert role(name, shape) == expected[name], name
        assert role(name, shape, config["model_type"]) == expected[name], name

    plain = {n for n in shapes if expected[n] in ("linear", "conv")}
    lockable = lockable_matrices(config, shapes)
    assert set(lockable) == plain and len(lockable) == len(plain)
    modules = dict(model.named_modules())
    for name in plain:
        stored_in_out = isinstance(modules[name.removesuffix(".weight")], Conv1D)
        assert is_transposed(name, config) is stored_in_out, name


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("model.layers.0.block_sparse_moe.experts.3.w1.weight", (8, 4), "expert"),
        ("model.layers.0.block_sparse_moe.gate.weight", (8, 4), "router"),
        ("model.layers.0.mlp.router.bias", (8,), "router"),
        ("model.layers.0.mlp.experts.gate_up_proj_bias", (8, 4), "expert"),
        ("model.layers.0.mlp.shared_expert.up_proj.weight", (8, 4), "linear"),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", (4,), "buffer"),
        ("transformer.h.0.attn.bias", (1, 1, 8, 8), "buffer"),
        ("bert.embeddings.LayerNorm.gamma", (8,), "norm"),
        ("cls.predictions.transform.LayerNorm.beta", (8,), "norm"),
        ("cls.predictions.decoder.weight", (96, 8), "head"),
        ("bert.pooler.dense.weight", (8, 8), "linear"),
        ("gpt_neox.embed_in.weight", (96, 8), "embedding"),
        ("embed_out.weight", (96, 8), "head"),
        ("layer1.0.bn1.weight", (8,), "norm"),
        ("deberta.encoder.conv.conv.weight", (8, 8, 3), "conv"),
        ("logit_scale", (), "other"),
    ],
)
def test_roles_of_names_seen_on_disk(name: str, shape: tuple[int, ...], expected: str) -> None:
    assert role(name, shape) == expected


def test_stacked_experts_of_gpt_oss_are_transposed_and_those_of_mixtral_are_not() -> None:
    name = "model.layers.0.mlp.experts.down_proj"
    assert is_transposed(name, {"model_type": "gpt_oss"})
    assert not is_transposed(name, {"model_type": "mixtral"})
    assert not is_transposed(name, {"model_type": "no such family"})


def test_lockable_matrices_come_in_natural_order_and_need_no_table() -> None:
    names = [f"layers.{i}.linear.weight" for i in (10, 2)]
    shapes = dict.fromkeys(names, (4, 4)) | {"lm_head.weight": (96, 4), "norm.weight": (4,)}
    assert lockable_matrices({"model_type": "mine"}, shapes) == names[::-1]


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("model.layers.11.self_attn.q_proj.weight", 11),
        ("model.layers.3.block_sparse_moe.experts.7.w1.weight", 3),
        ("transformer.h.0.mlp.c_fc", 0),
        ("bert.encoder.layer.4.output.dense.weight", 4),
        ("resnet.encoder.stages.1.layers.0.layer.2.convolution.weight", 1),
        ("classifier.1.weight", None),
        ("model.embed_tokens.weight", None),
    ],
)
def test_layer_index(name: str, index: int | None) -> None:
    assert layer_index(name) == index


@pytest.mark.parametrize(
    ("targets", "taken"),
    [
        (None, True),
        (["q_proj"], True),
        (["self_attn.q_proj"], True),
        (["model.layers.1.self_attn.q_proj"], True),
        (["model.layers.1.self_attn.q_proj.weight"], True),
        (["attn.q_proj"], False),
        (["proj"], False),
        ([], False),
        (r".*\.[qk]_proj", True),
        (r"q_proj", False),
        (r".*layers\.0\..*", False),
    ],
)
def test_matches_by_the_rules_of_peft(targets: list[str] | str | None, taken: bool) -> None:
    for name in ("model.layers.1.self_attn.q_proj.weight", "model.layers.1.self_attn.q_proj"):
        if targets != ["model.layers.1.self_attn.q_proj.weight"] or name.endswith("weight"):
            assert matches(name, targets) is taken


def test_matches_agrees_with_peft() -> None:
    peft = pytest.importorskip("peft.tuners.tuners_utils")
    names = [name for name, _ in tiny_model("mixtral").named_modules()]
    for targets in (["q_proj", "gate"], ["mlp.gate"], r".*\.\d\.self_attn\..*", ["lm_head"]):
        config = peft_config(targets)
        for name in names:
            theirs = bool(peft.check_target_module_exists(config, name))
            assert matches(name, targets) is theirs, (name, targets)


def peft_config(targets: list[str] | str) -> Any:
    from peft import LoraConfig

    return LoraConfig(target_modules=targets)


def test_a_broken_expression_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"target_modules must be a regular expression .* got '\['"
    ):
        matches("q_proj", "[")
