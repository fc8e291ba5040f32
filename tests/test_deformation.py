"""Algorithm 1 against a naive transcription: full SVD through autograd, torch's own losses, step by step."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from specdef.errors import CheckpointError, NotConverged, SelectionError, SpecDefError
from specdef.lock.deformation.config import DeformationConfig
from specdef.lock.deformation.data import epoch_order, split_held_out
from specdef.lock.deformation.deform import deform
from specdef.lock.deformation.divergence import kl_terms
from specdef.lock.deformation.matrices import find_matrices
from specdef.lock.deformation.optimizers import rate_factor
from specdef.lock.deformation.records import Progress
from specdef.lock.deformation.retain import Retain, measure_utility
from specdef.models.tiny import tiny_model

Batch = dict[str, Tensor]


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, 8, 3, stride=2), nn.Tanh(), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Linear(8 * 3 * 3, 4)

    def forward(self, pixel_values: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(pixel_values))
        return out


class Perceptron(nn.Module):
    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3))  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


def vector_batches(count: int = 6, rows: int = 16, seed: int = 0) -> list[Batch]:
    """Three classes, told apart by a fixed linear rule: a task a small net keeps."""
    generator = torch.Generator().manual_seed(seed)
    rule = torch.randn(5, 3, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    out = []
    for _ in range(count):
        x = torch.randn(rows, 5, generator=generator, dtype=torch.float64)
        out.append({"x": x, "labels": (x @ rule).argmax(-1)})
    return out


def picture_batches(count: int = 4, rows: int = 8) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "pixel_values": torch.randn(rows, 1, 8, 8, generator=generator, dtype=torch.float64),
            "labels": torch.randint(0, 4, (rows,), generator=generator),
        }
        for _ in range(count)
    ]


def text_batches(vocabulary: int, count: int = 4) -> list[Batch]:
    generator = torch.Generator().manual_seed(2)
    out = []
    for _ in range(count):
        ids = torch.randint(0, vocabulary, (3, 10), generator=generator)
        labels = ids.clone()
        labels[0, 6:] = -100
        out.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return out


def seeded(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().double()


def trained(steps: int = 150) -> nn.Module:
    """A net that has learned its task, so that utility can be lost."""
    model = seeded(Perceptron)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(steps):
        batch = vector_batches(seed=step % 20, count=1)[0]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch["x"]), batch["labels"]).backward()
        optimizer.step()
    return model


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def transcription(
    model: nn.Module, batches: list[Batch], config: DeformationConfig, names: list[str]
) -> list[dict[str, Tensor]]:
    """Algorithm 1 line by line (papers/001): SVD of every W_i, union of the top-k, one gradient of the whole objective.

    Knows nothing of the package but the order of the batches and the learning-rate schedule.
    """
    teacher = copy.deepcopy(model).eval()
    model.train()
    kinds: dict[str, Any] = {"adadelta": torch.optim.Adadelta, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}  # fmt: skip
    extra = {"momentum": 0.9} if config.optimizer == "sgd" else {}
    parameters = dict(model.named_parameters())
    optimizer = kinds[config.optimizer](
        parameters.values(), lr=config.rate, weight_decay=config.weight_decay, **extra
    )
    trajectory = []
    steps = config.steps or config.epochs * len(batches)
    for step in range(steps):
        epoch, place = divmod(step, len(batches))
        batch = batches[epoch_order(len(batches), config.seed, epoch)[place]]
        inputs = {n: x for n, x in batch.items() if n != "labels"}
        logits, labels = model(**inputs), batch["labels"]
        with torch.no_grad():
            original = teacher(**inputs)
        logits, original = (getattr(x, "logits", x) for x in (logits, original))
        if labels.ndim == 2:
            logits, original, labels = logits[:, :-1], original[:, :-1], labels[:, 1:]
        loss = torch.zeros((), dtype=torch.float64)
        if config.retain_loss != "kl":
            loss = loss + nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten())
        if config.retain_loss != "task":
            counted = labels != -100
            p, q = original[counted].log_softmax(-1), logits[counted].log_softmax(-1)
            loss = loss + (p.exp() * (p - q)).sum(-1).mean()
        sigma_m = []
        for name in names:
            weight = parameters[name]
            sigma_m.append(torch.linalg.svd(weight.flatten(1))[1][: config.k])
        sigma = torch.cat(sigma_m)
        objective = config.retain_weight * loss - (1 - config.retain_weight) * sigma.mean()
        optimizer.zero_grad()
        objective.backward()
        if config.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = config.rate * rate_factor(config, step, steps, len(batches))
        optimizer.step()
        trajectory.append({n: p.detach().clone() for n, p in parameters.items()})
    return trajectory


def steps_of(
    model: nn.Module, batches: list[Batch], config: DeformationConfig
) -> list[dict[str, Tensor]]:
    """Run the package and record the weights after every step."""
    trajectory: list[dict[str, Tensor]] = []

    def record(progress: Progress) -> None:
        trajectory.append({n: p.detach().clone() for n, p in model.named_parameters()})

    deform(model, config, batches, batches[:1], progress=record)
    return trajectory


def worst(ours: list[dict[str, Tensor]], theirs: list[dict[str, Tensor]]) -> float:
    assert len(ours) == len(theirs)
    return max(
        float((a[name] - b[name]).abs().max())
        for a, b in zip(ours, theirs, strict=True)
        for name in b
    )


CASES: dict[str, dict[str, Any]] = {
    "paper-vision": {"retain_weight": 0.5, "k": 1},
    "paper-text": {"retain_weight": 0.99, "k": 2, "retain_loss": "task+kl", "optimizer": "adamw"},
    "kl-linear": {"retain_weight": 0.9, "k": 2, "retain_loss": "kl", "optimizer": "sgd", "lr_schedule": "linear"},
    "clip-cosine": {"retain_weight": 0.3, "k": 3, "max_grad_norm": 0.5, "lr_schedule": "cosine", "weight_decay": 0.1},
    "plain": {"retain_weight": 1.0, "optimizer": "sgd", "lr_schedule": "constant"},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("net", ["perceptron", "convolution"])
def test_equals_the_transcription_step_by_step(net: str, case: str) -> None:
    kind, batches = (Perceptron, vector_batches()) if net == "perceptron" else (ConvNet, picture_batches())  # fmt: skip
    config = DeformationConfig(**CASES[case], epochs=5, max_utility_loss=None, seed=3)
    model, twin = seeded(kind), seeded(kind)
    names = list(find_matrices(model, config))
    assert len(names) == 3
    ours = steps_of(model, batches, config)
    theirs = transcription(twin, batches, config, names)
    assert worst(ours, theirs) < 1e-8
    moved = max(
        float((theirs[-1][n] - p).abs().max()) for n, p in seeded(kind).state_dict().items()
    )
    assert moved > 1e-3  # agreement of nets that stand still would say nothing


def test_equals_the_transcription_on_a_language_model() -> None:
    config = DeformationConfig(**CASES["paper-text"], epochs=3, max_utility_loss=None, learning_rate=1e-2)  # fmt: skip
    nets = [without_dropout(tiny_model("gpt2").double()) for _ in range(2)]
    batches = text_batches(nets[0].config.vocab_size)
    names = list(find_matrices(nets[0], config))
    assert all("wte" not in name and "wpe" not in name for name in names)
    ours = steps_of(nets[0], batches, config)
    theirs = transcription(nets[1], batches, config, names)
    assert worst(ours, theirs) < 1e-8


def test_divergence_and_its_gradient_are_those_of_the_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    teacher, student = (
        torch.randn(7, 5, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    student.requires_grad_()
    weights = torch.rand(7, generator=generator, dtype=torch.float64)
    ours = kl_terms(teacher, student)
    p = teacher.softmax(-1)
    naive = (p * (p.log() - student.log_softmax(-1))).sum(-1)
    assert torch.allclose(ours, naive, atol=1e-14)
    (a,) = torch.autograd.grad((weights * ours).sum(), student)
    (b,) = torch.autograd.grad((weights * naive).sum(), student)
    assert torch.allclose(a, b, atol=1e-14)


def test_cached_and_online_teacher_give_the_same_run() -> None:
    batches = vector_batches()
    runs = []
    for teacher in ("cached", "online"):
        config = DeformationConfig(retain_loss="task+kl", teacher=teacher, epochs=3, max_utility_loss=None)  # fmt: skip
        runs.append(steps_of(seeded(Perceptron), batches, config))
    assert worst(*runs) < 1e-12


def test_singular_values_rise_and_the_task_is_kept() -> None:
    model = trained()
    batches = vector_batches(30)
    before = measure_utility(model, batches[:4])
    assert before.value > 0.9
    result = deform(model, DeformationConfig(optimizer="adam", learning_rate=1e-2, epochs=12), batches[4:], batches[:4])  # fmt: skip
    assert result.stopped == "finished"
    assert result.utility_after.value >= before.value - 0.02
    assert measure_utility(model, batches[:4]).to_dict() == result.utility_after.to_dict()
    for name, value in result.sigma_after.items():
        exact = float(torch.linalg.matrix_norm(model.state_dict()[name], 2))
        assert value == pytest.approx(exact, rel=1e-5)
        assert value > 1.5 * result.sigma_before[name]
    assert [s.step for s in result.history] == sorted({s.step for s in result.history})
    assert len(result.history) >= 20
    growth = max(result.sigma_after[n] / result.sigma_before[n] for n in result.sigma_after)
    assert result.history[-1].growth == pytest.approx(growth, rel=1e-5)


def test_stops_at_the_wanted_singular_value() -> None:
    model, batches = trained(), vector_batches(30)
    config = DeformationConfig(optimizer="adam", learning_rate=1e-2, epochs=20, target_sigma_max=6.0)  # fmt: skip
    result = deform(model, config, batches[4:], batches[:4])
    assert result.stopped == "target"
    assert result.steps < 20 * 26
    assert 6.0 <= max(result.sigma_after.values()) < 6.2
    twin = trained()
    result = deform(twin, DeformationConfig(optimizer="adam", learning_rate=1e-2, epochs=20, target_growth=2.0), batches[4:], batches[:4])  # fmt: skip
    growth = max(result.sigma_after[n] / result.sigma_before[n] for n in result.sigma_after)
    assert result.stopped == "target"
    assert 2.0 <= growth < 2.1


def test_ends_at_the_utility_floor_with_the_last_state_above_it() -> None:
    model, batches = trained(), vector_batches(30)
    start = measure_utility(model, batches[:4]).value
    # a small weight on the task, and no schedule: utility must go some time
    config = DeformationConfig(retain_weight=1e-4, optimizer="adam", learning_rate=3e-3, lr_schedule="constant", epochs=60, eval_every=10, max_utility_loss=0.05)  # fmt: skip
    result = deform(model, config, batches[4:], batches[:4])
    assert result.stopped == "utility"
    assert 0 < result.kept_step < result.steps
    assert f"step {result.kept_step} is kept" in result.reason
    assert measure_utility(model, batches[:4]).value == result.utility_after.value >= start - 0.05
    after = [s.utility for s in result.history if s.step > result.kept_step]
    assert len(after) >= 1
    assert max(after) < start - 0.05


def test_nan_ends_with_the_last_good_state() -> None:
    model, batches = trained(), vector_batches(30)
    calls = 0

    def loss(model: nn.Module, batch: Any) -> Tensor:
        nonlocal calls
        calls += model.training
        value = nn.functional.cross_entropy(model(batch["x"]), batch["labels"])
        return value * math.nan if calls > 25 else value

    config = DeformationConfig(optimizer="adam", learning_rate=1e-3, epochs=4, eval_every=10, max_utility_loss=None)  # fmt: skip
    result = deform(model, config, batches[4:], batches[:4], loss=loss)
    assert (result.stopped, result.steps, result.kept_step) == ("diverged", 26, 20)
    assert "nan in step 26" in result.reason
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert -float(loss_of(model, batches[:4])) == pytest.approx(result.utility_after.value)


def loss_of(model: nn.Module, batches: list[Batch]) -> Tensor:
    with torch.no_grad():
        return torch.stack([nn.functional.cross_entropy(model(b["x"]), b["labels"]) for b in batches]).mean()  # fmt: skip


def test_divergence_before_anything_is_kept_leaves_the_model_as_it_was() -> None:
    model, batches = trained(), vector_batches(30)
    before = {n: p.clone() for n, p in model.state_dict().items()}
    config = DeformationConfig(optimizer="sgd", learning_rate=1e200, epochs=2)
    with pytest.raises(NotConverged, match="no lock") as caught:
        deform(model, config, batches[4:], batches[:4])
    assert caught.value.result.stopped == "diverged"
    assert "learning rate" in caught.value.hint
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("optimizer", ["adadelta", "adamw", "sgd", "rmsprop", "adam"])
def test_resumes_bit_for_bit(tmp_path: Path, optimizer: Any) -> None:
    batches = vector_batches(8)
    config = DeformationConfig(optimizer=optimizer, learning_rate=1e-3, retain_loss="task+kl", epochs=4, eval_every=7, max_utility_loss=None)  # fmt: skip

    def net() -> nn.Module:
        model = trained(20)
        model.add_module("dropout", nn.Dropout(0.1))
        model.forward = lambda x: model.layers(model.dropout(x))  # type: ignore[method-assign,operator]
        return model

    whole = net()
    full = deform(whole, config, batches, batches[:2])
    path = tmp_path / "state.safetensors"
    part = net()

    def interrupt(progress: Progress) -> None:
        if progress.step == 17:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        deform(part, config, batches, batches[:2], checkpoint=path, checkpoint_seconds=0.0, progress=interrupt)  # fmt: skip
    assert path.exists()
    with pytest.raises(CheckpointError, match="unfinished"):
        deform(net(), config, batches, batches[:2], checkpoint=path)
    other = DeformationConfig(**(config.to_dict() | {"retain_weight": 0.6}))
    with pytest.raises(CheckpointError, match=r"retain_weight: 0\.5 then, 0\.6 now"):
        deform(net(), other, batches, batches[:2], checkpoint=path, resume=True)
    with pytest.raises(CheckpointError, match="data"):
        deform(net(), config, batches[:-1], batches[:2], checkpoint=path, resume=True)
    rest = net()
    again = deform(rest, config, batches, batches[:2], checkpoint=path, resume=True)
    assert path.exists()  # the result is not stored yet: whoever stores it removes the state
    for name, value in whole.state_dict().items():
        assert torch.equal(value, rest.state_dict()[name]), name
    assert [(s.step, s.utility, s.sigma_max) for s in full.history] == [
        (s.step, s.utility, s.sigma_max) for s in again.history
    ]


def test_a_damaged_state_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    path.write_bytes(b"no safetensors at all")
    with pytest.raises(CheckpointError):
        deform(trained(1), DeformationConfig(epochs=1), vector_batches(4), checkpoint=path, resume=True)  # fmt: skip
    with pytest.raises(CheckpointError, match="not there"):
        deform(trained(1), DeformationConfig(epochs=1), vector_batches(4), checkpoint=tmp_path / "x", resume=True)  # fmt: skip


def test_targets_alone_move_where_asked() -> None:
    model, batches = trained(), vector_batches(10)
    before = {n: p.clone() for n, p in model.state_dict().items()}
    config = DeformationConfig(target_modules=("layers.2",), train="targets", optimizer="adam", epochs=2, max_utility_loss=None)  # fmt: skip
    result = deform(model, config, batches)
    changed = [n for n, p in model.state_dict().items() if not torch.equal(p, before[n])]
    assert changed == ["layers.2.weight"]
    assert list(result.sigma_before) == ["layers.2.weight"]
    assert all(p.requires_grad for p in model.parameters())


def test_matrices_of_convolutions_are_their_unfolding() -> None:
    # the matrix multiplies unfolded patches: W(out, in kh kw) @ unfold(x) is the convolution itself
    conv = nn.Conv2d(3, 5, 2, bias=False, dtype=torch.float64)
    (item,) = find_matrices(nn.Sequential(conv), DeformationConfig()).values()
    matrix = item.view(conv.weight.data)
    assert matrix.shape == (5, 12)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    product = (matrix @ nn.functional.unfold(x, 2)).reshape(2, 5, 5, 5)
    assert torch.allclose(product, conv(x), atol=1e-12)
    assert matrix.data_ptr() == conv.weight.data_ptr()


def test_which_parameters_are_matrices() -> None:
    config = DeformationConfig()
    llama = find_matrices(tiny_model("llama"), config)
    assert not any("embed" in name or "norm" in name for name in llama)
    assert sum("proj" in name for name in llama) == 14
    tied = tiny_model("gpt2")
    assert tied.get_parameter("transformer.wte.weight") is tied.lm_head.weight  # type: ignore[union-attr]
    assert "transformer.wte.weight" not in find_matrices(tied, config)
    assert "transformer.wte.weight" in find_matrices(tied, DeformationConfig(embeddings=True))
    experts = find_matrices(tiny_model("mixtral"), config)
    assert any(item.stacked for item in experts.values())
    vit = find_matrices(tiny_model("vit"), config)
    assert not any("position" in name or "cls" in name for name in vit)
    assert any("projection" in name for name in vit)  # the patch convolution
    frozen = seeded(Perceptron)
    frozen.get_parameter("layers.0.weight").requires_grad_(False)
    assert "layers.0.weight" not in find_matrices(frozen, config)


def test_bad_input_is_refused_before_the_first_step() -> None:
    model, batches = seeded(Perceptron), vector_batches(4)

    def refused(error: type[Exception], match: str, config: dict[str, Any] | None = None, data: Any = None, **more: Any) -> None:  # fmt: skip
        net = more.pop("net", None) or copy.deepcopy(model)
        before = {n: p.clone() for n, p in net.state_dict().items()}
        with pytest.raises(error, match=match):
            deform(net, DeformationConfig(**(config or {})), batches if data is None else data, **more)  # fmt: skip
        assert all(torch.equal(before[n], p, ) for n, p in net.state_dict().items() if not p.isnan().any())  # fmt: skip

    refused(SpecDefError, r"layers\.4\.weight: k = 4 .* 3 x 12 matrix has 3", {"k": 4})
    refused(SelectionError, "no module of the model", {"target_modules": "layer.0"})
    refused(SelectionError, "no weight matrix", net=nn.LayerNorm(4))
    refused(SpecDefError, "cannot be split", data=batches[:1])
    refused(SpecDefError, "empty", data=[], heldout=batches)
    refused(SpecDefError, "empty", heldout=[])
    refused(SpecDefError, "does not fit the model", data=[{"x": torch.zeros(2, 7), "labels": torch.zeros(2, dtype=torch.long)}] * 3)  # fmt: skip
    refused(SpecDefError, "has no labels", data=[{"x": b["x"]} for b in batches])
    wrong = [*batches[:2], {**batches[2], "labels": batches[2]["labels"] + 1}, batches[3]]
    refused(SpecDefError, r"batch 2 of the retain data has the label 3, outside 0\.\.2", data=wrong)
    none = [{**b, "labels": torch.full_like(b["labels"], -100)} for b in batches]
    refused(SpecDefError, "retain loss of the model as it is, is nan", data=none)
    broken = copy.deepcopy(model)
    broken.get_parameter("layers.0.bias").data[0] = math.nan
    refused(SpecDefError, "is nan", net=broken)
    zero = copy.deepcopy(model)
    zero.get_parameter("layers.2.weight").data.zero_()
    refused(ValueError, r"layers\.2\.weight", net=zero)
    text = tiny_model("llama")
    ids = torch.full((2, 8), text.config.vocab_size)
    refused(SpecDefError, "has the token", data=[{"input_ids": ids, "labels": ids}] * 3, net=text)
    for name, value in {"retain_weight": 0.0, "k": 0, "epochs": 0, "gamma": 1.5, "target_growth": 1.0, "learning_rate": math.nan}.items():  # fmt: skip
        with pytest.raises(ValueError, match=name):
            DeformationConfig(**{name: value})
    for value in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="alpha"):
            DeformationConfig(retain_weight=value)


def test_out_of_memory_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    import specdef.lock.deformation.memory as memory

    monkeypatch.setattr(memory, "memory_total", lambda device: 1000)
    with pytest.raises(SpecDefError, match="GB besides activations") as caught:
        deform(seeded(Perceptron), DeformationConfig(epochs=1), vector_batches(4))
    assert "--batch-size" in caught.value.hint
    monkeypatch.undo()

    def loss(model: nn.Module, batch: Any) -> Tensor:
        if model.training:
            torch.empty(1 << 60)
        return nn.functional.cross_entropy(model(batch["x"]), batch["labels"])

    with pytest.raises(SpecDefError, match="ran out of memory"):
        deform(seeded(Perceptron), DeformationConfig(epochs=1), vector_batches(4), loss=loss)


def test_a_loader_serves_as_retain_data() -> None:
    rows = torch.cat([b["x"] for b in vector_batches(4)]), torch.cat([b["labels"] for b in vector_batches(4)])  # fmt: skip
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*rows), batch_size=16, shuffle=True)  # fmt: skip
    held = [[x["x"], x["labels"]] for x in vector_batches(2, seed=5)]
    config = DeformationConfig(epochs=2, retain_loss="task+kl", max_utility_loss=None)
    runs = [steps_of_loader(loader, held, config) for _ in range(2)]
    assert torch.equal(*runs)
    with pytest.raises(SpecDefError, match="cannot be split"):
        deform(seeded(Perceptron), config, loader)
    train, last = split_held_out(iter(vector_batches(30)), None)
    assert (len(train), len(last)) == (27, 3)


def steps_of_loader(loader: Any, held: Any, config: DeformationConfig) -> Tensor:
    model = seeded(Perceptron)
    deform(model, config, loader, held)
    return nn.utils.parameters_to_vector(model.parameters()).detach()


@torch.no_grad()
def test_utility_counts_tokens_and_rows() -> None:
    model = tiny_model("gpt2").eval()
    batches = text_batches(model.config.vocab_size)
    utility = measure_utility(model, batches)
    hits = rows = 0
    total = 0.0
    for batch in batches:
        logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        counted = labels != -100
        rows += int(counted.sum())
        hits += int((logits.argmax(-1) == labels)[counted].sum())
        total += float(nn.functional.cross_entropy(logits[counted], labels[counted], reduction="sum"))  # fmt: skip
    assert (utility.metric, utility.rows) == ("next-token accuracy", rows)
    assert utility.value == hits / rows
    assert utility.loss == pytest.approx(total / rows, rel=1e-5)
    assert measure_utility(model, batches, utility=lambda m: 0.25).value == 0.25
    assert not model.training


def test_modes_and_batch_norm_are_left_as_training_leaves_them() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).double().eval()  # fmt: skip
    batches = [[b["x"], b["labels"]] for b in vector_batches(6)]
    deform(model, DeformationConfig(epochs=1, max_utility_loss=None), batches)
    assert not model[1].training
    assert int(model[1].num_batches_tracked) == 5  # type: ignore[arg-type]


def test_teacher_is_the_original_and_not_what_is_trained() -> None:
    model, batches = trained(), vector_batches(4)
    retain = Retain(model, kind="kl", teacher="online")
    assert float(retain(model, batches[0], 0).detach()) == pytest.approx(0.0, abs=1e-12)
    with torch.no_grad():
        model.get_parameter("layers.4.weight").mul_(2)
    assert float(retain(model, batches[0], 0).detach()) > 1e-3
