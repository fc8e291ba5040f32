"""Predictions: exact where the loss is a quadratic, checked by training elsewhere, and honest where they cannot hold."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from specdef.curvature.linear import MatrixOperator
from specdef.curvature.losses import ClassificationLoss, MSELoss
from specdef.curvature.operators import HessianOperator
from specdef.errors import SpecDefError
from specdef.rates.linear import HeavyBall
from specdef.rates.measure import largest_stable_rate, train
from specdef.rates.optimizers import OPTIMIZERS
from specdef.rates.predict import predict_convergence
from specdef.rates.prediction import Prediction, slowdown

F64 = torch.float64
LINEAR = ("gd", "sgd", "heavy_ball", "nesterov")
ADAPTIVE = ("adam", "adamw", "rmsprop", "adadelta")


def rescaled(net: nn.Sequential, channel: int, scale: float) -> nn.Sequential:
    """The same function with one ReLU channel made small and read large."""
    net = copy.deepcopy(net)
    with torch.no_grad():
        net[0].weight[channel] /= scale
        net[0].bias[channel] /= scale
        net[2].weight[:, channel] *= scale
    return net


def classifier(seed: int = 0) -> tuple[nn.Sequential, list[tuple[Tensor, Tensor]]]:
    """A net trained a little on one labelling, and data with another."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(64, 8, generator=generator, dtype=F64)
    y = (x[:, :3].argmax(1)).long()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3)).double()
    method = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(40):
        method.zero_grad()
        nn.functional.cross_entropy(net(x), y, label_smoothing=0.2).backward()
        method.step()
    net.zero_grad()
    return net, [(x, (y + 1) % 3)]


@pytest.fixture(scope="module")
def regression() -> HessianOperator:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 6, generator=generator, dtype=F64) * torch.tensor(
        [3.0, 1, 1, 0.5, 0.2, 0.1]
    )
    y = torch.randn(40, 2, generator=generator, dtype=F64)
    net = nn.Linear(6, 2).double()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return HessianOperator(net, [(x, y)], MSELoss())


@pytest.fixture(scope="module")
def network() -> HessianOperator:
    return HessianOperator(*classifier(), ClassificationLoss())


# --- exact where the loss is a quadratic -----------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.05, 0.5])
@pytest.mark.parametrize("name", (*LINEAR, *ADAPTIVE, "kfac"))
def test_steps_on_a_quadratic_are_those_of_training(
    regression: HessianOperator, name: str, share: float
) -> None:
    target = share * regression.loss()
    told = predict_convergence(regression, None, name, target=target)
    assert told.trustworthy and not told.reason
    assert told.error_estimate < 1e-2
    seen = train(regression, name, told.best_learning_rate, 1000).steps_to(target)
    assert abs(told.steps_to_target - seen) <= 1
    assert told.steps_low <= seen <= told.steps_high
    assert told.best_learning_rate <= told.stable_learning_rate


@pytest.mark.parametrize("name", LINEAR)
def test_stable_rate_on_a_quadratic(regression: HessianOperator, name: str) -> None:
    exact = OPTIMIZERS[name].stability_limit / float(torch.linalg.eigvalsh(regression.to_dense())[-1])  # fmt: skip
    told = predict_convergence(regression, None, name)
    assert told.stable_learning_rate <= exact * 1.01
    assert told.stable_range[0] == told.stable_learning_rate <= told.stable_range[1]
    assert max(told.stable_range) >= 0.99 * exact


def test_curve_is_the_training(regression: HessianOperator) -> None:
    for name in ("heavy_ball", "adamw"):
        told = predict_convergence(regression, None, name)
        rate = told.stable_learning_rate / 4
        seen = torch.tensor(train(regression, name, rate, 30).losses, dtype=F64)
        assert torch.allclose(told.loss_curve(rate, 30), seen[0] - seen, rtol=1e-5, atol=1e-8)


def test_matrix_and_model_agree(regression: HessianOperator) -> None:
    matrix = MatrixOperator(regression.to_dense())
    for name in ("gd", "adam"):
        one, other = (
            predict_convergence(operator, regression.gradient(), name, target=0.5)
            for operator in (regression, matrix)
        )
        assert one.steps_to_target == other.steps_to_target
        assert one.stable_learning_rate == pytest.approx(other.stable_learning_rate, rel=0.02)
    with pytest.raises(ValueError, match="needs a model"):
        predict_convergence(matrix, regression.gradient(), "kfac")
    with pytest.raises(ValueError, match="must be given"):
        predict_convergence(matrix, None, "gd")


def test_the_direction_that_the_gradient_does_not_see() -> None:
    """lambda_max = 100 lies along a vector orthogonal to the gradient: rounding or noise would excite it."""
    values = torch.linspace(0.1, 1.0, 40, dtype=F64)
    values[7] = 100.0
    gradient = torch.ones(40, dtype=F64)
    gradient[7] = 0.0
    told = predict_convergence(MatrixOperator(values.diag()), gradient, "gd", target=1.0)
    assert told.lambda_max == pytest.approx(100, rel=1e-2)
    assert float(told.nodes.max()) < 1.01
    known = predict_convergence(MatrixOperator(values.diag()), gradient, "gd", target=1.0, lambda_max=100.0)  # fmt: skip
    assert known.num_matvecs == 30 < told.num_matvecs
    assert known.stable_learning_rate == pytest.approx(0.02)


# --- networks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gd", "heavy_ball", "adamw"])
@pytest.mark.parametrize("scale", [1.0, 16.0])
def test_steps_of_a_network_against_training(name: str, scale: float) -> None:
    net, data = classifier()
    operator = HessianOperator(rescaled(net, 3, scale), data, ClassificationLoss())
    told = predict_convergence(operator, None, name)
    slow = told.stable_learning_rate / 16
    at = predict_convergence(operator, None, name, learning_rates=[slow], target=told.target, lambda_max=told.lambda_max)  # fmt: skip
    seen = train(operator, name, slow, 300, target=told.target).steps_to(told.target)
    assert at.trustworthy and at.error_estimate < 1 / 3
    assert at.steps_to_target / 3 <= seen <= 3 * at.steps_to_target
    assert at.steps_low <= seen <= at.steps_high


@pytest.mark.parametrize("scale", [1.0, 16.0, 2.0**10])
def test_stable_rate_of_adamw_against_training(scale: float) -> None:
    net, data = classifier()
    operator = HessianOperator(rescaled(net, 3, scale), data, ClassificationLoss())
    told = predict_convergence(operator, None, "adamw")
    measured = largest_stable_rate(operator, "adamw", told.stable_learning_rate)
    assert 0.5 <= told.stable_learning_rate / measured.rate <= 2


def test_a_kink_next_to_the_weights_is_noticed() -> None:
    """A locked unit switches off within a small step: lambda_max = 2^8 lambda speaks of no neighbourhood, and it is said."""
    net, data = classifier()
    operator = HessianOperator(rescaled(net, 3, 16.0), data, ClassificationLoss())
    told = predict_convergence(operator, None, "gd")
    measured = largest_stable_rate(operator, "gd", told.stable_learning_rate, criterion="smooth")
    assert told.stable_learning_rate < measured.rate / 2
    assert not told.trustworthy and "stable rate is uncertain" in told.reason


def test_slowdown_of_a_lock(network: HessianOperator) -> None:
    net, data = classifier()
    locked = HessianOperator(rescaled(net, 3, 2.0**8), data, ClassificationLoss())
    pair = [
        predict_convergence(operator, None, "gd", target=0.05 * network.loss())
        for operator in (locked, network)
    ]
    found = slowdown(*pair)
    assert found.low <= found.mid <= found.high
    assert found.mid == pair[0].steps_to_target / pair[1].steps_to_target
    assert pair[0].stable_learning_rate < 1e-3 * pair[1].stable_learning_rate
    with pytest.raises(ValueError, match="same target"):
        slowdown(pair[0], predict_convergence(network, None, "gd", target=0.5))
    with pytest.raises(ValueError, match="same optimizer"):
        slowdown(pair[0], predict_convergence(network, None, "heavy_ball", target=pair[0].target))


def test_default_target_is_a_tenth_of_the_loss(network: HessianOperator) -> None:
    assert predict_convergence(network, None, "gd").target == pytest.approx(0.1 * network.loss())
    assert predict_convergence(network, None, "gd", loss=2.0).target == pytest.approx(0.2)
    bare = predict_convergence(MatrixOperator(torch.eye(2, dtype=F64)), torch.ones(2), "gd")
    assert bare.target == pytest.approx(0.5)


def test_float32_says_the_same(network: HessianOperator) -> None:
    single = HessianOperator(
        copy.deepcopy(network.model).float(),
        [(x.float(), y) for x, y in network.batches],
        ClassificationLoss(),
    )
    for name in ("gd", "adamw"):
        one, other = (predict_convergence(op, None, name) for op in (network, single))
        assert one.stable_learning_rate == pytest.approx(other.stable_learning_rate, rel=0.02)
        assert abs(one.steps_to_target - other.steps_to_target) <= 1


def test_nothing_is_changed_and_the_same_seed_says_the_same(network: HessianOperator) -> None:
    before = copy.deepcopy(network.model.state_dict())
    state = torch.get_rng_state()
    for name in ("gd", "adamw", "kfac"):
        one, other = (predict_convergence(network, None, name, seed=3).to_dict() for _ in range(2))
        assert one == other
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in network.model.state_dict().items())


# --- honesty ---------------------------------------------------------------------------------------------------------


def test_a_target_beyond_the_model_is_not_trusted(network: HessianOperator) -> None:
    """Nearly all of the loss: the quadratic falls below zero, which no cross-entropy does."""
    told = predict_convergence(network, None, "gd", target=0.95 * network.loss())
    assert not told.trustworthy
    assert "quadratic model does not" in told.reason
    assert told.steps_high > told.steps_low


def test_a_target_out_of_reach_is_infinite(regression: HessianOperator) -> None:
    told = predict_convergence(regression, None, "gd", target=10 * regression.loss())
    assert math.isinf(told.steps_to_target) and not told.trustworthy
    assert "does not reach the target" in told.reason
    assert json.loads(json.dumps(told.to_dict(), allow_nan=False))["steps_to_target"] is None
    short = predict_convergence(regression, None, "gd", learning_rates=[1e-4], max_steps=3)
    assert math.isinf(short.steps_to_target)
    assert math.isinf(predict_convergence(regression, None, "adam", target=10 * regression.loss()).steps_to_target)  # fmt: skip


def test_too_few_lanczos_steps_are_noticed() -> None:
    values = torch.logspace(-4, 0, 300, dtype=F64)
    told = predict_convergence(MatrixOperator(values.diag()), values.sqrt() ** 0.5, "gd", target=1500.0, num_steps=3)  # fmt: skip
    assert "raise num_steps" in told.reason and not told.trustworthy
    more = predict_convergence(MatrixOperator(values.diag()), values.sqrt() ** 0.5, "gd", target=1500.0, num_steps=80)  # fmt: skip
    assert more.trustworthy


class Kink(nn.Module):
    """A loss whose curvature at the point says nothing of its surroundings."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.3, 0.2], dtype=F64))

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.w[0] + torch.sin(300 * self.w[1]) / 30).expand_as(x)


def test_curvature_that_does_not_last_is_noticed() -> None:
    data = [(torch.ones(1, 1, dtype=F64), torch.full((1, 1), -3.0, dtype=F64))]
    told = predict_convergence(HessianOperator(Kink(), data, MSELoss()), None, "gd", target=1.0)
    assert not told.trustworthy and told.reason


def test_a_zero_gradient_moves_nothing() -> None:
    for name in ("gd", "adamw"):
        told = predict_convergence(MatrixOperator(torch.eye(3)), torch.zeros(3), name, learning_rates=[0.1])  # fmt: skip
        assert not told.trustworthy and "gradient is zero" in told.reason
        assert math.isinf(told.steps_to_target) and told.steps == (math.inf,)
        assert float(told.loss_curve(0.1, 5).abs().max()) == 0.0
        json.dumps(told.to_dict(), allow_nan=False)


def test_no_positive_curvature_has_no_stable_rate() -> None:
    told = predict_convergence(MatrixOperator(-torch.eye(3)), torch.ones(3), "gd", target=1.0)
    assert math.isinf(told.stable_learning_rate)
    assert not told.trustworthy and "no positive curvature" in told.reason
    assert not predict_convergence(MatrixOperator(-torch.eye(3)), torch.ones(3), "adam", target=1.0).trustworthy  # fmt: skip


def test_without_room_for_a_basis(network: HessianOperator) -> None:
    """The vectors are made twice; the answer is the same, for more products."""
    for name in ("gd", "kfac", "adamw"):
        roomy, lean = (predict_convergence(network, None, name, num_steps=12, memory_limit=limit) for limit in (2**32, 0))  # fmt: skip
        assert lean.steps_to_target == roomy.steps_to_target
        assert lean.stable_learning_rate == pytest.approx(roomy.stable_learning_rate, rel=0.05)
        assert lean.error_estimate == pytest.approx(roomy.error_estimate, rel=0.1)
        assert lean.trustworthy == roomy.trustworthy


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite(value: float) -> None:
    with pytest.raises(SpecDefError, match="NaN or infinite"):
        predict_convergence(MatrixOperator(torch.eye(2)), torch.tensor([1.0, value]), "gd")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"target": 0.0}, "target"),
        ({"target": math.nan}, "target"),
        ({"num_steps": 0}, "num_steps"),
        ({"max_steps": 0}, "max_steps"),
        ({"learning_rates": [0.1, -1.0]}, "learning_rates"),
        ({"learning_rates": []}, "learning_rates"),
    ],
)
def test_bad_arguments(options: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        predict_convergence(MatrixOperator(torch.eye(2)), torch.ones(2), "gd", **options)  # type: ignore[arg-type]


def test_bad_shapes_and_names() -> None:
    with pytest.raises(ValueError, match=r"must be \[2\]"):
        predict_convergence(MatrixOperator(torch.eye(2)), torch.ones(3), "gd")
    with pytest.raises(ValueError, match="must be one of"):
        predict_convergence(MatrixOperator(torch.eye(2)), torch.ones(2), "lion")


def test_rates_given_are_answered_one_by_one(regression: HessianOperator) -> None:
    rates = [1e-3, 3e-3, 1e-2]

    def check(told: Prediction, seen: Sequence[float]) -> None:
        assert told.learning_rates == tuple(rates)
        assert all(abs(a - b) <= 1 for a, b in zip(told.steps, seen, strict=True))
        assert told.steps_to_target == min(told.steps)
        assert told.best_learning_rate == rates[told.steps.index(min(told.steps))]

    for optimizer in (HeavyBall(), "adam"):
        told = predict_convergence(regression, None, optimizer, learning_rates=rates, target=0.2)
        check(told, [train(regression, optimizer, rate, 3000, target=0.2).steps_to(0.2) for rate in rates])  # fmt: skip


# --- the calibration -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_calibration_of_one_model() -> None:
    pytest.importorskip("sklearn")
    from specdef.experiments.calibration import draw, measure_case, within
    from specdef.experiments.calibration_cases import cases

    rows = [
        measure_case(case, name) for case in cases(("mlp",), locks=1) for name in ("gd", "adamw")
    ]
    assert [row["lock"] for row in rows] == ["none", "none", "channel 2^4", "channel 2^4"]
    assert within([row["stable"]["ratio"] for row in rows], 2) == 4
    assert within([entry["ratio"] for row in rows for entry in row["steps"]], 3) == 8
    assert draw(rows).axes
