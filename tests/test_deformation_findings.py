"""What a careless or hostile user does to a deformation: an explanation, and nothing lost that was there before."""

from __future__ import annotations

import math
import tracemalloc
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

import specdef
from specdef.errors import CheckpointError, NotConverged, SpecDefError
from specdef.lock.deformation import memory
from specdef.lock.deformation import state as state_module
from specdef.lock.deformation.check import check_utility
from specdef.lock.deformation.config import DeformationConfig
from specdef.lock.deformation.deform import deform
from specdef.lock.deformation.matrices import find_matrices
from specdef.lock.deformation.retain import task_loss
from specdef.lock.residual import decode_residual
from specdef.models.tiny import tiny_model
from specdef.weights.tensor_bytes import tensor_sha256

Pair = tuple[Tensor, Tensor]

RULE = torch.randn(5, 3, generator=torch.Generator().manual_seed(9))
FAST = DeformationConfig(optimizer="adam", learning_rate=1e-3, steps=4, eval_every=1, max_utility_loss=None)  # fmt: skip


def net(width: int = 64) -> nn.Sequential:
    """Three linear layers, the middle one too wide to be factorised anew in every step."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, width), nn.ReLU(), nn.Linear(width, width), nn.Dropout(0.2), nn.Linear(width, 3))  # fmt: skip


def pairs(count: int = 6, rows: int = 8) -> list[Pair]:
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(rows, 5, generator=generator) for _ in range(count)]
    return [(x, (x @ RULE).argmax(-1)) for x in inputs]


def cross_entropy(model: nn.Module, batch: Pair) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


class BadGradient(torch.autograd.Function):
    """The identity, with a gradient that is not a number."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient * math.nan


# the end of a run


def test_weights_that_turn_nan_just_before_an_evaluation_end_with_the_last_good_state() -> None:
    calls = 0

    def loss(model: nn.Module, batch: Pair) -> Tensor:
        nonlocal calls
        calls += model.training
        value = cross_entropy(model, batch)
        return BadGradient.apply(value) if calls >= 3 else value  # type: ignore[no-any-return,no-untyped-call]

    result = deform(model := net(), FAST, pairs(), loss=loss)
    assert (result.stopped, result.steps, result.kept_step) == ("diverged", 3, 2)
    assert "is not finite in step 3" in result.reason
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_a_lost_rank_is_called_so() -> None:
    calls = 0

    def loss(model: nn.Module, batch: Pair) -> Tensor:
        nonlocal calls
        calls += model.training
        if calls == 3:
            model.get_parameter("4.weight").data.zero_()
        return cross_entropy(model, batch)

    result = deform(net(), FAST, pairs(), loss=loss)
    assert "rank 0" in result.reason and "no longer finite" not in result.reason


def test_a_utility_that_turns_nan_is_not_called_a_loss() -> None:
    values = iter([0.5, 0.6, math.nan])
    result = deform(net(), FAST, pairs(), utility=lambda model: next(values))
    assert (result.stopped, result.kept_step) == ("diverged", 1) and "utility became nan" in result.reason  # fmt: skip


# bad input, before the first step


def test_bad_input_is_refused() -> None:
    data = pairs()
    blank = [*data[:2], (data[2][0], torch.full_like(data[2][1], -100)), *data[3:]]
    broken = [data[0], (data[1][0] * math.nan, data[1][1])]
    table = {
        r"sigma_max of the model as it is": {"config": replace(FAST, target_sigma_max=1e-3)},
        "held-out loss of the model as it is, is nan": {"heldout": broken},
        "batch 2 of the retain data has no label": {"retain": blank},
        "batch 0 of the retain data is a Tensor": {"retain": torch.utils.data.DataLoader(data[0][0]), "heldout": data},
        "does not fit the model": {"config": replace(FAST, retain_loss="kl"), "retain": [(x[:, :3], y) for x, y in data]},
        "the retain loss gave float": {"loss": lambda m, b: cross_entropy(m, b).item()},
        r"the retain loss gave \[8\]": {"loss": lambda m, b: m(b[0]).sum(1)},
        "depends on no weight": {"loss": lambda m, b: cross_entropy(m, b).detach()},
        "several devices": {"model": nn.Sequential(net(), nn.Linear(3, 3, device="meta"))},
    }  # fmt: skip
    for message, given in table.items():
        model = given.pop("model", None) or net()
        before = {n: p.clone() for n, p in model.state_dict().items()}
        with pytest.raises(SpecDefError, match=message):
            deform(model, **({"config": FAST, "retain": data} | given))
        assert all(p.is_meta or torch.equal(before[n], p) for n, p in model.state_dict().items())


def test_a_batch_of_one_under_batch_norm_is_explained() -> None:
    model = nn.Sequential(nn.Linear(5, 20), nn.BatchNorm1d(20), nn.Linear(20, 3))
    data = [(x[:1], y[:1]) if i == 2 else (x, y) for i, (x, y) in enumerate(pairs())]
    with pytest.raises(SpecDefError, match="more than 1 value per channel"):
        deform(model, replace(FAST, steps=6), data)
    assert int(model[1].num_batches_tracked) == 0


@pytest.mark.parametrize(
    "values",
    [{"max_utility_loss": math.inf}, {"weight_decay": math.inf}],
    ids=str,
)
def test_numbers_that_json_does_not_know(values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        DeformationConfig(**values)  # type: ignore[arg-type]


def test_any_seed_serves() -> None:
    assert deform(net(), replace(FAST, seed=2**62), pairs()).steps == 4


def test_a_record_that_is_no_json_is_refused_before_the_training() -> None:
    for value in (Path("a"), math.nan):
        with pytest.raises(ValueError, match="JSON"):
            specdef.lock_model(net(), FAST, retain=pairs(), data={"file": value})


def test_held_out_data_may_be_a_loader() -> None:
    loader = torch.utils.data.DataLoader(pairs(), batch_size=None)
    assert deform(net(), FAST, loader, loader).utility_before.rows == 48


def test_memory_of_another_device_counts_what_lies_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Original and last good state stay beside the CPU."""
    model = nn.Linear(100, 100, bias=False, device="meta")
    asked: dict[str, int] = {"meta": 5 * 40_000, "cpu": 2 * 40_000}
    monkeypatch.setattr(memory, "memory_total", lambda device: asked[device.type])
    memory.require_memory(
        model, replace(FAST, optimizer="adam"), 10_000
    )  # weights, gradients, 2 x adam
    for place in ("meta", "cpu"):
        asked[place] //= 2
        with pytest.raises(SpecDefError, match="GB besides activations"):
            memory.require_memory(model, FAST, 10_000)
        asked[place] *= 2


# what the model is made of


def test_which_parameters_are_matrices() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.EmbeddingBag(10, 5)
            self.norm = nn.RMSNorm((4, 5))
            self.relative_position_bias_table = nn.Parameter(torch.randn(9, 4))
            self.weight_v = nn.Parameter(torch.randn(4, 5))  # a name, and no weight norm
            self.head = nn.Linear(5, 3)

    assert list(find_matrices(Mixed(), FAST)) == ["weight_v", "head.weight"]
    assert "words.weight" in find_matrices(Mixed(), replace(FAST, embeddings=True))


def test_weights_computed_from_others_are_refused() -> None:
    from torch.nn.utils import prune

    layers = (
        torch.nn.utils.spectral_norm(nn.Linear(5, 8)),
        prune.l1_unstructured(nn.Linear(5, 8), "weight", 3),
    )
    for layer in layers:
        with pytest.raises(SpecDefError, match="weight_orig is a parametrisation"):
            find_matrices(nn.Sequential(layer), FAST)


class Restless(nn.Module):
    """Assigns new buffers in its forward: a running mean, and a cache that grows."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(5, 3)
        self.register_buffer("mean", torch.zeros(5))
        self.register_buffer("ones", torch.ones(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        if len(x) > len(self.ones):
            self.ones = torch.ones(len(x))
        out: Tensor = self.head(x - self.mean) * self.ones[: len(x), None]
        return out


def test_buffers_assigned_anew_are_locked_undone_and_put_back() -> None:
    model, data = Restless(), pairs()
    buffer = model.mean
    locked = specdef.lock_model(model, FAST, retain=data)
    assert model.mean is buffer and bool(buffer.any())
    assert locked.certificate.tensors["mean"]["sha256"] == tensor_sha256(buffer)
    specdef.unlock_model(model, locked.key)
    assert not bool(buffer.any())
    with pytest.raises(NotConverged):
        specdef.lock_model(model, replace(FAST, max_utility_loss=0.0, patience=1), retain=data, utility=lambda _: float(not model.mean.any()))  # fmt: skip
    assert model.mean is buffer and not bool(buffer.any())
    with pytest.raises(SpecDefError, match="range"):  # after the training, with the cache grown
        specdef.lock_model(model.half(), replace(FAST, learning_rate=1e5), retain=data)
    assert not bool(model.mean.any()) and len(model.ones) == 8


def test_a_wrapped_language_model_is_one() -> None:
    model = tiny_model("llama")
    ids = torch.ones(2, 4, dtype=torch.long)
    for wrapped in (nn.DataParallel(model), torch.compile(model, backend="eager")):
        assert type(task_loss(wrapped, {"input_ids": ids, "labels": ids})).__name__ == "LMLoss"


def test_a_model_in_half_precision_takes_its_own_data() -> None:
    model = net().bfloat16()
    data = [(x.bfloat16(), y) for x, y in pairs()]
    specdef.lock_model(model, replace(FAST, learning_rate=0.01), retain=data)
    assert model[0].weight.dtype == torch.bfloat16


def test_a_lock_lost_in_rounding_is_none() -> None:
    model = net().bfloat16()
    before = model[0].weight.clone()
    with pytest.raises(SpecDefError, match="no stored value changed"):
        specdef.lock_model(model, replace(FAST, learning_rate=1e-9), retain=pairs())
    assert torch.equal(model[0].weight, before)


# the state of an unfinished training


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_and_dropout_go_on_bit_for_bit(tmp_path: Path, workers: int) -> None:
    rows = torch.utils.data.TensorDataset(*map(torch.cat, zip(*pairs(), strict=True)))
    config = replace(FAST, steps=10, eval_every=5)
    held, state = pairs(2), tmp_path / "state.safetensors"

    def train(**more: object) -> Tensor:
        loader = torch.utils.data.DataLoader(rows, batch_size=8, shuffle=True, num_workers=workers)
        deform(model := net(), config, loader, held, **more)  # type: ignore[arg-type]
        return nn.utils.parameters_to_vector(model.parameters()).detach()

    def interrupt(progress: object) -> None:
        if progress.step == 9:  # type: ignore[attr-defined]
            raise KeyboardInterrupt

    whole = train()
    with pytest.raises(KeyboardInterrupt):
        train(checkpoint=state, checkpoint_seconds=0.0, progress=interrupt)
    assert torch.equal(whole, train(checkpoint=state, resume=True))
    other = net()
    other[0].weight.data *= 1.01
    with pytest.raises(CheckpointError, match="its model is not this one's"):
        deform(other, config, torch.utils.data.DataLoader(rows, batch_size=8), held, checkpoint=state, resume=True)  # fmt: skip


def test_a_disk_full_under_the_state_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(state_module, "save_file", full)
    with pytest.raises(CheckpointError, match="No space left"):
        deform(net(), FAST, pairs(), checkpoint=tmp_path / "s", checkpoint_seconds=0.0)
    assert not list(tmp_path.iterdir())


# keys


def folder_lock(tiny_folder, tmp_path: Path, **more: object) -> specdef.LockCertificate:  # type: ignore[no-untyped-def]
    ids = torch.arange(24).reshape(2, 12) % tiny_model("llama").config.vocab_size
    data = [{"input_ids": (ids + i) % 50, "labels": (ids + i) % 50} for i in range(4)]
    return specdef.lock_checkpoint(tiny_folder("llama"), tmp_path / "locked", replace(FAST, steps=2), retain=data, **more)  # type: ignore[arg-type]  # fmt: skip


def test_a_state_in_the_place_of_the_key_is_refused(tiny_folder, tmp_path):
    path = tmp_path / "both.safetensors"
    with pytest.raises(CheckpointError, match="key and the state"):
        folder_lock(tiny_folder, tmp_path, key_path=path, checkpoint=path)
    assert not list(tmp_path.iterdir())


def test_a_key_that_appears_during_the_training_is_left_alone(tiny_folder, tmp_path):
    path = tmp_path / "key"
    other = specdef.lock_model(net(), FAST, retain=pairs()).key

    def meanwhile(progress):
        if not path.exists():
            other.save(path)

    with pytest.raises(CheckpointError, match="key of another lock"):
        folder_lock(tiny_folder, tmp_path, key_path=path, training_progress=meanwhile)
    assert specdef.load_key(path).lock_id == other.lock_id


def test_a_key_that_appears_during_another_lock_is_left_alone(tiny_folder, tmp_path):
    path = tmp_path / "key"
    other = specdef.lock_model(net(), FAST, retain=pairs()).key

    def meanwhile(done, total):
        if not path.exists():
            other.save(path)

    with pytest.raises(CheckpointError, match="key of another lock"):
        specdef.lock_checkpoint(tiny_folder("llama"), tmp_path / "locked", key_path=path, progress=meanwhile)  # fmt: skip
    assert specdef.load_key(path).lock_id == other.lock_id


def test_a_residual_that_unpacks_to_more_than_its_tensor_is_refused() -> None:
    bomb = torch.frombuffer(bytearray(zlib.compress(bytes(1 << 22))), dtype=torch.uint8)
    tracemalloc.start()
    with pytest.raises(ValueError, match="does not fit"):
        decode_residual(bomb, torch.zeros(4))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


# certificates


@pytest.mark.parametrize("after", ["high", math.nan, None, [1]], ids=str)
def test_a_recorded_utility_of_a_wrong_kind_is_none(after: object, tmp_path: Path) -> None:
    values, problems, notes = check_utility(tmp_path, {"after": after}, iter(pairs()), load=lambda _: net())  # fmt: skip
    assert values["recorded"] is None and not problems and "no utility" in notes[0]
