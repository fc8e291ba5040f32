"""Rescaling symmetries: every site of every family keeps the function bit for bit, and nothing less than all its legs does."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from specdef.errors import CheckpointError, SelectionError
from specdef.models.tiny import TINY_FAMILIES, save_tiny, tiny_inputs, tiny_model
from specdef.symmetries import FAMILIES, Leg, Site, Symmetries, find_sites, role

MAX_EXPONENT = 20


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Two threads on two busy cores are several times slower than one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Case:
    """A tiny model, and how many sites its table must find there: layers x sites per layer + final ones."""

    family: str
    sites: int
    overrides: tuple[tuple[str, Any], ...] = ()
    tie: bool | None = None

    def __str__(self) -> str:
        tie = "" if self.tie is None else f"tie={self.tie}"
        return "-".join((self.family, *(f"{k}={v}" for k, v in self.overrides), tie)).strip("-")


CASES = [
    Case("llama", 2 * 4 + 1),
    Case("llama", 2 * 4, tie=True),
    Case("mistral", 2 * 4 + 1),
    Case("qwen2", 2 * 4 + 1),
    Case("qwen3", 2 * 4 + 1),
    Case("gemma", 2 * 4),
    Case("gemma", 2 * 4 + 1, tie=False),
    Case("phi3", 2 * 4 + 1),
    Case("mixtral", 2 * (3 + 4) + 1),
    Case("qwen3_moe", 4 + (3 + 4) + 1),
    Case("gpt_oss", 2 * 3 + 1),
    Case("gpt2", 2 * 3),
    Case("gpt2", 2 * 4 + 1, (("activation_function", "relu"),), tie=False),
    Case("gpt_neox", 2 * 3 + 1),
    Case("gpt_neox", 2 * 4 + 1, (("hidden_act", "relu"), ("use_parallel_residual", False))),
    Case("bert", 2 * 1),
    Case("bert", 2 * 2, (("hidden_act", "relu"),)),
    Case("deberta-v2", 2 * 1),
    Case("deberta-v2", 2 * 1, (("share_att_key", False), ("conv_kernel_size", 3))),
    Case("vit", 2 * 3 + 1),
    Case("vit", 2 * 4 + 1, (("hidden_act", "relu"),)),
    # Basic: one batch norm per layer, and a stream per stage, the first with the stem.
    Case("resnet", 4 + 2),
    Case("resnet", 4 + 3, (("downsample_in_first_stage", True),)),
    Case("resnet", 4, (("hidden_act", "gelu"),)),
    # Bottleneck: two per layer; the stem is a stream of its own.
    Case("resnet-bottleneck", 8 + 3),
]


def heads(model: nn.Module) -> str:
    """Return the auto class that loads the model."""
    name = type(model).__name__
    for head in ("CausalLM", "LMHeadModel", "SequenceClassification", "ImageClassification"):
        if name.endswith(head):
            return f"AutoModelFor{head.replace('LMHeadModel', 'CausalLM')}"
    return "AutoModel"


@cache
def built(case: Case) -> nn.Module:
    """Return the model of a case; tests that change it must restore it."""
    return tiny_model(case.family, seed=1, tie=case.tie, **dict(case.overrides))


def config_of(model: nn.Module) -> dict[str, Any]:
    return json.loads(model.config.to_json_string(use_diff=False))


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


@torch.no_grad()
def run(model: nn.Module, family: str) -> Tensor:
    inputs = tiny_inputs(family, seed=3)
    dtype = next(model.parameters()).dtype
    out = model(**{k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()})
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def scale(
    tensors: Mapping[str, Tensor],
    site: Site,
    legs: Iterable[tuple[Leg, int]],
    exponents: Mapping[int, int],
) -> None:
    """Scale some legs of a site in place, channel c by 2^exponents[c]."""
    for leg, sign in legs:
        tensor = tensors[leg.tensor]
        for channel, exponent in exponents.items():
            where, factor = leg.index(channel), 2.0 ** (sign * exponent)
            if site.kind == "offset-norm" and sign > 0:
                tensor[where] = (1 + tensor[where]) * factor - 1
            else:
                tensor[where] *= factor


def draw(
    site: Site, rng: random.Random, channels: int, largest: int = MAX_EXPONENT
) -> dict[int, int]:
    """Return nonzero exponents for some channels of a site."""
    chosen = rng.sample(range(site.size), min(channels, site.size))
    return {c: rng.choice((-1, 1)) * rng.randint(1, largest) for c in chosen}


def linear_inputs(model: nn.Module) -> set[str]:
    """Return every weight that maps linearly, from the modules themselves: an oracle that knows no table."""
    from transformers.pytorch_utils import Conv1D

    found = set()
    for name, module in model.named_modules():
        if (
            isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | Conv1D)
            or "Router" in type(module).__name__
        ):
            found.add(f"{name}.weight")
        elif "Experts" in type(module).__name__:
            found |= {
                f"{name}.{p}" for p, t in module.named_parameters(recurse=False) if t.ndim == 3
            }
    return found


def covered(symmetries: Symmetries) -> set[str]:
    return {leg.tensor for site in symmetries.sites for leg in site.consumers}


def assert_complete(symmetries: Symmetries, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Assert that each linear input of a checkpoint is covered or uncovered, never both."""
    reached, open_ = covered(symmetries), [u.tensor for u in symmetries.uncovered]
    linear = {
        name
        for name, shape in shapes.items()
        if role(name, shape) in ("linear", "conv", "head", "router", "expert")
        and len(shape) > 1
        and not name.endswith("bias")
    }
    tied = {name for name in open_ if role(name, shapes[name]) == "embedding"}
    assert reached | set(open_) == linear | tied
    assert not reached & set(open_) and len(set(open_)) == len(open_)
    assert all(u.reason for u in symmetries.uncovered)


# --- on disk -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
def test_all_sites_at_once_keep_the_outputs_bit_for_bit(case: Case, tmp_path: Path) -> None:
    import transformers

    folder = save_tiny(case.family, tmp_path, seed=1, tie=case.tie, **dict(case.overrides))
    auto = getattr(transformers, heads(built(case)))
    dtypes = (torch.float32, torch.bfloat16)
    before = [run(auto.from_pretrained(folder, dtype=d).eval(), case.family) for d in dtypes]

    file = folder / "model.safetensors"
    tensors = load_file(file)
    original = {name: tensor.clone() for name, tensor in tensors.items()}
    symmetries = find_sites(json.loads((folder / "config.json").read_text()), shapes_of(tensors))
    exact = [site for site in symmetries.sites if site.kind != "offset-norm"]
    rng = random.Random(case.family)
    for site in exact:
        scale(tensors, site, site.legs(), draw(site, rng, channels=2))
    save_file(tensors, file, metadata={"format": "pt"})

    assert len(symmetries.sites) == case.sites
    touched = {leg.tensor for site in exact for leg, _ in site.legs()}
    assert {n for n in tensors if not torch.equal(tensors[n], original[n])} == touched
    for dtype, expected in zip(dtypes, before, strict=True):
        after = run(auto.from_pretrained(folder, dtype=dtype).eval(), case.family)
        assert expected.isfinite().all() and expected.std() > 0
        assert torch.equal(after, expected), dtype


@pytest.mark.parametrize("case", [c for c in CASES if c.family == "gemma"], ids=str)
def test_offset_norms_keep_the_outputs_to_rounding(case: Case) -> None:
    # 1 + w is rounded anew, so only float32 tolerance can be asked for.
    model = built(case)
    state = model.state_dict()
    saved = {name: tensor.clone() for name, tensor in state.items()}
    sites = find_sites(config_of(model), shapes_of(state)).sites
    before = run(model, case.family)
    rng = random.Random(5)
    offset = [site for site in sites if site.kind == "offset-norm"]
    assert offset
    try:
        for site in offset:
            scale(state, site, site.legs(), draw(site, rng, channels=4, largest=3))
        torch.testing.assert_close(run(model, case.family), before, rtol=1e-5, atol=1e-5)
    finally:
        model.load_state_dict(saved)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_linear_input_on_disk_is_covered_or_named(case: Case, tmp_path: Path) -> None:
    save_tiny(case.family, tmp_path, tie=case.tie, **dict(case.overrides))
    shapes = shapes_of(load_file(tmp_path / "model.safetensors"))
    symmetries = find_sites(json.loads((tmp_path / "config.json").read_text()), shapes)
    assert_complete(symmetries, shapes)


# --- in memory, site by site ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_site_alone_in_memory_and_no_leg_can_be_left_out(case: Case) -> None:
    model = built(case)
    state = model.state_dict()
    symmetries = find_sites(config_of(model), shapes_of(state))
    assert len(symmetries.sites) == case.sites
    assert len({site.name for site in symmetries.sites}) == case.sites
    assert covered(symmetries) | {u.tensor for u in symmetries.uncovered} == linear_inputs(model)

    before = run(model, case.family)
    rng = random.Random(7)
    for site in symmetries.sites:
        tensors = {leg.tensor for leg, _ in site.legs()}
        saved = {name: state[name].clone() for name in tensors}
        # All channels, so that one dead ReLU cannot hide a missing leg.
        exponents = draw(site, rng, channels=site.size, largest=3)
        for left_out in (None, *site.legs()):
            scale(state, site, [leg for leg in site.legs() if leg != left_out], exponents)
            after = run(model, case.family)
            for name, tensor in saved.items():
                if left_out is None:
                    assert not torch.equal(state[name], tensor), (
                        f"{site.name} leaves {name} as it is"
                    )
                state[name].copy_(tensor)
            close = torch.allclose(after, before, rtol=1e-4, atol=1e-4)
            if left_out is not None:
                assert not close, f"{site.name} does not need {left_out}"
            elif site.kind == "offset-norm":
                assert close, site.name
            else:
                assert torch.equal(after, before), site.name
    assert torch.equal(run(model, case.family), before)


def test_site_and_table_lists_are_complete() -> None:
    assert {built(case).config.model_type for case in CASES} == set(FAMILIES)
    assert {case.family for case in CASES} == set(TINY_FAMILIES)


# --- names, heads, ties --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "bert", "vit", "mixtral"])
def test_a_base_model_saved_alone_has_the_same_sites_but_the_last_norm(
    family: str, tmp_path: Path
) -> None:
    import transformers

    model = tiny_model(family, seed=1)
    full = find_sites(config_of(model), shapes_of(model.state_dict()))
    model.base_model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    symmetries = find_sites(json.loads((tmp_path / "config.json").read_text()), shapes_of(tensors))
    assert not any(name.startswith(f"{model.base_model_prefix}.") for name in tensors)
    assert_complete(symmetries, shapes_of(tensors))
    assert [s.kind for s in symmetries.sites] == [s.kind for s in full.sites if s.layer is not None]

    before = run(transformers.AutoModel.from_pretrained(tmp_path).eval(), family)
    rng = random.Random(3)
    for site in symmetries.sites:
        scale(tensors, site, site.legs(), draw(site, rng, channels=2))
    save_file(tensors, file, metadata={"format": "pt"})
    assert torch.equal(run(transformers.AutoModel.from_pretrained(tmp_path).eval(), family), before)


def test_resnet_without_classifier_keeps_its_streams() -> None:
    model = tiny_model("resnet").base_model
    symmetries = find_sites(config_of(model), shapes_of(model.state_dict()))
    assert {site.kind for site in symmetries.sites} == {"batchnorm"}
    assert "returns its streams" in symmetries.uncovered[-1].reason


@pytest.mark.parametrize(
    ("family", "auto", "reader"),
    [
        ("llama", "AutoModelForSequenceClassification", "score.weight"),
        ("llama", "AutoModelForQuestionAnswering", "qa_outputs.weight"),
        # Its config says tied, but a classifier has no vocabulary head.
        ("gpt2", "AutoModelForSequenceClassification", "score.weight"),
        ("gpt_neox", "AutoModelForTokenClassification", "classifier.weight"),
        ("vit", "AutoModelForMaskedImageModeling", "decoder.0.weight"),
    ],
)
def test_the_final_norm_feeds_the_head_that_is_there(family: str, auto: str, reader: str) -> None:
    import transformers

    torch.manual_seed(0)
    config = tiny_model(family).config
    config.encoder_stride = 8
    model = getattr(transformers, auto).from_config(config).eval()
    state = model.state_dict()
    site = find_sites(config_of(model), shapes_of(state)).sites[-1]
    assert site.layer is None and reader in {leg.tensor for leg in site.consumers}

    def outputs() -> list[Tensor]:
        with torch.no_grad():
            out = model(
                **tiny_inputs(family, batch=1)
            )  # no padding token is set: one example at a time
        return [v for v in out.values() if isinstance(v, Tensor)]

    before = outputs()
    scale(state, site, site.legs(), draw(site, random.Random(0), channels=3))
    assert all(torch.equal(a, b) for a, b in zip(before, outputs(), strict=True))


def test_a_tied_head_is_uncovered_with_its_reason() -> None:
    for tie, names in ((True, {"lm_head.weight"}), (False, set())):
        model = tiny_model("qwen3", tie=tie)
        symmetries = find_sites(config_of(model), shapes_of(model.state_dict()))
        assert {u.tensor for u in symmetries.uncovered} == names
        assert ("model.norm" in {site.name for site in symmetries.sites}) is not tie
    model = tiny_model("gpt2")
    shapes = shapes_of(model.state_dict())
    del shapes["lm_head.weight"]  # as on disk
    reasons = {u.tensor: u.reason for u in find_sites(config_of(model), shapes).uncovered}
    assert "tied" in reasons["transformer.wte.weight"]


def test_uncovered_inputs_say_why() -> None:
    def reasons(family: str) -> dict[str, str]:
        model = tiny_model(family)
        found = find_sites(config_of(model), shapes_of(model.state_dict())).uncovered
        return {u.tensor: u.reason for u in found}

    assert "clamps" in reasons("gpt_oss")["model.layers.0.mlp.experts.down_proj"]
    assert "gelu_new" in reasons("gpt2")["transformer.h.1.mlp.c_proj.weight"]
    assert "post-norm" in reasons("bert")["bert.encoder.layer.0.attention.self.query.weight"]
    assert "pixels" in reasons("resnet")["resnet.embedder.embedder.convolution.weight"]


# --- what does not fit its table -----------------------------------------------------------------------------------


@pytest.fixture
def llama() -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    model = built(CASES[0])
    return config_of(model), shapes_of(model.state_dict())


def test_unknown_family_names_the_known_ones(llama: Any) -> None:
    config, shapes = llama
    with pytest.raises(SelectionError, match=r"mistrall.*known: bert.*Closest: mistral") as caught:
        find_sites(config | {"model_type": "mistrall"}, shapes)
    assert caught.value.nearest[0] == "mistral"
    assert "symmetries/families/" in caught.value.hint and "adding_a_family.md" in caught.value.hint


def test_misshapen_and_missing_tensors_are_named(llama: Any) -> None:
    config, shapes = llama
    name = "model.layers.1.self_attn.o_proj.weight"
    with pytest.raises(
        CheckpointError, match=r"expected length 48 along axis 1, found shape \(32, 47\)"
    ) as caught:
        find_sites(config, shapes | {name: (32, 47)})
    assert caught.value.tensor == name
    with pytest.raises(CheckpointError, match="missing") as caught:
        find_sites(config, {k: v for k, v in shapes.items() if k != name})
    assert caught.value.tensor == name
    with pytest.raises(CheckpointError, match="missing"):
        find_sites(config | {"num_hidden_layers": 3}, shapes)
    with pytest.raises(CheckpointError, match="no tensor of the first layer"):
        find_sites(config, {f"wrapped.{k}": v for k, v in shapes.items()})
    with pytest.raises(CheckpointError, match="expected length"):
        find_sites(config | {"num_key_value_heads": 4}, shapes)
    with pytest.raises(CheckpointError, match="lacks 'num_attention_heads'"):
        find_sites({k: v for k, v in config.items() if k != "num_attention_heads"}, shapes)


def test_a_stranger_closes_its_layer_and_no_other(llama: Any) -> None:
    config, shapes = llama
    lora = "model.layers.0.self_attn.q_proj.lora_A.default.weight"
    symmetries = find_sites(config, shapes | {lora: (4, 32)})
    assert {site.layer for site in symmetries.sites} == {1, None}
    closed = {u.tensor: u.reason for u in symmetries.uncovered}
    assert lora in closed and lora in closed["model.layers.0.mlp.down_proj.weight"]

    symmetries = find_sites(config, shapes | {"v_head.summary.weight": (1, 32)})
    assert {site.layer for site in symmetries.sites} == {0, 1}
    assert {u.tensor for u in symmetries.uncovered} == {"lm_head.weight", "v_head.summary.weight"}


def test_quantised_weights_close_their_layers(llama: Any) -> None:
    config, shapes = llama
    packed = {k.replace("proj.weight", "proj.qweight"): v for k, v in shapes.items()}
    symmetries = find_sites(config, packed)
    assert [site.name for site in symmetries.sites] == ["model.norm"]
    assert any("qweight" in u.reason for u in symmetries.uncovered)


def test_a_stranger_closes_the_whole_of_a_resnet() -> None:
    model = tiny_model("resnet")
    shapes = shapes_of(model.state_dict()) | {"extra.weight": (4, 4)}
    symmetries = find_sites(config_of(model), shapes)
    assert not symmetries.sites
    assert {u.tensor for u in symmetries.uncovered} == linear_inputs(model) | {"extra.weight"}


def test_masks_and_buffers_of_older_checkpoints_are_no_strangers() -> None:
    for family, extra in {
        "gpt2": {
            "transformer.h.0.attn.bias": (1, 1, 64, 64),
            "transformer.h.1.attn.masked_bias": (),
        },
        "gpt_neox": {"gpt_neox.layers.0.attention.rotary_emb.inv_freq": (4,)},
        "llama": {"model.layers.0.self_attn.rotary_emb.inv_freq": (6,)},
        "bert": {"bert.embeddings.position_ids": (1, 64)},
    }.items():
        model = tiny_model(family)
        shapes = shapes_of(model.state_dict())
        assert find_sites(config_of(model), shapes | extra) == find_sites(config_of(model), shapes)


def test_a_null_in_the_config_means_the_derived_value() -> None:
    # Mistral's default is 8 key-value heads; null asks for one per query head.
    model = tiny_model("mistral", num_key_value_heads=4, head_dim=8)
    config = config_of(model) | {"num_key_value_heads": None, "head_dim": None}
    shapes = shapes_of(model.state_dict())
    assert find_sites(config, shapes) == find_sites(config_of(model), shapes)


# --- legs ----------------------------------------------------------------------------------------------------------


def test_legs_of_fused_tensors_address_the_right_part() -> None:
    model = built(Case("gpt_neox", 7))
    sites = find_sites(config_of(model), shapes_of(model.state_dict())).sites
    value = next(site for site in sites if site.kind == "value")
    # Head 1 starts at row 24; its value at 24 + 16.
    assert value.producers[0].positions(8) == (40,)
    assert value.producers[0].extent == 96
    assert [leg.tensor.rsplit(".", 1)[1] for leg in value.producers] == ["weight", "bias"]


def test_leg_index_agrees_with_positions() -> None:
    leg = Leg(tensor="x", axis=2, size=4, start=1, block=2, pitch=3, repeat=2, lead=(1,))
    tensor = torch.zeros(2, 3, leg.extent)
    for channel in range(4):
        tensor[leg.index(channel)] += 1 + channel
    expected = torch.zeros(leg.extent)
    for channel in range(4):
        for position in leg.positions(channel):
            expected[position] = 1 + channel
    assert torch.equal(tensor[1], expected.expand(3, -1)) and not tensor[0].any()
    with pytest.raises(IndexError, match=r"0\.\.3, got 4"):
        leg.index(4)
    assert replace(leg, lead=()).index(0) == (slice(None), slice(None), [1, 4])


# --- tiny models ---------------------------------------------------------------------------------------------------


def test_tiny_models_are_seeded_and_leave_the_global_generator_alone() -> None:
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    one, two, other = (tiny_model("qwen3_moe", seed=s).state_dict() for s in (4, 4, 5))
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)


def test_tiny_folders_can_be_sharded_and_cast(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path, shards=3, dtype=torch.bfloat16)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) >= 3
    tensors = load_file(next(tmp_path.glob("model-00001*")))
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    with pytest.raises(ValueError, match="both"):
        save_tiny("llama", tmp_path, shards=2, max_shard_size="1KB")
    with pytest.raises(ValueError, match="family must be one of llama"):
        tiny_model("lama")
