"""Lower bounds: never above the truth, vacuous where they must be, and what they say of networks checked against dense Hessians."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from specdef.curvature.bounds import (
    chain_bound,
    product_bound,
    rank_bound,
    relu_block_bound,
    repeated,
    shared_dimension,
    top_k_bound,
)
from specdef.curvature.factors import (
    Pair,
    dense_hessian,
    factorise,
    find_pairs,
    lambda_max,
    network_bounds,
)
from specdef.curvature.losses import MSELoss
from specdef.curvature.operators import HessianOperator
from specdef.curvature.subspace_bounds import abc_gap, abc_noted, abc_sequential, abc_subspace
from specdef.experiments.tiny_nets import MLP, make_task, scale_top

SLACK = 1 + 1e-9  # rounding, where a bound is attained
PRODUCT = (product_bound, top_k_bound, rank_bound)
CHAIN = (chain_bound, abc_sequential, abc_subspace, abc_gap)


def norm(matrix):
    return float(torch.linalg.matrix_norm(matrix, 2))


def draw(rows, columns, rank, spread, generator):
    """A matrix of a given rank with singular values over `spread` decades, some of them equal."""
    rank = min(rank, rows, columns)
    U = torch.linalg.qr(torch.randn(rows, rows, generator=generator, dtype=torch.float64))[0]
    V = torch.linalg.qr(torch.randn(columns, columns, generator=generator, dtype=torch.float64))[0]
    S = 10 ** (-spread * torch.rand(rank, generator=generator, dtype=torch.float64))
    if rank > 1 and torch.rand((), generator=generator) < 0.3:
        S[:2] = S.max()
    return U[:, :rank] * S @ V[:, :rank].T


size = st.integers(1, 6)


@settings(max_examples=300, deadline=None)
@given(size, size, size, st.integers(0, 6), st.integers(0, 6), st.sampled_from([0, 1, 4]), st.integers(0, 10**6))  # fmt: skip
def test_bounds_on_a_product_never_exceed_it(m, n, p, rank_x, rank_y, spread, seed):
    generator = torch.Generator().manual_seed(seed)
    X, Y = draw(m, n, rank_x, spread, generator), draw(n, p, rank_y, spread, generator)
    for function in PRODUCT:
        bound = function(X, Y)
        assert bound.value <= norm(X @ Y) * SLACK, function
        assert bool(bound.vacuous) == (bound.value == 0), function
    assert rank_bound(X, Y).value * SLACK >= top_k_bound(X, Y).value >= product_bound(X, Y).value / SLACK  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(size, st.integers(1, 4), st.integers(1, 4), size, st.integers(1, 3), st.tuples(*[st.integers(0, 6)] * 3), st.sampled_from([0, 1, 4]), st.integers(0, 10**6))  # fmt: skip
def test_bounds_on_a_product_of_three_never_exceed_it(m, d, h, n, copies, ranks, spread, seed):
    generator = torch.Generator().manual_seed(seed)
    A = draw(m, copies * d, ranks[0], spread, generator)
    B = draw(d, h, ranks[1], spread, generator)
    C = draw(copies * h, n, ranks[2], spread, generator)
    for function in CHAIN:
        bound = function(A, B, C, copies=copies)
        assert bound.value <= norm(A @ repeated(B, copies) @ C) * SLACK, function
        assert bool(bound.vacuous) == (bound.value == 0), function


def test_the_singular_value_is_that_of_the_shared_dimension():
    X, Y = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0], [1.0]])
    assert norm(X @ Y) == 0
    # the smallest of the computed singular values on either side would claim 1
    assert float(torch.linalg.svdvals(X)[-1] * torch.linalg.svdvals(Y)[-1]) == 1
    bound = product_bound(X, Y)
    assert bound.value == 0 and bound.vacuous == "Y has rank 1 < 2, the shared dimension"
    assert math.isinf(bound.tightness(1.0))
    with pytest.raises(ValueError, match="matching shapes"):
        shared_dimension(X, X)
    with pytest.raises(ValueError, match="matching shapes"):
        chain_bound(X, torch.eye(3), Y)


def test_remark_a3_is_the_mean_of_the_products_and_its_best_k():
    X, Y = torch.diag(torch.tensor([5.0, 4.0, 1.0])), torch.diag(torch.tensor([3.0, 1.0, 0.0]))
    # 5*0, 4*1, 1*3: means 0, 2, 7/3
    bound = top_k_bound(X, Y)
    assert bound.value == pytest.approx(7 / 3) and bound.factors["k"] == 3
    assert rank_bound(X, Y).value == pytest.approx(4) and rank_bound(X, Y).factors["i"] == 2
    # the largest singular value of X met the zero: growing it changes nothing
    X[0, 0] = 500.0
    assert top_k_bound(X, Y).value == pytest.approx(7 / 3)


def counter_example(e=1e-3):
    z, y = torch.tensor([1.0, 1.0]) / 2**0.5, torch.tensor([1.0, -1.0]) / 2**0.5
    return torch.outer(z, z), torch.diag(torch.tensor([1 + e, 1.0])), torch.outer(y, y)


def test_the_noted_formula_is_no_bound_and_the_others_are():
    A, B, C = counter_example()
    truth = norm(A @ B @ C)
    assert truth == pytest.approx(5e-4, rel=1e-3)
    noted = abc_noted(A, B, C)
    assert noted.value == pytest.approx(0.5005, rel=1e-3) and not noted.rigorous
    for function in CHAIN:
        assert function(A, B, C).value <= truth * (1 + 1e-3) and function(A, B, C).rigorous
    # the subspace form is exact here, the sequential one off by 1/sqrt 2, the gap form finds nothing
    assert abc_subspace(A, B, C).value == pytest.approx(truth, rel=1e-3)
    assert abc_sequential(A, B, C).value == pytest.approx(truth / 2**0.5, rel=1e-3)
    assert "u_1(B) is not unique" in abc_noted(A, torch.eye(2), C).vacuous


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6))
def test_the_gap_form_tends_to_the_noted_formula(seed):
    generator = torch.Generator().manual_seed(seed)
    # of rank 2, so that every rank is tried
    A, B, C = (torch.randn(2, 2, generator=generator, dtype=torch.float64) for _ in range(3))
    large = scale_top(B, 1e8)
    noted = abc_noted(A, large, C).value
    assert abc_gap(A, large, C).value == pytest.approx(noted, rel=1e-3)
    assert noted <= norm(A @ large @ C) * (1 + 1e-3)


def test_the_proof_of_theorem_2_1_on_its_own_block():
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    x = torch.randn(4, generator=generator, dtype=torch.float64)

    def truth(slopes):
        return norm(torch.kron((W * slopes).T @ (W * slopes), torch.outer(x, x)))

    alive = torch.ones(3, dtype=torch.float64)
    bound = relu_block_bound(W, alive, x)
    # an output narrower than the hidden layer is no obstacle: the shared dimension of W^T and W D is that of the output
    assert 0 < bound.value <= truth(alive) * SLACK and not bound.vacuous
    dead = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    assert relu_block_bound(W, dead, x).vacuous.startswith("a unit is off")
    wide = relu_block_bound(torch.randn(4, 3, generator=generator, dtype=torch.float64), alive, x)
    assert wide.value == 0 and "W D has rank 3 < 4" in wide.vacuous


def mlp(sizes, activation, seed):
    generator = torch.Generator().manual_seed(seed)
    model = MLP(sizes, activation)
    for weight in model.parameters():
        nn.init.xavier_normal_(weight, generator=generator)
    return model, generator


ACTIVATIONS = {"relu": torch.relu, "tanh": torch.tanh, "linear": lambda x: x}


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(1, 4), min_size=3, max_size=4), st.sampled_from(sorted(ACTIVATIONS)),
    st.integers(1, 4), st.sampled_from([1.0, 10.0, 1000.0]), st.integers(0, 10**6),
)  # fmt: skip
def test_no_bound_exceeds_the_curvature_of_a_network(sizes, activation, samples, scale, seed):
    model, generator = mlp(sizes, ACTIVATIONS[activation], seed)
    with torch.no_grad():
        last = model.layers[-1].weight
        last.copy_(scale_top(last, scale))
    x = torch.randn(samples, sizes[0], generator=generator, dtype=torch.float64)
    y = torch.randn(samples, sizes[-1], generator=generator, dtype=torch.float64)
    truth = lambda_max(dense_hessian(model, x, y)[0])
    bounds = network_bounds(model, x, y)
    for bound in bounds:
        assert not bound.rigorous or bound.value <= truth * SLACK, bound
        assert bool(bound.vacuous) == (bound.value == 0), bound
        if activation != "tanh":
            assert abs(bound.factors["rho"]) < 1e-9, "piecewise linear: the block is Gauss-Newton's"


def test_theorem_2_1_of_a_network_is_the_papers_chain():
    model, generator = mlp((3, 2, 2), torch.relu, 0)
    x = torch.randn(1, 3, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        # turned round where a unit is off: all are on
        model.layers[0].weight.mul_(model.layers[0](x).sign().T)
    slopes = torch.ones(2, dtype=torch.float64)
    y = torch.zeros(1, 2, dtype=torch.float64)
    found = {(b.name, b.law): b for b in network_bounds(model, x, y)}
    paper = relu_block_bound(model.layers[1].weight.detach(), slopes, x[0])
    c = 2 / y.numel()
    assert found["theorem-2.1", "linear"].value == pytest.approx(c * paper.value)
    assert found["theorem-2.1", "linear"].factors["sigma_1(B)"] == pytest.approx(paper.factors["sigma_1(W)"])  # fmt: skip


def test_truth_grows_as_scale_squared_and_theorem_2_1_as_scale():
    found = []
    for scale in (1.0, 10.0, 100.0):
        task = make_task("cnn", 0)
        weight = task.model.get_parameter(task.scaled)
        with torch.no_grad():
            weight.copy_(scale_top(weight, scale))
        pairs = [p for p in task.pairs if p.block == "head.0.weight"]
        bounds = network_bounds(task.model, task.inputs[:8], task.targets[:8], pairs=pairs)
        by = {(b.name, b.law): b.factors["gauss_newton"] for b in bounds}
        truth = lambda_max(dense_hessian(task.model, task.inputs[:8], task.targets[:8])[0])
        found.append((truth, by["theorem-2.1", "linear"], by["abc-sequential", "quadratic"]))
    for before, after in itertools.pairwise(found):
        ratios = [math.log10(b / a) for a, b in zip(before, after, strict=True)]
        assert ratios == pytest.approx([2, 1, 2], abs=0.25)


@pytest.mark.parametrize("architecture", ["mlp", "cnn", "transformer"])
def test_every_pair_of_the_paper_nets_factorises(architecture):
    task = make_task(architecture, 1)
    for pair in task.pairs:
        assert factorise(task.model, task.inputs[:6], pair).error < 1e-12, pair


def test_queries_and_keys_are_vacuous_in_theorem_2_2():
    """The softmax does not change when a column of scores is shifted: A has no full column rank, whatever the weights."""
    task = make_task("transformer", 0)
    pairs = [pair for pair in task.pairs if pair.scores]
    bounds = network_bounds(task.model, task.inputs[:8], task.targets[:8], pairs=pairs)
    for bound in bounds:
        if bound.name == "theorem-2.1":
            assert "A has rank" in bound.vacuous
        elif bound.name == "abc-sequential":
            assert bound.value > 0


class Skip(nn.Module):
    """x -> second(relu(first(x))) + first(x): the second layer can be passed by."""

    def __init__(self):
        super().__init__()
        self.first, self.second = (nn.Linear(3, 3, dtype=torch.float64) for _ in range(2))

    def forward(self, x):
        return self.second(torch.relu(self.first(x))) + self.first(x)


def test_a_skip_connection_is_refused():
    torch.manual_seed(0)
    model, x = Skip(), torch.randn(5, 3, dtype=torch.float64)
    pair = Pair(block="first.weight", through="second.weight")
    with pytest.raises(ValueError, match=r"does not factorise through second\.weight"):
        factorise(model, x, pair)
    with pytest.raises(ValueError, match="does not factorise"):
        network_bounds(model, x, x, pairs=[pair])
    assert not find_pairs(model, x) and not network_bounds(model, x, x)


def test_arguments_that_make_no_sense_are_refused():
    model, _ = mlp((2, 3, 2), torch.relu, 0)
    x = torch.ones(2, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match="must be a parameter"):
        factorise(model, x, Pair(block="nothing", through="layers.1.weight"))
    with pytest.raises(ValueError, match="does not factorise"):  # the wrong way round
        factorise(model, x, Pair(block="layers.1.weight", through="layers.0.weight"))
    with pytest.raises(ValueError, match=r"targets must be \[2, 2\]"):
        dense_hessian(model, x, x[:, :1])
    model.layers[0].weight.requires_grad_(False)
    with pytest.raises(ValueError, match="is frozen"):
        network_bounds(model, x, x, pairs=[Pair(block="layers.0.weight", through="layers.1.weight")])  # fmt: skip


CONVOLUTIONS = {
    "1d": (nn.Conv1d(2, 3, 3, stride=2, padding=1, dilation=2), (2, 9)),
    "2d": (nn.Conv2d(2, 3, (3, 2), stride=(1, 2), padding=(0, 1)), (2, 4, 5)),
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convolutions_of_torch_factorise(kind):
    torch.manual_seed(0)
    conv, shape = CONVOLUTIONS[kind]
    first = {"1d": nn.Conv1d, "2d": nn.Conv2d}[kind](2, 2, 1)
    model = nn.Sequential(first, nn.Tanh(), conv, nn.Tanh(), nn.Flatten(), nn.LazyLinear(2))
    x = torch.randn(3, *shape)
    model(x)
    pairs = find_pairs(model, x)
    assert {(p.block, p.through) for p in pairs} == {
        ("0.weight", "2.weight"), ("0.weight", "5.weight"), ("2.weight", "5.weight"),
    }  # fmt: skip
    truth = lambda_max(dense_hessian(model, x, torch.zeros(3, 2))[0])
    for bound in network_bounds(model, x, torch.zeros(3, 2), pairs=pairs):
        assert not bound.rigorous or bound.value <= truth * SLACK


def test_the_dense_hessian_is_that_of_the_operator():
    task = make_task("transformer", 0)
    H, slices = dense_hessian(task.model, task.inputs, task.targets)
    operator = HessianOperator(task.model, [(task.inputs, task.targets)], MSELoss())
    assert operator.slices == slices
    torch.testing.assert_close(H, operator.to_dense(), rtol=1e-9, atol=1e-12)
