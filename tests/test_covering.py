"""The default lock's exponents: every run of layers has a top of its own, both sides are covered, and nothing leaves float32."""

from __future__ import annotations

import math
from collections import defaultdict

import pytest
import torch

from specdef.lock.config import LockConfig
from specdef.lock.covering import ROOM, VECTORS, covering, depths
from specdef.lock.forecast import exponents_of
from specdef.lock.in_memory import model_config, unique_tensors
from specdef.lock.lock import plan_lock
from specdef.models.tiny import TINY_FAMILIES, tiny_model
from specdef.symmetries import Leg, Site
from specdef.weights.source import MemorySource

DEFAULT = LockConfig()


def site(name, kind, layer, writer, readers):
    legs = [Leg(tensor=f"{layer}.{n}", axis=axis, size=4) for n, axis in ((writer, 0), *((r, 1) for r in readers))]  # fmt: skip
    return Site(name=name, kind=kind, layer=layer, size=4, producers=(legs[0],), consumers=tuple(legs[1:]))  # fmt: skip


def transformer(num_layers):
    """Sites of a Llama with a norm behind its layers."""
    found = []
    for i in range(num_layers):
        found += [
            site(f"{i}.norm1", "norm", i, "norm1", ("q", "k", "v")), site(f"{i}.v", "value", i, "v", ("o",)),
            site(f"{i}.norm2", "norm", i, "norm2", ("gate", "up")), site(f"{i}.up", "gated", i, "up", ("down",)),
        ]  # fmt: skip
    return [*found, site("norm", "norm", None, "norm", ("head",))]


def plain(num_layers):
    return [site(str(i), "relu", None, f"w{i}", (f"w{i + 1}",)) for i in range(num_layers)]


def tops(sites, config, kinds, side):
    """Return the highest exponent of every layer, in order, of these kinds of sites on this side."""
    highest = defaultdict(int)
    for s, own, exponent in covering(sites, config):
        if s.kind in kinds and own == side:
            layer = s.name if s.layer is None else s.layer
            highest[layer] = max(highest[layer], exponent)
    order = dict.fromkeys(s.name if s.layer is None else s.layer for s in sites if s.kind in kinds)
    return [highest[layer] for layer in order]


def every_run_has_one_top(exponents):
    for start in range(len(exponents)):
        for end in range(start + 1, len(exponents) + 1):
            run = exponents[start:end]
            if run.count(max(run)) != 1:
                return False
    return True


@pytest.mark.parametrize("num_positions", [*range(1, 20), 31, 81])
def test_every_run_of_neighbours_has_one_position_on_top(num_positions):
    for root in {0, num_positions // 2, num_positions - 1}:
        found = depths(num_positions, root)
        assert found[root] == 0 and every_run_has_one_top([-depth for depth in found])
        assert max(found) <= 1 + math.ceil(math.log2(num_positions + 1))


@pytest.mark.parametrize("num_layers", [1, 2, 3, 4, 5, 7, 8, 12, 16, 24, 30])
@pytest.mark.parametrize("sides", ["both", "readers"])
def test_every_run_of_layers_has_one_layer_on_the_highest_level(num_layers, sides):
    """Whichever neighbouring layers an attacker trains, of the norms, of what reads them, or of what lies between linear layers."""
    config = LockConfig(sides=sides)
    sites = transformer(num_layers)
    for kinds in (VECTORS, {"value"}, {"gated"}):
        assert every_run_has_one_top(tops(sites, config, kinds, "readers")), kinds
    if sides == "both":
        assert every_run_has_one_top(tops(sites, config, VECTORS, "writers"))


def test_levels_lie_a_gap_apart_and_gains_above_columns():
    config = LockConfig(gap=5, slack=6)
    sites = transformer(7)
    writers = tops(sites, config, VECTORS, "writers")
    assert max(writers) == 48 and writers.index(48) == 6  # the last layer with all kinds of sites
    assert {(48 - e) % 5 for e in writers} == {0}
    assert [w - r for w, r in zip(writers, tops(sites, config, VECTORS, "readers"), strict=True)] == [6] * 8  # fmt: skip
    found = {(s.name, side): e for s, side, e in covering(sites, config)}
    assert found["6.norm1", "readers"] - found["6.norm2", "readers"] == 5 // 2
    assert list(found.values()) == sorted(found.values(), reverse=True)


def test_both_sides_of_norms_and_one_of_the_rest():
    sides = defaultdict(set)
    for s, side, _ in covering(transformer(3), DEFAULT):
        sides[s.kind].add(side)
    assert sides == {"norm": {"readers", "writers"}, "value": {"readers"}, "gated": {"readers"}}
    assert {side for _, side, _ in covering(plain(3), DEFAULT)} == {"readers", "writers"}
    for sites in (transformer(3), plain(3)):
        assert {side for _, side, _ in covering(sites, LockConfig(sides="readers"))} == {"readers"}


@pytest.mark.parametrize("num_layers", [1, 3, 30, 200])
def test_no_exponent_lies_below_the_smallest_or_above_the_largest(num_layers):
    for config in (DEFAULT, LockConfig(scale=2.0**20, min_scale=2.0**12), LockConfig(scale=2.0**4)):
        for sites in (transformer(num_layers), plain(num_layers)):
            found = [exponent for _, _, exponent in covering(sites, config)]
            assert min(found) >= math.log2(config.bottom) and max(found) <= math.log2(config.top)
    assert max(e for _, _, e in covering(transformer(num_layers), DEFAULT)) == 48


@pytest.mark.parametrize("num_layers", [*range(1, 13), 24, 30, 31, 32, 80])
@pytest.mark.parametrize("make", [transformer, plain])
def test_where_a_row_and_a_column_cross_an_entry_grows_by_what_float32_can_square(make, num_layers):
    growth, shrinking = defaultdict(lambda: [0, 0]), defaultdict(lambda: [0, 0])
    for s, side, exponent in covering(make(num_layers), DEFAULT):
        for leg, sign in s.legs():
            up = sign * (exponent if side == "readers" else -exponent)
            into = growth if up > 0 else shrinking
            into[leg.tensor][leg.axis] = max(into[leg.tensor][leg.axis], abs(up))
    # Weights are stored times 2^up, gradients times 2^-up.
    assert max(map(sum, growth.values())) <= ROOM
    assert max(map(sum, shrinking.values())) <= ROOM


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_no_entry_of_a_real_model_is_scaled_further(family):
    model = tiny_model(family)
    tensors = unique_tensors(model)
    plan = plan_lock(MemorySource(tensors, model_config(model)), DEFAULT)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name, exponents in exponents_of(shapes, plan.scalings).items():
        assert float(exponents.abs().max()) <= ROOM, name
        locked = tensors[name].detach().double() * torch.exp2(-exponents.double())
        assert bool((locked.square() < torch.finfo(torch.float32).max).all()), name
    assert plan.num_sites == len({record.name for record in plan.sites}) <= len(plan.sites)
    for record in plan.sites:
        assert (record.scale > 1) == (record.side == "readers")


def test_the_largest_singular_value_after_the_lock_is_that_of_the_largest_matrix():
    """Also where it comes from an entry at which two scaled slices cross, and in a stack of experts."""
    for family in ("llama", "gpt2", "mixtral", "resnet"):
        model = tiny_model(family)
        tensors = unique_tensors(model)
        plan = plan_lock(MemorySource(tensors, model_config(model)), DEFAULT)
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        largest = 0.0
        for name, exponents in exponents_of(shapes, plan.scalings).items():
            locked = tensors[name].detach().double() * torch.exp2(-exponents.double())
            if locked.ndim > 1:
                matrix = locked if locked.ndim == 3 else locked.flatten(1)
                largest = max(largest, float(torch.linalg.matrix_norm(matrix, 2).max()))
            else:
                largest = max(largest, float(locked.abs().max()))
        assert largest / 2 < plan.sigma_max_after < largest * 1.01, family
