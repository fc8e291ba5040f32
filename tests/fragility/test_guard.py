"""The guard on models whose subspace and path are known: what it sees, forecasts, holds back, and leaves alone."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from torch import nn

from specdef.curvature.losses import ClassificationLoss, LMLoss, MSELoss
from specdef.curvature.operators import GGNOperator, HessianOperator
from specdef.errors import SpecDefError
from specdef.fragility.drift import DriftWarning, time_left
from specdef.fragility.ewc import EWCPenalty, diagonal_fisher
from specdef.fragility.guard import DriftGuard
from specdef.fragility.rows import Rows
from specdef.fragility.subspace import FisherSubspace, fisher_subspace
from specdef.fragility.turning import AlignedData, coupled_directions
from specdef.models.tiny import tiny_model

N, RANK = 7, 2
VALUES = torch.tensor([5.0, 2.0], dtype=torch.float64)


class Linear(nn.Module):
    """x -> <w, x>, the weights cut into three tensors of different shapes."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()

        def draw(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))

        self.a, self.b, self.c = draw(2, 2), draw(1), draw(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ torch.cat([p.reshape(-1) for p in self.parameters()])


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def make(generator: torch.Generator, *, metric: bool = False):
    model = Linear(generator)
    Q = torch.linalg.qr(torch.randn(N, RANK, generator=generator, dtype=torch.float64))[0]
    root = 0.5 + torch.rand(N, generator=generator, dtype=torch.float64) if metric else None
    x = torch.randn(12, N, generator=generator, dtype=torch.float64)
    y = torch.randn(12, generator=generator, dtype=torch.float64)
    return model, planted(Q.T.contiguous(), root, ("a", "b", "c")), (x, y)


def planted(vectors, metric, parameters, values=VALUES) -> FisherSubspace:
    return FisherSubspace(
        vectors=vectors, values=values, errors=torch.zeros_like(values), converged=torch.ones(len(values), dtype=torch.bool),
        trace=float(values.sum()), trace_error=0.0, energy=1.0, energy_wanted=1.0, num_matvecs=0, fisher="ggn",
        metric=metric, parameters=parameters,
    )  # fmt: skip


OPTIMIZERS = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.01),
    "momentum": lambda groups: torch.optim.SGD(groups, lr=0.01, momentum=0.9),
    "decay": lambda groups: torch.optim.SGD(groups, lr=0.01, weight_decay=0.1),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01),
}


def train(model, data, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        (model(data[0]) - data[1]).square().mean().backward()
        optimizer.step()


def groups(model):
    return [{"params": [model.a]}, {"params": [model.b, model.c], "lr": 0.02}]


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@pytest.mark.parametrize("metric", [False, True])
def test_what_it_sees_is_the_dense_formula(generator, metric):
    model, subspace, data = make(generator, metric=metric)
    start, seen = flat(model), []
    guard = DriftGuard(model, subspace, threshold=1e9)
    optimizer = OPTIMIZERS["adamw"](groups(model))
    with guard.attach(optimizer):
        for _ in range(6):
            train(model, data, optimizer, 1)
            seen.append(flat(model) - start)
    train(model, data, optimizer, 1)  # no longer attached
    assert len(guard.history) == 6
    for i, (d, record) in enumerate(zip(seen, guard.history, strict=True)):
        phi = d if subspace.metric is None else subspace.metric * d
        c = subspace.vectors @ phi
        assert record.step == i + 1 and record.time == pytest.approx(0.01 * (i + 1))
        assert record.in_subspace == pytest.approx(0.5 * float(VALUES @ c**2), rel=1e-12)
        assert record.distance == pytest.approx(float(phi.norm()), rel=1e-12)
        assert record.drift == pytest.approx(float(c.norm() / phi.norm()), rel=1e-12)
    phi = (
        flat(model) - start if subspace.metric is None else subspace.metric * (flat(model) - start)
    )
    torch.testing.assert_close(guard.coordinates(), subspace.vectors @ phi)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("mode", ["first-order", "second-order"])
def test_what_each_projection_holds_back(generator, mode, optimizer):
    """A projected gradient is enough for a method that is linear in gradients and nothing else."""
    model, subspace, data = make(generator)
    before = flat(model)
    guard = DriftGuard(model, subspace, mode=mode, threshold=1e9)
    chosen = OPTIMIZERS[optimizer](model.parameters())
    with guard.attach(chosen):
        train(model, data, chosen, 10)
    held = mode == "second-order" or optimizer in ("sgd", "momentum")
    assert (guard.last.drift < 1e-12) == held
    assert held or guard.last.drift > 1e-3
    assert float((flat(model) - before).norm()) > 0.01  # what is not sensitive still moves


def test_a_projection_is_in_the_metric(generator):
    """Gradients of the metric's own method: theta moves by -P^-1 g."""
    model, subspace, data = make(generator, metric=True)
    guard = DriftGuard(model, subspace, mode="first-order")
    (model(data[0]) - data[1]).square().mean().backward()
    g = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    guard.attach(torch.optim.SGD(model.parameters(), lr=0.0)).__enter__()
    guard._before_step()
    got, m, U = torch.cat([p.grad.reshape(-1) for p in model.parameters()]), subspace.metric, subspace.vectors  # fmt: skip
    torch.testing.assert_close(got, g - m * (U.T @ (U @ (g / m))))
    guard.detach()
    guard = DriftGuard(model, subspace, mode="second-order")
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    with guard.attach(optimizer):
        train(model, data, optimizer, 5)
    assert guard.last.in_subspace < 1e-24


def test_further_rows_are_kept_out_of_too(generator):
    model, subspace, data = make(generator)
    operator = HessianOperator(model, [data], MSELoss())
    rows = coupled_directions(subspace, operator)
    torch.testing.assert_close(rows, subspace.vectors @ operator.to_dense())
    start = flat(model)
    guard = DriftGuard(model, subspace, mode="second-order", extra=rows)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    with guard.attach(optimizer):
        train(model, data, optimizer, 5)
    moved = flat(model) - start
    assert float((rows @ moved).abs().max()) < 1e-12 < 1e-3 < float(moved.norm())


def quartic(generator):
    """A quadratic task whose gradient at 0 is orthogonal to the subspace, and curves into it."""
    model = Linear(generator)
    for p in model.parameters():
        nn.init.zeros_(p)
    x = torch.randn(N, N, generator=generator, dtype=torch.float64)
    x = x / torch.linalg.matrix_norm(x, 2)
    y = torch.randn(N, generator=generator, dtype=torch.float64)
    g = x.T @ y
    u = torch.randn(N, generator=generator, dtype=torch.float64)
    u = u - g * (g @ u) / (g @ g)
    one = torch.ones(1, dtype=torch.float64)
    return model, planted((u / u.norm())[None], None, ("a", "b", "c"), one), (x, y)


def test_the_forecast_of_a_quartic_run(generator):
    """The threshold is crossed at the step that was forecast when a hundredth of it was reached."""
    model, subspace, data = quartic(generator)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    probe = DriftGuard(copy.deepcopy(model), subspace)
    other = torch.optim.SGD(probe.model.parameters(), lr=1e-3)
    with probe.attach(other):
        train(probe.model, data, other, 200)
    threshold = probe.last.in_subspace
    guard = DriftGuard(model, subspace, threshold=threshold, warn_steps=0)
    with guard.attach(optimizer):
        train(model, data, optimizer, 200)
    early = next(r for r in guard.history if r.in_subspace > threshold / 100)
    assert early.exponent == pytest.approx(4, abs=0.1)
    assert early.step + early.steps_left == pytest.approx(200, rel=0.05)
    assert guard.last.steps_left == 0 and guard.history[-2].steps_left != 0
    assert guard.history[4].steps_left is None  # too few values to fit


def test_time_is_the_sum_of_learning_rates():
    """Under a schedule the law holds over that sum, and steps are those at the present rate."""
    times = [1.0, 2.0, 6.0, 7.0, 9.0, 11.0]
    k, left = time_left([(t, 1e-4 * t**4) for t in times], 1e-4 * 22**4)
    assert (k, left) == (pytest.approx(4), pytest.approx(11))
    assert time_left([(t, 1.0) for t in times], 2.0)[1] == math.inf
    assert time_left([(t, math.nan) for t in times], 2.0) == (None, 0.0)
    assert time_left([(0.0, 0.0)] * 9, 2.0) == (None, None)


def test_it_warns_once(generator):
    model, subspace, data = quartic(generator)
    told = []
    guard = DriftGuard(model, subspace, threshold=1e-10, warn_steps=20)
    callback = DriftGuard(model, subspace, threshold=1e-10, warn_steps=20, on_warning=told.append)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with (
        guard.attach(optimizer),
        callback.attach(optimizer),
        warnings.catch_warnings(record=True) as seen,
    ):
        warnings.simplefilter("always")
        train(model, data, optimizer, 100)
    assert [w.category for w in seen] == [DriftWarning]
    assert "is forecast to reach 1e-10 in" in str(seen[0].message)
    (record,) = told
    assert 0 < record.steps_left < 20 and record == callback.history[record.step - 1]
    assert guard.warned and guard.last.in_subspace > 1e-10


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_watching_changes_nothing(generator, optimizer):
    model, subspace, data = make(generator)
    other = copy.deepcopy(model)
    aligned = GGNOperator(model, [data], MSELoss())
    guard = DriftGuard(model, subspace, aligned=aligned, every=2, threshold=1e9)
    chosen, plain = (OPTIMIZERS[optimizer](groups(m)) for m in (model, other))
    state = torch.random.get_rng_state()
    with guard.attach(chosen):
        train(model, data, chosen, 5)
    train(other, data, plain, 5)
    assert torch.equal(flat(model), flat(other)) and model.training
    assert torch.equal(state, torch.random.get_rng_state())
    assert [r.alignment is None for r in guard.history] == [True, False, True, False, True]


def test_what_it_measures_is_the_alignment_loss(generator):
    model, subspace, data = make(generator)
    start = model(data[0]).detach()
    guard = DriftGuard(model, subspace, aligned=GGNOperator(model, [data], MSELoss()), every=3, threshold=1e9)  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with guard.attach(optimizer):
        train(model, data, optimizer, 3)
    assert guard.last.alignment == pytest.approx(
        float((model(data[0]) - start).detach().square().mean())
    )
    net = nn.Linear(3, 4)
    x, y = torch.randn(5, 3, generator=generator), torch.tensor([0, 1, -100, 3, 2])
    measured = AlignedData(GGNOperator(net, [(x, y)], ClassificationLoss()))
    p = net(x).log_softmax(-1).detach()
    with torch.no_grad():
        net.weight += 0.3
    net.weight.data[0] -= 0.5  # leaves no trace
    q = net(x).log_softmax(-1).detach()
    want = (p.exp() * (p - q)).sum(-1)[y >= 0].mean()
    assert measured.loss() == pytest.approx(float(want), rel=1e-5)


def small_net(generator):
    """A net and data it has learnt, and a task on other inputs."""
    with torch.random.fork_rng([]):
        torch.manual_seed(5)
        net = nn.Sequential(nn.Linear(4, 12), nn.Tanh(), nn.Linear(12, 3)).double()
    x, z = torch.randn(2, 6, 4, generator=generator, dtype=torch.float64)
    return net, (x, torch.arange(6) % 3), (z, torch.randn(6, 3, generator=generator, dtype=torch.float64))  # fmt: skip


def test_the_subspace_turns_as_subspace_iteration_does(generator):
    net, aligned, _ = small_net(generator)
    operator = GGNOperator(net, [aligned], ClassificationLoss())
    subspace = fisher_subspace(net, [aligned], ClassificationLoss(), max_rank=3, energy=1.0)
    data = AlignedData(operator)
    with torch.no_grad():
        for p in net.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
    for metric in (
        None,
        0.5 + torch.rand(operator.shape[0], generator=generator, dtype=torch.float64),
    ):
        operator.refresh()
        F = operator.to_dense()
        if metric is not None:
            F = F / metric / metric[:, None]
        rows = data.turned(subspace.vectors, metric)
        want = torch.linalg.qr(F @ subspace.vectors.T)[0]
        torch.testing.assert_close(rows.T @ rows, want @ want.T)
    for _ in range(60):
        rows = data.turned(rows, None)
    operator.refresh()
    top = torch.linalg.eigh(operator.to_dense())[1][:, -3:]
    torch.testing.assert_close(rows.T @ rows, top @ top.T, atol=1e-4, rtol=0)
    net[0].weight.data.fill_(math.nan)
    assert data.turned(rows, None) is None


def test_turning_holds_back_what_a_fixed_subspace_lets_by(generator):
    """With as many directions as aligned outputs, only the turning of the subspace is left: of fourth order, then less."""
    net, aligned, task = small_net(generator)
    subspace = fisher_subspace(net, [aligned], ClassificationLoss(), max_rank=12, energy=1.0)
    found = {}
    for kind in ("none", "fixed", "turned"):
        model = copy.deepcopy(net)
        operator = GGNOperator(model, [aligned], ClassificationLoss())
        mode = "monitor" if kind == "none" else "second-order"
        guard = DriftGuard(model, subspace, mode=mode, aligned=operator, every=2 if kind == "turned" else 60, threshold=1e9)  # fmt: skip
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        with guard.attach(optimizer):
            train(model, task, optimizer, 60)
        found[kind] = (
            guard.last.alignment,
            float((model(task[0]) - task[1]).detach().square().mean()),
        )
    assert found["fixed"][0] < found["none"][0] / 5
    assert found["turned"][0] < found["fixed"][0] / 5
    assert found["turned"][1] < 0.75 * float((net(task[0]) - task[1]).detach().square().mean())


def test_rows_kept_in_half_precision_still_project(generator):
    model, subspace, data = make(generator)
    guard = DriftGuard(model, subspace, mode="second-order", dtype=torch.bfloat16)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    with guard.attach(optimizer):
        train(model, data, optimizer, 5)
    assert guard.last.drift < 1e-6  # single precision, though the rows are not orthonormal to 1e-3
    rows = Rows(subspace.vectors, None, dict(model.named_parameters()), torch.bfloat16)
    assert float((rows.flat() - subspace.vectors).abs().max()) > 1e-4


@pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing:FutureWarning"
)  # peft asks transformers
def test_adapters(generator):
    """Subspace and guard in the coordinates of LoRA's factors: all of it lies in B, whose partner alone is not zero."""
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", lora_dropout=0.0)  # fmt: skip
        model = get_peft_model(tiny_model("llama"), config)
    ids = torch.randint(0, 96, (2, 8), generator=generator)
    batch = {"input_ids": ids, "labels": ids}
    subspace = fisher_subspace(model, [batch], LMLoss(), max_rank=3, energy=1.0)
    assert all("lora_" in name for name in subspace.parameters)
    guard = DriftGuard(model, subspace, mode="second-order")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    other = torch.randint(0, 96, (2, 8), generator=generator)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    with guard.attach(optimizer):
        for _ in range(3):
            optimizer.zero_grad()
            model(input_ids=other, labels=other).loss.backward()
            optimizer.step()
    assert guard.last.drift < 1e-4 and guard.last.distance > 0.01
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


def test_a_parameter_of_two_names(generator):
    model, subspace, _ = make(generator)
    model.again = model.b  # type: ignore[assignment]
    renamed = planted(subspace.vectors, None, ("a", "again", "c"))
    guard = DriftGuard(model, renamed)
    with torch.no_grad():
        model.b += 1
    torch.testing.assert_close(guard.coordinates(), subspace.vectors[:, 4])


def test_weights_without_a_gradient(generator):
    """A weight that the loss does not reach moves where the projection needs it, and the drift is gone all the same."""
    model, subspace, _ = make(generator)
    guard = DriftGuard(model, subspace, mode="first-order")
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    with guard.attach(optimizer):
        optimizer.step()  # no gradient at all
        model.c.square().sum().backward()
        assert model.a.grad is None
        optimizer.step()
    assert guard.last.drift < 1e-12 < guard.last.distance


def test_what_does_not_fit_is_refused(generator):
    model, subspace, data = make(generator)
    for wrong in ({"mode": "third-order"}, {"every": 0}, {"threshold": 0.0}, {"warn_steps": -1}):
        with pytest.raises(
            (ValueError, TypeError)
        ):  # a wrong literal is noticed by the checks of types first
            DriftGuard(model, subspace, **wrong)
    with pytest.raises(SpecDefError, match="parameter d that the model does not have"):
        DriftGuard(model, planted(subspace.vectors, None, ("a", "b", "d")))
    with pytest.raises(SpecDefError, match="in 7 dimensions, its parameters here have 6"):
        DriftGuard(model, planted(subspace.vectors, None, ("a", "c")))
    with pytest.raises(SpecDefError, match="another model"):
        DriftGuard(model, subspace, aligned=GGNOperator(copy.deepcopy(model), [data], MSELoss()))
    part = torch.optim.SGD([model.a], lr=0.1)
    with pytest.raises(
        SpecDefError, match=r"2 of 3 parameters .* not the optimiser's, among them b"
    ):
        DriftGuard(model, subspace, mode="second-order").attach(part)
    guard = DriftGuard(model, subspace).attach(part)
    with pytest.raises(SpecDefError, match="attached to an optimiser already"):
        guard.attach(part)
    with pytest.raises(ValueError, match="strength must not be negative"):
        EWCPenalty(model, [data], MSELoss(), -1.0)


def test_ewc_is_the_dense_formula(generator):
    net = nn.Linear(3, 4).double()
    x = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    y = torch.tensor([0, 1, -100, 3, 2])
    ewc = EWCPenalty(net, [(x[:2], y[:2]), {"input": x[2:], "labels": y[2:]}], ClassificationLoss(), 3.0)  # fmt: skip
    p = net(x).softmax(-1).detach()
    kept = y >= 0
    delta = (p - nn.functional.one_hot(y.clamp(min=0), 4))[kept]
    fisher = {"weight": (delta**2).T @ x[kept] ** 2 / 4, "bias": (delta**2).sum(0) / 4}
    with torch.no_grad():
        net.weight += 0.2
        net.bias -= 0.1
    want = {"weight": 3 * fisher["weight"] * 0.2, "bias": -3 * fisher["bias"] * 0.1}
    penalty = ewc.penalty()
    assert float(penalty.detach()) == pytest.approx(sum(float((w**2 / fisher[n]).sum()) for n, w in want.items()) / 6)  # fmt: skip
    penalty.backward()
    for name, gradient in want.items():
        torch.testing.assert_close(ewc.fisher[name], fisher[name])
        torch.testing.assert_close(net.get_parameter(name).grad, gradient)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    before = net.weight.detach().clone()
    optimizer.zero_grad(set_to_none=False)
    with ewc.attach(optimizer):
        optimizer.step()
    torch.testing.assert_close(net.weight.detach(), before - 0.5 * want["weight"])
    with pytest.raises(SpecDefError, match="no term that counts"):
        diagonal_fisher(net, [(x[2:3], y[2:3])], ClassificationLoss())


def test_a_row_of_tokens_counts_with_its_sequence(generator):
    model = tiny_model("llama")
    ids = torch.randint(0, 96, (2, 5), generator=generator)
    names = ["model.norm.weight"]
    got = diagonal_fisher(model, [{"input_ids": ids, "labels": ids}], LMLoss(), names)
    want = torch.zeros_like(model.get_parameter(names[0]))
    for row in ids:
        loss = model(input_ids=row[None], labels=row[None]).loss * 4
        want += torch.autograd.grad(loss, [model.get_parameter(names[0])])[0] ** 2
    torch.testing.assert_close(got[names[0]], want / 8)


def trainer(model, tmp_path, ids, callbacks, **arguments):
    from transformers import Trainer, TrainingArguments

    settings = TrainingArguments(
        output_dir=str(tmp_path), max_steps=6, per_device_train_batch_size=2, logging_steps=2, report_to=[], save_strategy="no",
        disable_tqdm=True, use_cpu=True, seed=0, learning_rate=1e-2, **arguments,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in ids]
    return Trainer(model=model, args=settings, train_dataset=rows, callbacks=callbacks)


def test_beside_a_trainer(generator, tmp_path, capsys):
    pytest.importorskip("accelerate")
    from specdef import GuardCallback

    model, ids = tiny_model("llama"), torch.randint(0, 96, (8, 6), generator=generator)
    aligned = {"input_ids": ids[:2], "labels": ids[:2]}
    subspace = fisher_subspace(model, [aligned], LMLoss(), max_rank=2)
    operator = GGNOperator(model, [aligned], LMLoss())
    guard = DriftGuard(model, subspace, mode="second-order", aligned=operator, every=3, threshold=1e9)  # fmt: skip
    run = trainer(model, tmp_path, ids, [GuardCallback(guard)])
    run.train()
    assert [record.step for record in guard.history] == [1, 2, 3, 4, 5, 6]
    logged = [entry for entry in run.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in logged] == [2, 4, 6]
    assert [entry["drift_in_subspace"] for entry in logged] == [guard.history[i].in_subspace for i in (1, 3, 5)]  # fmt: skip
    assert "drift_alignment" not in logged[0] and logged[2]["drift_alignment"] == guard.last.alignment  # fmt: skip
    assert "drift_share" in capsys.readouterr().out
    train_again = torch.optim.SGD(model.parameters(), lr=0.1)
    guard.attach(train_again).detach()  # the Trainer let it go

    model = tiny_model("llama")
    guard = DriftGuard(model, subspace, threshold=1e-12, on_warning=lambda _: None)
    run = trainer(model, tmp_path, ids, [GuardCallback(guard, stop=True)])
    run.train()
    assert run.state.global_step == len(guard.history) < 6
