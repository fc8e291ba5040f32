"""Table 1, vision: tasks are drawn as they are named, verdicts follow from the numbers, and a small one runs and goes on."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from idx_files import write_split
from specdef.attacks.task import Budget
from specdef.audit.grid import Sweep
from specdef.cli.reproduce import FULL, Experiment
from specdef.errors import SpecDefError
from specdef.experiments import table1_vision, table1_vision_setup
from specdef.experiments.deformation_measure import Settings as Original
from specdef.experiments.deformation_measure import places, trained
from specdef.experiments.lock_table import SCRATCH, UNLOCKED
from specdef.experiments.paper.locks import ABSORBED, COMPENSATED, DEFORMATION
from specdef.experiments.paper.runs import PAPER, SWEEP
from specdef.experiments.paper.verdicts import FAILED, HELD, ONLY_THERE
from specdef.experiments.table1_vision import SIZES
from specdef.experiments.table1_vision_report import (
    MODEL,
    comparisons,
    draw,
    guessing,
    share,
    table,
)
from specdef.experiments.table1_vision_setup import (
    CLOTHES,
    Settings,
    Target,
    clothes_folder,
    new_task,
    own_task,
    plan_of,
    require_data,
)
from specdef.lock.in_memory import lock_model
from specdef.lock.load import load_model

SHORT = Budget(steps=2, evaluations=1)
TARGETS = (
    Target(name="CIFAR-10", paper=0.80, rows=64, steps=7, sweep=SHORT),
    Target(name="KMNIST", paper=0.80, rows=64, steps=7, sweep=SHORT),
    Target(
        name=CLOTHES,
        paper=0.74,
        rows=64,
        steps=7,
        sweep=SHORT,
        sweeps=("full-adamw", "full-momentum"),
    ),
)
SMALL = Settings(
    original=Original(rows=640, epochs=1, retain_rows=320, lock_epochs=1),
    targets=TARGETS, further_steps=3, sweep_batch_size=8, heldout_rows=100,
)  # fmt: skip


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPECDEF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def data(tmp_path) -> Path:
    """Pictures of one grey each, 7 times their class plus 100, and 90 % of them for training where the file says so."""
    folder = tmp_path / "data"
    folder.mkdir()
    labels = (np.arange(1000) % 10).astype(np.uint8)
    grey = np.broadcast_to((100 + 7 * labels)[:, None, None], (1000, 28, 28)).astype(np.uint8)
    colours = np.repeat(grey[:, :, :, None], 3, axis=3)[:, :14, :14]
    np.savez(folder / "cifar10.npz", images=colours, labels=labels, train=np.arange(1000) < 900)
    np.savez(folder / "kmnist_test.npz", images=grey, labels=labels)
    for start in ("train", "t10k"):
        write_split(folder / "fashion-mnist", start, grey[:200], labels[:200])
    return folder


class Net(nn.Module):
    """As much of a net as the drawing of its pictures looks at."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.config = type("Config", (), {"image_size": 28, "num_channels": 1, "num_labels": 10, "id2label": {i: str(i) for i in range(10)}, "label2id": {}})()  # fmt: skip


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)
def test_new_tasks_are_grey_and_fit_the_net(data, target):
    task = new_task(SMALL, target, "none", data, Net(), 0)
    assert task.name == target.name and len(task.train) == 2 and len(task.heldout) == 1
    for batch, rows in ((task.train[0], 32), (task.heldout[0], 100)):
        assert batch["pixel_values"].shape == (rows, 1, 28, 28) and batch["labels"].dtype == torch.int64  # fmt: skip
        seen = (batch["pixel_values"].amax((1, 2, 3)) * 255).round()
        assert torch.equal(seen, 100.0 + 7 * batch["labels"])  # a picture stays with its class
    short = new_task(SMALL, target, "none", data, Net(), 0, sweep=True)
    assert [len(batch["labels"]) for batch in short.train] == [8, 8]
    assert torch.equal(short.heldout[0]["labels"], task.heldout[0]["labels"])
    other = new_task(SMALL, target, "none", data, Net(), 1)
    assert not torch.equal(other.train[0]["labels"], task.train[0]["labels"])
    assert torch.equal(other.heldout[0]["labels"], task.heldout[0]["labels"])


def test_tasks_made_of_digits(tmp_path):
    lock = replace(SIZES["smoke"][0].original, rows=64, epochs=1)
    settings = replace(SIZES["smoke"][0], original=lock)
    with places(lock) as (digits, models):
        folder, _ = trained(digits, models, lock, 0, lambda _: None)
        model = load_model(folder, dtype="float32").eval()
        own = own_task(settings, digits, model, 0)
        assert [len(own.retain), len(own.heldout), len(own.test)] == [20, 5, 1]
        negatives, rotations = (new_task(settings, t, digits, None, model, 0) for t in settings.targets)  # fmt: skip
    first, turned = negatives.train[0]["pixel_values"], rotations.train[0]["pixel_values"]
    assert torch.allclose(1 - first, torch.rot90(turned, -1, (2, 3))) and not torch.allclose(first, turned)  # fmt: skip
    assert torch.allclose(
        1 - first, own.retain[0]["pixel_values"]
    )  # the same draw of the same digits
    compensated = SIZES["smoke"][1].compensated
    locked = lock_model(model, compensated)
    assert [s["name"].rpartition(".layer.")[2] for s in locked.certificate.sites] == ["1.convolution.weight"] * 2  # fmt: skip


@pytest.mark.parametrize("name", ["cifar10.npz", "kmnist_test.npz"])
def test_missing_pictures_are_named_before_any_work(data, tmp_path, cache, name):
    require_data(SMALL, data)
    (data / name).unlink()
    said: list[str] = []
    with pytest.raises(SpecDefError, match=name) as caught:
        table1_vision.run(tmp_path / "out", size="cpu", data=data, progress=said.append)
    assert "--data DIR" in caught.value.hint and not said and not (tmp_path / "out").exists()
    with pytest.raises(SpecDefError, match="CIFAR-10 is not there") as caught:
        require_data(SMALL, None)
    assert "--data DIR" in caught.value.hint
    require_data(SIZES["smoke"][0], None)


def test_clothes_lie_in_either_folder(data, tmp_path, monkeypatch):
    assert clothes_folder(data) == data / "fashion-mnist"
    monkeypatch.setattr(table1_vision_setup, "FASHION", tmp_path / "nowhere")
    for given in (None, tmp_path):
        with pytest.raises(SpecDefError, match="Fashion-MNIST is not in") as caught:
            clothes_folder(given)
        assert "dataset-fashion-mnist" in caught.value.hint
    monkeypatch.setattr(table1_vision_setup, "FASHION", data / "fashion-mnist")
    assert clothes_folder(None) == data / "fashion-mnist"


def test_damaged_pictures_are_named(data):
    (data / "kmnist_test.npz").write_bytes(b"PK cut off")
    with pytest.raises(SpecDefError, match=r"kmnist_test\.npz: pictures cannot be read"):
        new_task(SMALL, TARGETS[1], "none", data, Net(), 0)
    few = replace(TARGETS[0], rows=901)
    with pytest.raises(SpecDefError, match="900 pictures of the split train; 901"):
        new_task(SMALL, few, "none", data, Net(), 0)


def test_the_papers_attacks():
    plan = plan_of(SMALL, TARGETS[2])
    found = [(r.setting.optimizer, r.setting.learning_rate, r.setting.weight_decay, r.budget.steps) for r in plan.recipes]  # fmt: skip
    assert found == [("adamw", 0.1, 0.01, 7), ("adadelta", 1.0, 0.0, 3), ("momentum", 0.1, 0.0, 3)]
    assert plan.sweeps == TARGETS[2].sweeps and plan.budget == SHORT
    same = plan_of(replace(SMALL, further_steps=None), TARGETS[0])
    assert {r.budget for r in same.recipes} == {Budget(steps=7, evaluations=2)}
    settings, recipes = SIZES["full"]
    epochs = [t.steps / (t.rows // settings.batch_size) for t in settings.targets]
    assert epochs == [10, 10, 10] and recipes.deformation.epochs == settings.original.epochs == 10
    assert (recipes.deformation.retain_weight, recipes.deformation.k, recipes.deformation.optimizer) == (0.5, 1, "adadelta")  # fmt: skip
    assert table1_vision.SEEDS.keys() == SIZES.keys()
    assert Experiment("table1-vision") and "table1-vision" in FULL


LIMIT = 0.205  # of 100 pictures: 0.1 + 3.5 * sqrt(0.1 * 0.9 / 100)


def cell(task, lock, at, accuracy, recovered, attack="full-adamw"):
    return {
        "model": MODEL, "task": task, "attack": attack, "optimizer": "adamw", "at": at, "lock": lock, "seeds": [0],
        "accuracy": None if accuracy is None else {"mean": accuracy, "interval": None, "values": [accuracy]},
        "recovered": None if recovered is None else {"mean": recovered, "interval": None, "values": [recovered]},
        "learning_rates": [0.1], "statuses": ["diverged" if accuracy is None else "finished"],
    }  # fmt: skip


def cells(control, paper, sweep, *more):
    """Cells of all tasks, alike: accuracy and share of the unlocked net and of the deformation, at the paper's rate and the best."""
    return [
        entry
        for t in TARGETS
        for entry in (
            cell(t.name, UNLOCKED, PAPER, *control), cell(t.name, UNLOCKED, SWEEP, 0.8, 1.0), cell(t.name, SCRATCH, SWEEP, 0.5, 0.6),
            cell(t.name, DEFORMATION, PAPER, *paper), cell(t.name, DEFORMATION, SWEEP, *sweep),
            *(cell(t.name, DEFORMATION, *values) for values in more),
        )
    ]  # fmt: skip


def fact(lock, before=0.985, after=0.98):
    return {"lock": lock, "utility_before": before, "utility_after": after}


def test_guesses_recover_nothing():
    assert guessing(SMALL) == pytest.approx(LIMIT)
    assert guessing(replace(SMALL, heldout_rows=10_000)) < 0.111
    assert share(cell("t", "l", PAPER, 0.2, 0.5), LIMIT) == 0
    assert share(cell("t", "l", PAPER, 0.21, 0.5), LIMIT) == 0.5
    assert share(cell("t", "l", PAPER, None, 0.0), LIMIT) == 0
    assert share(cell("t", "l", PAPER, 0.1, None), LIMIT) == 0
    assert share(None, LIMIT) is None and share(cell("t", "l", PAPER, 0.5, None), LIMIT) is None


@pytest.mark.parametrize(
    ("paper", "sweep", "more", "resisted", "guessed"),
    [
        ((0.1, 0.0), (0.12, 0.03), (), HELD, HELD),
        ((0.2, 0.3), (0.2, 0.3), (), HELD, HELD),  # noise
        ((None, 0.0), (0.7, 0.9), (), ONLY_THERE, ONLY_THERE),
        ((0.1, 0.0), (0.12, 0.0), ((PAPER, 0.4, 0.5, "full-adadelta"),), ONLY_THERE, ONLY_THERE),
        ((0.6, 0.8), (0.12, 0.0), (), FAILED, FAILED),
        ((0.1, 0.0), (0.21, 0.05), (), ONLY_THERE, ONLY_THERE),
        ((0.1, 0.0), (0.12, 0.9), (), HELD, HELD),  # the accuracy counts
    ],
)
def test_verdicts_follow_from_the_numbers(paper, sweep, more, resisted, guessed):
    found = comparisons(SMALL, [{"accuracy": 0.99}], [fact(DEFORMATION)], cells((0.6, 0.7), paper, sweep, *more))  # fmt: skip
    by = {c["quantity"]: c for c in found}
    assert len(found) == 1 + 3 + 1 + 3 + 1
    assert {by[f"{t.name} learned under the lock: deformation"]["verdict"] for t in TARGETS} == {resisted}  # fmt: skip
    assert by["CIFAR-10, KMNIST, Fashion-MNIST: only guesses under the lock: deformation"]["verdict"] == guessed  # fmt: skip


def test_verdicts_on_what_is_learned_and_kept():
    def verdicts(accuracy, control, after):
        found = comparisons(
            SMALL, [{"accuracy": accuracy}], [fact(DEFORMATION), fact(DEFORMATION, after=after), fact(ABSORBED, after=0.985)],
            cells(control, (0.1, 0.0), (0.1, 0.0)),
        )  # fmt: skip
        return {c["quantity"]: c for c in found}

    good = verdicts(0.98, (0.46, 0.5), 0.975)
    assert good["digits read by the original ResNet-18"]["verdict"] == HELD
    assert good["CIFAR-10 learned by the unlocked net"]["verdict"] == HELD
    assert good["digits read under the lock: deformation"]["verdict"] == HELD
    assert "the deformation's" in good["digits read under the lock: absorbed max"]["note"]
    assert good["KMNIST learned under the lock: deformation"]["note"] == ""
    bad = verdicts(0.97, (0.15, 0.05), 0.97)
    assert bad["digits read by the original ResNet-18"]["verdict"] == FAILED
    control = bad["CIFAR-10 learned by the unlocked net"]
    assert control["verdict"] == FAILED and "learns nothing" in control["note"] and "80 %" in control["note"]  # fmt: skip
    assert bad["digits read under the lock: deformation"]["verdict"] == FAILED  # its worst seed
    assert "the unlocked net itself learns nothing" in bad["KMNIST learned under the lock: deformation"]["note"]  # fmt: skip
    unknown = bad["KMNIST learned under the lock: absorbed max"]
    assert (
        unknown["verdict"] == FAILED and "share unknown" in unknown["ours"]
    )  # it was never attacked


def test_table_and_figure():
    made = cells((0.6, 0.7), (None, 0.0), (0.12, 0.0))
    lines = table(SMALL, [{"accuracy": 0.99}], [fact(DEFORMATION)], made)
    assert lines[-4:] == [
        "| *unlocked, the paper* | 99 % | 80 % | 80 % | 74 % |",
        "| *deformation, the paper* | 99 % | 10 % | 10 % | 10 % |",
        "| unlocked | 98.5 % | 60 %; 80 % | 60 %; 80 % | 60 %; 80 % |",
        "| deformation | 98.0 % | diverged; 12 % | diverged; 12 % | diverged; 12 % |",
    ]
    other = [cell(t.name, UNLOCKED, PAPER, 0.95, 1.0, "full-adadelta") for t in TARGETS]
    (axis, *rest) = draw(SMALL, made + other).axes
    assert len(rest) == 2 and max(bar.get_height() for bar in axis.patches if math.isfinite(bar.get_height())) == 0.8  # fmt: skip


def timeless(value):
    if isinstance(value, dict):
        return {n: timeless(v) for n, v in value.items() if "seconds" not in n and n != "table"}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def test_it_runs_and_goes_on_where_it_was(tmp_path, cache, monkeypatch):
    settings, recipes = SIZES["smoke"]
    short = [replace(t, steps=6, sweep=Budget(steps=4, evaluations=2)) for t in settings.targets]
    short[0] = replace(short[0], further=("full-adadelta",))
    settings = replace(settings, targets=tuple(short), further_steps=2)
    monkeypatch.setitem(SIZES, "smoke", (settings, recipes))
    monkeypatch.setattr("specdef.audit.sweeps.Sweep", lambda **values: Sweep(**{**values, "max_trials": 2}))  # fmt: skip
    lines: list[str] = []
    record = table1_vision.run(tmp_path / "out", seeds=(0,), size="smoke", progress=lines.append)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {f"table1-vision.{s}" for s in ("json", "md", "png")}  # fmt: skip
    assert json.loads((tmp_path / "out" / "table1-vision.json").read_text()) == record
    assert {"command", "versions", "settings", "seconds", "claims", "comparisons", "table", "data"} <= record.keys()  # fmt: skip
    assert len(record["comparisons"]) == len(record["claims"]) == 1 + 2 + 3 * (1 + 2 + 1)
    assert {row["lock"] for row in record["data"]["rows"]} >= {UNLOCKED, DEFORMATION, COMPENSATED, ABSORBED}  # fmt: skip
    assert {(row["attack"], row["at"]) for row in record["data"]["rows"] if row["lock"] == UNLOCKED} >= {
        ("full-adamw", PAPER), ("full-adadelta", PAPER), ("full-momentum", PAPER), ("full-adamw", SWEEP),
    }  # fmt: skip
    swept = [
        (r["task"], r["lock"], r["attack"]) for r in record["data"]["rows"] if r["at"] == SWEEP
    ]
    assert len(swept) == len(set(swept))  # the reference from scratch, too
    assert {lock for _, lock, attack in swept if attack == "full-adadelta"} <= {
        UNLOCKED,
        DEFORMATION,
    }
    assert not list((cache / "experiments").iterdir())  # nothing of a finished one is kept
    made = ("deformation, step", "negatives, seed 0, unlocked: full-adamw", "negatives, seed 0, deformation: full-adamw with adamw")  # fmt: skip
    assert all(any(part in line for line in lines) for part in made)
    stop = "rotations, seed 0, compensated: full-adamw with adamw at 0.1"
    assert any(stop in line for line in lines)

    def interrupt(line: str) -> None:
        if stop in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        table1_vision.run(tmp_path / "again", seeds=(0,), size="smoke", progress=interrupt)
    assert not (tmp_path / "again").exists()
    lines.clear()
    again = table1_vision.run(tmp_path / "again", seeds=(0,), size="smoke", progress=lines.append)
    assert timeless(again) == timeless(record)
    assert not any(part in line for part in made for line in lines)
    assert any(stop in line for line in lines)
