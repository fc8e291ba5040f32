"""Hessian, GGN and Fisher products against closed forms, dense matrices and finite differences; FACTS' traps among them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from specdef.curvature.cross_entropy import (
    cross_entropy_gradient,
    cross_entropy_hessian_product,
    cross_entropy_terms,
)
from specdef.curvature.losses import ClassificationLoss, LMLoss, MSELoss
from specdef.curvature.operators import (
    CurvatureOperator,
    EmpiricalFisherOperator,
    GGNOperator,
    HessianOperator,
)
from specdef.curvature.parameters import select_parameters
from specdef.errors import SecondOrderError, SelectionError, SpecDefError, StaleGraphError
from specdef.models.tiny import tiny_inputs, tiny_model

OPERATORS: tuple[type[CurvatureOperator], ...] = (HessianOperator, GGNOperator, EmpiricalFisherOperator)  # fmt: skip
FAMILIES = ("llama", "gpt2", "bert", "vit", "resnet", "mixtral", "gpt_oss", "qwen3_moe")


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(n: int, classes: int, seed: int = 1) -> Tensor:
    return torch.randint(classes, (n,), generator=torch.Generator().manual_seed(seed))


def seeded(*layers: nn.Module) -> nn.Sequential:
    net = nn.Sequential(*layers).double()
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.copy_(rand(*p.shape, seed=100 + i) / math.sqrt(p.shape[-1]))
    return net


NETS: dict[str, tuple[nn.Sequential, tuple[int, ...]]] = {
    "mlp": (seeded(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), (4,)),
    "relu": (seeded(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5, bias=False), nn.ReLU(), nn.Linear(5, 3)), (4,)),
    "cnn": (seeded(nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(32, 3)), (1, 4, 4)),
    "norm": (seeded(nn.Linear(4, 5), nn.LayerNorm(5), nn.GELU(), nn.Linear(5, 3)), (4,)),
    "batch norm": (seeded(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.SiLU(), nn.Linear(5, 3)), (4,)),
}  # fmt: skip


def dense_hessian(net: nn.Module, loss: Any) -> Tensor:
    """The Hessian of loss(net) by torch.func, over all parameters in order.

    Reverse over reverse: torch.func.hessian goes forward over reverse, and torch 2.13 gives an asymmetric matrix for
    LayerNorm that way (0.2 off finite differences in float64).
    """
    shapes = {name: p.shape for name, p in net.named_parameters()}

    def at(flat: Tensor) -> Tensor:
        parts = flat.split([s.numel() for s in shapes.values()])
        weights = {n: v.view(s) for (n, s), v in zip(shapes.items(), parts, strict=True)}
        return loss(lambda *args: torch.func.functional_call(net, weights, args))

    flat = torch.cat([p.detach().reshape(-1) for p in net.parameters()])
    hessian: Tensor = torch.func.jacrev(torch.func.grad(at))(flat)
    return hessian


def task(family: str) -> tuple[nn.Module, dict[str, Tensor], Any]:
    """A tiny model, a batch with labels, its loss."""
    model, batch = tiny_model(family), tiny_inputs(family)
    if "CausalLM" in type(model).__name__ or "LMHead" in type(model).__name__:
        return model, {**batch, "labels": batch["input_ids"].clone()}, LMLoss()
    with torch.no_grad():
        logits: Tensor = model(**batch).logits
    return model, {**batch, "labels": labels(len(logits), logits.shape[-1])}, ClassificationLoss()


# --- closed forms ---------------------------------------------------------------------------------------------------


def test_linear_mse_hessian_is_the_gram_matrix() -> None:
    x, y = rand(7, 4), rand(7, 3, seed=2)
    net = seeded(nn.Linear(4, 3, bias=False))
    expected = torch.kron(torch.eye(3).double(), x.T @ x) * 2 / y.numel()
    for kind in (HessianOperator, GGNOperator):
        torch.testing.assert_close(kind(net, [(x, y)], MSELoss()).to_dense(), expected, atol=1e-13, rtol=0)  # fmt: skip


def test_softmax_regression_hessian_in_closed_form() -> None:
    x, y = rand(6, 4), labels(6, 3)
    net = seeded(nn.Linear(4, 3, bias=False))
    p = torch.softmax(net(x), -1).detach()
    blocks = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    expected = sum(torch.kron(b, torch.outer(row, row)) for b, row in zip(blocks, x, strict=True))
    hessian = HessianOperator(net, [(x, y)], ClassificationLoss()).to_dense()
    torch.testing.assert_close(hessian, expected / 6, atol=1e-13, rtol=0)


def test_logistic_regression_is_softmax_with_two_classes() -> None:
    x, y = rand(6, 4), labels(6, 2)
    net = seeded(nn.Linear(4, 2, bias=False))
    p = torch.softmax(net(x), -1)[:, 1].detach()
    one = (x.T * (p * (1 - p))) @ x / 6
    expected = torch.cat([torch.cat([one, -one], 1), torch.cat([-one, one], 1)])
    hessian = HessianOperator(net, [(x, y)], ClassificationLoss()).to_dense()
    torch.testing.assert_close(hessian, expected, atol=1e-13, rtol=0)


def test_two_layer_linear_net_with_its_cross_block() -> None:
    """Loss |W2 W1 x - y|^2 / (n m): blocks W2^T W2 (x) xx^T, I (x) (W1 x)(W1 x)^T, and the cross block with the residual."""
    x, y = rand(5, 3), rand(5, 2, seed=3)
    net = seeded(nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False))
    w1, w2 = (p.detach() for p in net.parameters())
    c, z = 2 / y.numel(), x @ w1.T
    residual = z @ w2.T - y
    top = torch.kron(w2.T @ w2, x.T @ x)
    bottom = torch.kron(torch.eye(2).double(), z.T @ z)
    # d2/dW1[a,b] dW2[i,j] = sum_n w2[i,a] x[n,b] z[n,j] + residual[n,i] x[n,b] [a = j]
    cross = torch.einsum("ia,nb,nj->abij", w2, x, z)
    cross += torch.einsum("ni,nb,aj->abij", residual, x, torch.eye(4).double())
    cross = cross.reshape(12, 8)
    expected = c * torch.cat([torch.cat([top, cross], 1), torch.cat([cross.T, bottom], 1)])
    hessian = HessianOperator(net, [(x, y)], MSELoss()).to_dense()
    torch.testing.assert_close(hessian, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("loss", ["classification", "mse"])
def test_dense_hessian_of_tiny_nets(name: str, loss: str) -> None:
    net, shape = NETS[name]
    x = rand(6, *shape)
    net.eval()
    if loss == "mse":
        y = rand(6, 3, seed=5)
        expected = dense_hessian(net, lambda f: nn.functional.mse_loss(f(x), y))
        ours = HessianOperator(net, [(x, y)], MSELoss())
    else:
        target = labels(6, 3)
        expected = dense_hessian(net, lambda f: nn.functional.cross_entropy(f(x), target))
        ours = HessianOperator(net, [{"input": x, "labels": target}], ClassificationLoss())
    torch.testing.assert_close(ours.to_dense(), expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", NETS)
def test_ggn_is_jacobian_times_output_hessian(name: str) -> None:
    net, shape = NETS[name]
    net.eval()
    x, y = rand(6, *shape), labels(6, 3)
    names = list(dict(net.named_parameters()))
    jacobian = torch.func.jacrev(lambda w: torch.func.functional_call(net, w, (x,)))(dict(net.named_parameters()))  # fmt: skip
    j = torch.cat([jacobian[n].detach().reshape(6, 3, -1) for n in names], -1)
    p = torch.softmax(net(x), -1).detach()
    b = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    expected = torch.einsum("nia,nij,njb->ab", j, b, j) / 6
    ours = GGNOperator(net, [(x, y)], ClassificationLoss()).to_dense()
    torch.testing.assert_close(ours, expected, atol=1e-12, rtol=0)
    assert float(torch.linalg.eigvalsh(ours)[0]) > -1e-12


@pytest.mark.parametrize("per", ["term", "sample"])
def test_empirical_fisher_of_single_gradients(per: Any) -> None:
    """A classifier of tokens with ignored labels: by token, and by the mean loss of each row."""
    net = seeded(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    x = rand(3, 4, 4)
    y = labels(12, 3).view(3, 4)
    y[0, 2] = y[1, 0] = -100
    y[2, 1:] = -100
    gradients = []
    for row in range(3):
        terms = [i for i in range(4) if y[row, i] != -100]
        groups = [[i] for i in terms] if per == "term" else [terms]
        for group in groups:
            value = nn.functional.cross_entropy(net(x[row, group]), y[row, group])
            parts = torch.autograd.grad(value, list(net.parameters()))
            gradients.append(torch.cat([g.reshape(-1) for g in parts]))
    expected = sum(torch.outer(g, g) for g in gradients) / len(gradients)
    ours = EmpiricalFisherOperator(net, [(x[:2], y[:2]), (x[2:], y[2:])], ClassificationLoss(), per=per)  # fmt: skip
    torch.testing.assert_close(ours.to_dense(), expected, atol=1e-12, rtol=0)


def test_empirical_fisher_of_squared_errors() -> None:
    net, x, y = seeded(nn.Linear(3, 2)), rand(4, 3), rand(4, 2, seed=9)
    gradients = []
    for i in range(4):
        parts = torch.autograd.grad(nn.functional.mse_loss(net(x[i]), y[i]), list(net.parameters()))
        gradients.append(torch.cat([g.reshape(-1) for g in parts]))
    expected = sum(torch.outer(g, g) for g in gradients) / 4
    ours = EmpiricalFisherOperator(net, [(x, y)], MSELoss(), per="sample").to_dense()
    torch.testing.assert_close(ours, expected, atol=1e-12, rtol=0)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(2, 9), st.integers(0, 2**31 - 1))
def test_cross_entropy_derivatives_are_autograds(n: int, classes: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(n, classes, generator=g, dtype=torch.float64) * 4
    t = torch.randint(classes, (n,), generator=g)
    t[torch.rand(n, generator=g) < 0.3] = -100
    w = torch.rand(n, generator=g, dtype=torch.float64)
    u = torch.randn(n, classes, generator=g, dtype=torch.float64)

    def reference(z: Tensor) -> Tensor:
        terms = nn.functional.cross_entropy(z, t, reduction="none", ignore_index=-100)
        return (w * terms).sum()

    torch.testing.assert_close((w * cross_entropy_terms(z, t)).sum(), reference(z))
    gradient, product = torch.func.vjp(torch.func.grad(reference), z)
    torch.testing.assert_close(cross_entropy_gradient(z, t, w), gradient, atol=1e-12, rtol=0)
    torch.testing.assert_close(cross_entropy_hessian_product(z, t, w, u), product(u)[0], atol=1e-12, rtol=0)  # fmt: skip
    z.requires_grad_()
    (first,) = torch.autograd.grad((w * cross_entropy_terms(z, t)).sum(), z, create_graph=True)
    (second,) = torch.autograd.grad(first, z, u)
    torch.testing.assert_close(second, product(u)[0], atol=1e-12, rtol=0)


def test_chunks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    z, t, w, u = rand(7, 5), labels(7, 5), rand(7, seed=3), rand(7, 5, seed=4)
    whole = cross_entropy_hessian_product(z, t, w, u), cross_entropy_gradient(z, t, w), cross_entropy_terms(z, t)  # fmt: skip
    monkeypatch.setattr("specdef.curvature.cross_entropy.CHUNK", 10)
    parts = cross_entropy_hessian_product(z, t, w, u), cross_entropy_gradient(z, t, w), cross_entropy_terms(z, t)  # fmt: skip
    for a, b in zip(whole, parts, strict=True):
        assert torch.equal(a, b)


# --- transformers: attention, norms, casts, experts ------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_product_is_the_derivative_of_the_gradient(family: str) -> None:
    """In float64, on models that cast to float32 inside and attend through SDPA (FACTS 6.1, 6.2, 6.4)."""
    model, batch, loss = task(family)
    operator = HessianOperator(model, [batch], loss, dtype=torch.float64)
    v, w = rand(operator.shape[0]), rand(operator.shape[0], seed=1)
    v, w = v / v.norm(), w / w.norm()
    product, eps = operator @ v, 1e-5
    difference = (operator.gradient_at(eps * v) - operator.gradient_at(-eps * v)) / (2 * eps)
    assert float((product - difference).norm() / product.norm()) < 1e-7
    assert abs(float(w @ product - v @ (operator @ w))) < 1e-13 * float(product.norm())


@pytest.mark.parametrize("family", ["llama", "gpt2", "vit"])
def test_loss_is_the_models_own(family: str) -> None:
    model, batch, loss = task(family)
    with torch.no_grad():
        own = float(model(**batch).loss)
    assert HessianOperator(model, [batch], loss).loss() == pytest.approx(own, rel=1e-5)


def test_gradient_is_autograds_own() -> None:
    model, batch, loss = task("llama")
    operator = HessianOperator(model, [batch], loss)
    model(**batch).loss.backward()
    own = torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    torch.testing.assert_close(operator.gradient(), own, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("kind", OPERATORS)
def test_layers_written_in_place_equal_plain_autograd(
    kind: type[CurvatureOperator], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tied weights used twice, an embedding with a padding row, several batches."""
    model, batch, loss = task("llama")
    model = tiny_model("llama", tie=True, pad_token_id=5)
    batches = [batch, {k: v[:1] for k, v in batch.items()}]
    v = rand(sum(p.numel() for p in model.parameters()))
    fused = kind(model, batches, loss, dtype=torch.float64) @ v
    monkeypatch.setattr("specdef.curvature.fused.Target.knows", lambda self, weight: False)
    monkeypatch.setattr("specdef.curvature.fused.ACTIVATIONS", frozenset())
    plain = kind(model, batches, loss, dtype=torch.float64) @ v
    torch.testing.assert_close(fused, plain, atol=1e-13, rtol=1e-10)


def test_tied_weights_are_one_parameter() -> None:
    net = seeded(nn.Linear(3, 3, bias=False), nn.Tanh(), nn.Linear(3, 3, bias=False))
    net[2].weight = net[0].weight
    x, y = rand(4, 3), rand(4, 3, seed=1)
    operator = HessianOperator(net, [(x, y)], MSELoss())
    assert operator.shape == (9, 9)
    expected = dense_hessian(net, lambda f: nn.functional.mse_loss(f(x), y))
    torch.testing.assert_close(operator.to_dense(), expected, atol=1e-11, rtol=0)
    assert list(select_parameters(net, ["2.weight"])) == ["0.weight"]  # under either name


def test_hessian_of_a_locked_model_is_the_rescaled_hessian() -> None:
    """Absorbed weights are S times the original's, so the Hessian is S^-1 H S^-1: 2^20 apart, exact in float64."""
    from specdef import LockConfig, lock_model

    model, batch, loss = task("llama")
    original = HessianOperator(model, [batch], loss, dtype=torch.float64)
    before = original.flatten(dict(model.named_parameters()))
    v = rand(original.shape[0])
    locked = tiny_model("llama")
    lock_model(locked, LockConfig(method="absorbed", scale=2.0**20, seed=0))
    operator = HessianOperator(locked, [batch], loss, dtype=torch.float64)
    after = operator.flatten(dict(locked.named_parameters()))
    scale = torch.where(before == 0, torch.ones_like(before), after / before)
    assert float(scale.max()) >= 2**20
    expected = (original @ (v / scale)) / scale
    product = operator @ v
    for where in operator.slices.values():
        torch.testing.assert_close(product[where], expected[where], rtol=1e-7, atol=1e-9 * float(expected[where].abs().max()))  # fmt: skip


# --- weighting -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", OPERATORS)
def test_how_the_data_is_split_changes_nothing(kind: type[CurvatureOperator]) -> None:
    """Uneven batches and ignored labels (FACTS 6.5)."""
    model, batch, loss = task("gpt2")
    ids = torch.cat([batch["input_ids"]] * 2)
    target = ids.clone()
    target[0, :9] = target[1] = -100
    whole = {"input_ids": ids, "labels": target}
    v = rand(sum(p.numel() for p in model.parameters()))
    one = kind(model, [whole], loss, dtype=torch.float64)
    rows = [{k: t[a:b] for k, t in whole.items()} for a, b in ((0, 1), (1, 2), (2, 4))]
    parts = kind(model, rows, loss, dtype=torch.float64)
    assert one.num_terms == parts.num_terms == 3 + 0 + 22
    torch.testing.assert_close(one @ v, parts @ v, atol=1e-12, rtol=1e-9)
    assert one.loss() == pytest.approx(parts.loss(), rel=1e-12)


def test_padding_without_labels_does_not_count() -> None:
    model, batch, loss = task("llama")
    mask = batch["attention_mask"].clone()
    mask[0, 6:] = 0
    operator = HessianOperator(model, [{"input_ids": batch["input_ids"], "attention_mask": mask}], loss)  # fmt: skip
    assert operator.num_terms == 5 + 11


# --- selection, memory, staleness ------------------------------------------------------------------------------------


def test_restriction_is_a_principal_block() -> None:
    net, shape = NETS["mlp"]
    x, y = rand(6, *shape), labels(6, 3)
    full = HessianOperator(net, [(x, y)], ClassificationLoss())
    block = HessianOperator(net, [(x, y)], ClassificationLoss(), ["2"])
    assert list(block.parameters) == ["2.weight", "2.bias"]
    start = full.slices["2.weight"].start
    torch.testing.assert_close(block.to_dense(), full.to_dense()[start:, start:], atol=1e-13, rtol=0)  # fmt: skip


def test_frozen_parameters_are_constants_unless_named() -> None:
    net = seeded(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    net[0].requires_grad_(False)
    x, y = rand(6, 4), labels(6, 3)
    assert list(HessianOperator(net, [(x, y)], ClassificationLoss()).parameters) == ["2.weight", "2.bias"]  # fmt: skip
    named = HessianOperator(net, [(x, y)], ClassificationLoss(), ["0.weight"])
    assert float((named @ rand(20)).norm()) > 0
    assert not net[0].weight.requires_grad


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (r".*\.bias", ["0.bias", "2.bias"]),
        (["*.weight"], ["0.weight", "2.weight"]),
        (["2"], ["2.weight", "2.bias"]),
        (["2.bias", "0.bias"], ["0.bias", "2.bias"]),
    ],
)
def test_selection(params: Any, expected: list[str]) -> None:
    assert list(select_parameters(NETS["mlp"][0], params)) == expected


@pytest.mark.parametrize("params", [["2.wieght"], "head", [torch.zeros(3)], []])
def test_selection_of_nothing_is_refused(params: Any) -> None:
    with pytest.raises(SelectionError) as caught:
        select_parameters(NETS["mlp"][0], params)
    assert caught.value.hint
    if params == ["2.wieght"]:
        assert "2.weight" in caught.value.nearest


@pytest.mark.parametrize("kind", OPERATORS)
def test_graphs_that_do_not_fit_are_built_anew(kind: type[CurvatureOperator]) -> None:
    model, batch, loss = task("gpt2")
    batches = [batch, batch]
    kept = kind(model, batches, loss, memory_limit=1 << 30)
    v = torch.randn(kept.shape[0], generator=torch.Generator().manual_seed(0))
    expected = kept @ v
    assert all(graph is not None for graph in kept._graphs)
    torch.testing.assert_close(kept @ v, expected, rtol=0, atol=0)  # a kept graph is not used up
    for limit, graphs in ((0, 0), (int(kept._memory.used * 0.7), 1)):
        part = kind(model, batches, loss, memory_limit=limit)
        for _ in range(2):
            torch.testing.assert_close(part @ v, expected, rtol=1e-5, atol=1e-7)
        assert sum(graph is not None for graph in part._graphs) == graphs
        assert part._memory.used <= limit


@pytest.mark.parametrize("change", ["in place", "data", "buffer", "batch"])
def test_a_change_under_the_operator_is_noticed(change: str) -> None:
    net = seeded(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
    x, y = rand(6, 4), labels(6, 3)
    operator = HessianOperator(net, [(x, y)], ClassificationLoss())
    v = rand(operator.shape[0])
    before = operator @ v
    with torch.no_grad():
        if change == "in place":
            net[0].weight.mul_(2)
        elif change == "data":
            net[0].weight.data = net[0].weight.data * 2
        elif change == "buffer":
            net[1].running_var.mul_(4)
        else:
            x.mul_(2)
    for use in (lambda: operator @ v, operator.loss, operator.gradient):
        with pytest.raises(StaleGraphError, match="changed") as caught:
            use()
        assert "refresh" in caught.value.hint
    operator.refresh()
    fresh = HessianOperator(net, [(x, y)], ClassificationLoss())
    torch.testing.assert_close(operator @ v, fresh @ v)
    assert float((operator @ v - before).norm()) > 1e-6


@pytest.mark.parametrize("kind", OPERATORS)
def test_the_model_is_left_as_it_was(kind: type[CurvatureOperator]) -> None:
    net = nn.Sequential(
        nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3)
    ).train()
    net[0].weight.requires_grad_(False)
    state = {name: t.clone() for name, t in net.state_dict().items()}
    operator = kind(net, [(rand(6, 4).float(), labels(6, 3))], ClassificationLoss())
    v = torch.randn(operator.shape[0])
    torch.testing.assert_close(operator @ v, operator @ v)  # no dropout in it
    operator.gradient_at(v)
    assert all(torch.equal(t, state[name]) for name, t in net.state_dict().items())
    assert all(module.training for module in net.modules())
    assert all(p.grad is None for p in net.parameters())
    assert not net[0].weight.requires_grad and net[3].weight.requires_grad


def test_half_precision_is_computed_in_float32() -> None:
    _, batch, loss = task("gpt2")
    half = tiny_model("gpt2", dtype=torch.bfloat16)
    operator = HessianOperator(half, [batch], loss)
    assert operator.dtype == torch.float32
    wide = tiny_model("gpt2", dtype=torch.bfloat16).float()
    v = torch.randn(operator.shape[0], generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(operator @ v, HessianOperator(wide, [batch], loss) @ v)
    assert next(half.parameters()).dtype == torch.bfloat16


# --- bad input -------------------------------------------------------------------------------------------------------


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x + torch.randn_like(x))


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad * ctx.saved_tensors[0]


class OnceOnly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return Square.apply(self.layer(x))


@pytest.mark.parametrize("model", [Noisy(), OnceOnly()], ids=["random", "once"])
def test_models_without_a_second_derivative_are_refused(model: nn.Module) -> None:
    operator = HessianOperator(model, [(torch.randn(6, 4), labels(6, 3))], ClassificationLoss())
    with pytest.raises(SecondOrderError) as caught:
        operator @ torch.ones(operator.shape[0])
    assert caught.value.hint


@pytest.mark.parametrize(
    ("batches", "loss", "match"),
    [
        ([], ClassificationLoss(), "no data"),
        ([(rand(2, 4), torch.tensor([-100, -100]))], ClassificationLoss(), "no term that counts"),
        ([{"input": rand(2, 4)}], ClassificationLoss(), "no labels"),
        ([(rand(2, 4), torch.tensor([0, 1]), 3)], ClassificationLoss(), "a tuple of 3"),
        ([(rand(2, 4), rand(2, 3))], ClassificationLoss(), "integer labels"),
        ([(rand(2, 4), torch.tensor([0, 1]))], LMLoss(), "LMLoss needs labels"),
    ],
)
def test_bad_data_is_refused_at_once(batches: Any, loss: Any, match: str) -> None:
    with pytest.raises(SpecDefError, match=match) as caught:
        HessianOperator(NETS["mlp"][0], batches, loss)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("batch", "loss", "match"),
    [
        ((rand(2, 4), torch.tensor([0, 3])), ClassificationLoss(), r"label 3 is outside 0\.\.2"),
        ((rand(2, 4), torch.tensor([[0, 1]])), ClassificationLoss(), "do not fit"),
        ((rand(2, 4), rand(2, 2)), MSELoss(), "do not match"),
    ],
)
@pytest.mark.parametrize("kind", OPERATORS)
def test_data_that_does_not_fit_the_model_is_refused(
    kind: type[CurvatureOperator], batch: Any, loss: Any, match: str
) -> None:
    operator = kind(NETS["mlp"][0], [batch], loss)
    with pytest.raises(SpecDefError, match=match):
        operator @ rand(operator.shape[0])


def test_argument_mistakes() -> None:
    net, _ = NETS["mlp"]
    operator = HessianOperator(net, [(rand(2, 4), labels(2, 3))], ClassificationLoss())
    with pytest.raises(ValueError, match="v must be"):
        operator @ rand(3)
    with pytest.raises(ValueError, match="displacement must be"):
        operator.loss_at(rand(3))
    with pytest.raises(ValueError, match="dtype must be"):
        HessianOperator(net, [], ClassificationLoss(), dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="per must be"):
        EmpiricalFisherOperator(net, [], ClassificationLoss(), per="token")  # type: ignore[arg-type]


def test_several_vectors_and_the_count_of_products() -> None:
    net, _ = NETS["mlp"]
    operator = HessianOperator(net, [(rand(6, 4), labels(6, 3))], ClassificationLoss())
    v = rand(operator.shape[0], 3)
    product = operator @ v
    assert operator.num_matvecs == 3 and product.shape == v.shape
    torch.testing.assert_close(product[:, 1], operator @ v[:, 1])
