"""The forecast of a lock's slowdown is what a best step on the locked model gains, in float64, over one on the original."""

from __future__ import annotations

import copy
import math

import pytest
import torch

import specdef
from specdef.curvature.losses import LMLoss
from specdef.curvature.operators import GGNOperator
from specdef.errors import SpecDefError
from specdef.lock.forecast import (
    Expectation,
    expected_slowdowns,
    exponents_of,
    natural_parts,
    progress,
    tier_lines,
)
from specdef.lock.in_memory import model_config, unique_tensors
from specdef.lock.lock import plan_lock
from specdef.models.tiny import tiny_model
from specdef.weights.edit import ScaleEdit, apply_all
from specdef.weights.source import MemorySource

CONFIGS = {
    # 2^20: what lies 20 octaves below the top still counts for something in float64
    "max": specdef.LockConfig(scale=2.0**20, min_scale=2.0**4, gap=6),
    "convex": specdef.LockConfig.preset("convex", scale=2.0**10),
    "uniform": specdef.LockConfig.preset("uniform"),
}


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def batches():
    ids = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": ids, "labels": ids}]


def plan(model, config):
    return plan_lock(MemorySource(unique_tensors(model), model_config(model)), config)


def best_steps(model, batches):
    """What a step along the signs, and one along the gradient, brings at its best rate."""
    G = GGNOperator(model, batches, LMLoss())
    g = G.gradient()
    found = {}
    for name, s in (("sign", g.sign()), ("gradient", g)):
        s = s / torch.linalg.vector_norm(s)
        found[name] = float(g @ s) ** 2 / (2 * float(s @ (G @ s)))
    return found


@pytest.mark.parametrize("design", CONFIGS)
def test_it_is_what_a_step_on_the_locked_model_gains(design, llama, batches):
    scalings = plan(llama, CONFIGS[design]).scalings
    original = copy.deepcopy(llama).double()
    locked = copy.deepcopy(original)
    apply_all(unique_tensors(locked), scalings)
    before, after = best_steps(original, batches), best_steps(locked, batches)
    parts = {"all": [name for name, _ in llama.named_parameters()]}
    for found in expected_slowdowns(original, batches, scalings, parts=parts):
        assert found.slowdown == pytest.approx(before[found.step] / after[found.step], rel=1e-6)
        assert found.part == "all" and found.exponent == round(math.log2(CONFIGS[design].top))
    # float32, as it is called in practice
    for found in expected_slowdowns(llama, batches, scalings, parts=parts):
        assert found.slowdown == pytest.approx(before[found.step] / after[found.step], rel=1e-3)


def test_the_default_lock_slows_every_part_and_the_model_is_left_as_it_was(llama, batches):
    model = copy.deepcopy(llama)
    model.lm_head.weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    found = expected_slowdowns(model, batches, plan(model, specdef.LockConfig()).scalings)
    assert {e.part for e in found} == {"all", "linear layers", "attention", "other linear layers", "norms and biases", "last blocks"}  # fmt: skip
    assert all(e.slowdown > 1.1 for e in found), found  # random weights have no useless channel
    assert {e.exponent for e in found if e.part in ("all", "norms and biases", "last blocks")} == {48}  # fmt: skip
    assert all(e.exponent < 48 for e in found if "linear" in e.part or e.part == "attention")
    assert not model.lm_head.weight.requires_grad and model.model.norm.weight.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_without_a_lock_nothing_is_slowed(llama, batches):
    for found in expected_slowdowns(llama, batches, {}, steps=["sign"]):
        assert found.slowdown == pytest.approx(1, rel=1e-5) and found.exponent == 0


def test_a_part_is_what_it_names(llama, batches):
    """A lock outside of it is not met."""
    scalings = plan(llama, specdef.LockConfig()).scalings
    found = expected_slowdowns(llama, batches, scalings, parts={"embeddings": ["model.embed_tokens.weight"]})  # fmt: skip
    assert [(e.exponent, e.step) for e in found] == [(0, "sign"), (0, "gradient")]
    assert all(e.slowdown == pytest.approx(1, rel=1e-5) for e in found)


def test_parts_follow_the_names():
    shapes = {f"h.{i}.{name}": (4, 4) for i in range(6) for name in ("attn.q.weight", "mlp.weight")}
    parts = natural_parts({**shapes, "h.0.norm.weight": (4,), "wte.weight": (9, 4)})
    assert len(parts["all"]) == 14 and len(parts["linear layers"]) == 12
    assert len(parts["attention"]) == len(parts["other linear layers"]) == 6
    assert parts["norms and biases"] == ["h.0.norm.weight"]
    assert {name.split(".")[1] for name in parts["last blocks"]} == {"2", "3", "4", "5"}
    assert set(natural_parts({"weight": (3, 3)})) == {"all", "linear layers"}
    two = {"embed.weight": (9, 4), "h.0.w": (4, 4), "h.1.w": (4, 4)}
    assert natural_parts(two)["last blocks"] == ["h.0.w", "h.1.w"]


def test_exponents_add_where_a_row_and_a_column_cross():
    edits = [
        ScaleEdit(axis=0, position=1, exponent=5), ScaleEdit(axis=1, position=0, exponent=-7),
        ScaleEdit(axis=1, position=2, exponent=3, lead=()),
    ]  # fmt: skip
    found = exponents_of({"w": (2, 3), "e": (2, 2, 2)}, {"w": edits, "e": [ScaleEdit(axis=2, position=1, exponent=-4, lead=(1,))]})  # fmt: skip
    assert found["w"].tolist() == [[7, 0, -3], [2, -5, -8]]
    assert found["e"].tolist() == [[[0, 0], [0, 0]], [[0, 4], [0, 4]]]


def test_no_progress_is_none_and_length_does_not_matter(llama, batches):
    G = GGNOperator(copy.deepcopy(llama).double(), batches, LMLoss())
    g = G.gradient()
    assert progress(G, g, torch.zeros_like(g)) == 0
    assert progress(G, g, g) > 0
    assert progress(G, g, 1e-6 * g) == pytest.approx(progress(G, g, g))


def test_there_must_be_data(llama):
    with pytest.raises(SpecDefError, match="no batches") as caught:
        expected_slowdowns(llama, [], {})
    assert caught.value.hint


def test_every_tier_is_named_data_or_not():
    expected = [
        Expectation(part=part, step="sign", exponent=48, slowdown=slowdown)
        for part, slowdown in (("all", 900.0), ("attention", 40.0), ("last blocks", 70.0))
    ]
    lines = tier_lines(expected, 48)
    assert [line.split(" ")[:2] for line in lines] == [["tier", str(i)] for i in range(1, 7)]
    assert "2^48" in lines[0] and "900 times" in lines[1]
    assert "attention" in lines[2] and "40 times" in lines[2]
    assert "seconds" in lines[4]
    without = tier_lines([], 48)
    assert len(without) == 6 and all("without calibration" in line for line in without[1:3])
