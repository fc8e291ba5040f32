"""Preconditioners against the locks: the smoke run's record, resuming, and every function of the experiment with planted answers."""

from __future__ import annotations

import importlib.util
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from idx_files import idx_bytes
from specdef.attacks.optimizers import OPTIMIZERS
from specdef.attacks.optimizers.natural_gradient import ENTRIES, LARGEST, OUTPUTS
from specdef.errors import SpecDefError
from specdef.experiments import figure4, figure4_data
from specdef.experiments.figure4 import SIZES
from specdef.experiments.figure4_data import (
    CHANCE,
    FILE,
    balanced,
    batches_of,
    mnist_and_cifar,
    turned_digits,
)
from specdef.experiments.figure4_report import (
    FEW,
    best_of,
    best_of_few,
    comparisons,
    draw,
    find,
    from_chance,
    share,
)
from specdef.experiments.figure4_setup import (
    MODEL,
    PAPERS,
    RAISED,
    SCALE,
    TITLES,
    Group,
    fresh,
    pictures,
    task,
)
from specdef.experiments.figure4_train import train
from specdef.experiments.lock_table import SCRATCH, UNLOCKED
from specdef.experiments.paper.locks import ABSORBED, COMPENSATED, DEFORMATION, LOCKS
from specdef.experiments.paper.runs import PAPER, SWEEP, summarise
from specdef.experiments.paper.verdicts import FAILED, HELD, ONLY_THERE
from specdef.experiments.toy_locks_setup import compensated
from specdef.lock.sequential import sequential_sites

SMOKE = SIZES["smoke"]
TINY = replace(
    SMOKE, rows=320, epochs=1, lock_rows=160, heldout_rows=64,
    groups=(Group(steps=3, papers=("sgd",), sweeps=("adamw",), evaluations=1, each=20),),
)  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The smoke run: its record, its folder and what it told."""
    folder = tmp_path_factory.mktemp("figure4")
    told: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPECDEF_CACHE", str(folder / "cache"))
        record = figure4.run(folder / "out", size="smoke", seeds=(0,), progress=told.append)
    return record, folder, told


def test_the_record(made):
    record, folder, told = made
    assert {"figure4.json", "figure4.png"} <= {path.name for path in (folder / "out").iterdir()}
    assert json.loads((folder / "out" / "figure4.json").read_text()) == record
    assert not list((folder / "cache").rglob("figure4*"))  # forgotten once it is written
    # own task, each lock on it, each control, each of the paper's by lock, both others on all nets, K-FAC by lock
    assert len(record["comparisons"]) == len(record["claims"]) == 1 + 3 + 4 + 4 * 3 + 2 * 4 + 3
    assert str(folder) not in json.dumps(record)
    assert len(record["data"]["locks"]) == 3 and len(record["data"]["trainings"]) == 1
    places = {(row["optimizer"], row["lock"]) for row in record["data"]["rows"] if row["at"] == PAPER}  # fmt: skip
    assert places == {(name, lock) for name in PAPERS for lock in (UNLOCKED, *LOCKS)}
    assert any("deformation, step" in line for line in told)
    assert record["seconds"] > 0 and record["size"] == "smoke"


def test_the_smoke_net_is_swept_under_every_lock(made):
    cells = made[0]["data"]["cells"]
    for lock in (UNLOCKED, *LOCKS):
        assert find(cells, "adamw", SWEEP, lock) and find(cells, "kfac-relative", SWEEP, lock)
        assert find(cells, "natural-gradient", FEW, lock)
    assert find(cells, "adamw", SWEEP, UNLOCKED)["accuracy"]["mean"] > 1.5 * CHANCE


def without_seconds(value):
    if isinstance(value, dict):
        return {k: without_seconds(v) for k, v in value.items() if "seconds" not in k}
    return [without_seconds(v) for v in value] if isinstance(value, list) else value


def numbers(record):
    return without_seconds({k: record[k] for k in ("comparisons", "claims", "data", "settings")})


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setitem(SIZES, "smoke", TINY)
    monkeypatch.setenv("SPECDEF_CACHE", str(tmp_path / "whole"))
    whole = figure4.run(tmp_path / "a", size="smoke", seeds=(3,))
    monkeypatch.setenv("SPECDEF_CACHE", str(tmp_path / "parts"))
    told: list[str] = []

    def stop_at(end):
        def tell(line):
            told.append(line)
            if end in line:
                raise KeyboardInterrupt

        return tell

    for end in ("locking, absorbed", "full-adamw with adamw, control"):
        with pytest.raises(KeyboardInterrupt):
            figure4.run(tmp_path / "b", size="smoke", seeds=(3,), progress=stop_at(end))
        assert not (tmp_path / "b").exists()
    again = figure4.run(tmp_path / "b", size="smoke", seeds=(3,), progress=told.append)
    assert numbers(again) == numbers(whole)
    once = [line for line in told if "epoch" in line or "deformation, step" in line or "full-sgd" in line]  # fmt: skip
    assert (
        len(once) == len(set(once)) == 1 + 5 + 4
    )  # an epoch, steps of the deformation, runs at the paper's rate
    assert not list((tmp_path / "parts").rglob("figure4*"))


def test_nothing_is_done_where_data_or_a_library_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("SPECDEF_CACHE", str(tmp_path / "cache"))
    for data in (None, tmp_path):
        with pytest.raises(SpecDefError, match=FILE) as error:
            figure4.run(tmp_path / "out", size="cpu", data=data)
        assert "--data DIR" in error.value.hint
    known = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "heavyball" else known(name, *rest))  # fmt: skip
    with pytest.raises(SpecDefError, match="kron") as error:
        figure4.run(tmp_path / "out", size="smoke")
    assert "specdef[attacks]" in error.value.hint
    assert not (tmp_path / "out").exists() and not (tmp_path / "cache").exists()


@pytest.mark.parametrize("size", SIZES)
def test_sizes_fit_the_optimisers(size):
    settings = SIZES[size]
    net = fresh(settings, 0)
    raised = compensated(net, RAISED, SCALE)
    weights = [p.numel() for model in (net, raised) for p in model.parameters()]
    assert sum(p.numel() for p in raised.parameters()) <= LARGEST
    assert set(PAPERS) == {name for group in settings.groups for name in group.papers}
    assert len(list(sequential_sites(net))) == 4  # between the convolutions, and within the MLP
    for group in settings.groups:
        assert set(group.optimizers) <= set(TITLES) <= set(OPTIMIZERS)
        if "natural-gradient" in group.optimizers:
            outputs = group.batch_size * 10
            assert outputs <= OUTPUTS and outputs * max(weights) <= ENTRIES
    side = 8 if size == "smoke" else 28
    assert net(torch.zeros(2, 1, side, side)).shape == (2, 10)
    assert settings.lock_rows + settings.heldout_rows <= settings.rows


def planted_sets(folder):
    rng = np.random.default_rng(0)
    for split, count in (("train", 60), ("t10k", 30)):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        images[:, 0, 0] = np.arange(count)
        (folder / f"{split}-images-idx3-ubyte").write_bytes(idx_bytes(images))
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(idx_bytes(np.arange(count, dtype=np.uint8) % 10))  # fmt: skip
    images = rng.integers(0, 256, (200, 32, 32, 3), dtype=np.uint8)
    np.savez(folder / FILE, images=images, labels=np.arange(200) % 10, train=np.arange(200) < 100)


def test_pictures_are_drawn_standardised_and_keep_their_labels(tmp_path, monkeypatch):
    planted_sets(tmp_path)
    monkeypatch.setattr(figure4_data, "find_idx", lambda *_, **__: tmp_path)
    options = {"test_rows": 20, "new_rows": 64, "each": 7, "say": print}
    drawn = mnist_and_cifar(tmp_path, 1, rows=50, **options)
    assert drawn.own[0].shape == (50, 1, 28, 28) and drawn.own_test[0].shape == (20, 1, 28, 28)
    assert drawn.new[0].shape == (64, 1, 28, 28) and len(drawn.new_test[1]) == 91
    for x, _ in (drawn.own, drawn.new):
        assert abs(float(x.mean())) < 1e-5 and float(x.std()) == pytest.approx(1.0, abs=1e-5)
    corner, (lowest, _) = drawn.own[0][:, 0, 0, 0], drawn.own[0].aminmax()
    place = ((corner - lowest) / (drawn.own[0].max() - lowest) * 255).round().long()
    assert torch.equal(place % 10, drawn.own[1]) and len(place.unique()) == 50
    again = mnist_and_cifar(tmp_path, 1, rows=50, **options)
    other = mnist_and_cifar(tmp_path, 2, rows=50, **options)
    assert torch.equal(again.new[0], drawn.new[0]) and not torch.equal(other.own[0], drawn.own[0])
    with pytest.raises(SpecDefError, match="60 pictures of the split train; 61"):
        mnist_and_cifar(tmp_path, 1, rows=61, **options)


def test_turned_digits_have_the_next_label():
    drawn = turned_digits(0, rows=1280)
    assert len(drawn.own[1]) == 1280 and len(drawn.own_test[1]) == 517
    assert torch.equal(drawn.new[1], (drawn.own[1] + 1) % 10)
    torch.testing.assert_close(drawn.new[0], torch.rot90(drawn.own[0], 1, (2, 3)))


def test_balanced_keeps_the_first_of_every_class():
    y = torch.tensor([0, 0, 0, *range(1, 10), *range(10)])
    x = torch.arange(len(y)).float()
    kept, labels = balanced(x, y, 2)
    assert kept.tolist() == [0, 1, *range(3, 12), *range(13, 22)]
    assert torch.bincount(labels).tolist() == [2] * 10
    assert len(balanced(x, y, 1)[1]) == 10 and len(balanced(x, y, 9)[1]) == 20


def test_batches_and_tasks():
    assert [b[1].tolist() for b in batches_of((torch.zeros(5), torch.arange(5)), 2)] == [[0, 1], [2, 3], [4]]  # fmt: skip
    drawn = pictures(SMOKE, None, 0, print)
    group = Group(steps=3, batch_size=8, each=5, evaluations=4, papers=("kron",))
    made = task(SMOKE, drawn, group)
    assert made.name == "turned digits, 3 steps of 8"
    assert [len(batch[1]) for batch in made.train] == [8, 8, 8]
    assert torch.bincount(made.heldout[0][1]).tolist() == [5] * 10
    (recipe,) = group.recipes(swept=False)
    few = replace(group, few=(("sgd", (0.1, 0.2)),))
    assert [r.setting.learning_rate for r in few.recipes(swept=True)] == [0.001, 0.1, 0.2]
    assert few.recipes(swept=False) == (recipe,) and few.optimizers == ("kron", "sgd")
    assert recipe.setting == PAPERS["kron"] and recipe.attacker.name == "full-kron"
    assert recipe.budget.evaluations == 4 and group.budget.evaluations == 2


def test_training_learns_and_repeats_whatever_the_global_state():
    drawn = pictures(SMOKE, None, 0, print)
    batches, test = batches_of(drawn.own, 32), batches_of(drawn.own_test, 200)
    nets = []
    for state in (0, 1):
        torch.manual_seed(state)
        net, told = fresh(SMOKE, 5), []
        facts = train(net, batches, test, 2, 5, told.append)
        nets.append(net)
    assert facts["accuracy"] > 0.3 and [line[:7] for line in told] == ["epoch 1", "epoch 2"]
    assert all(map(torch.equal, nets[0].parameters(), nets[1].parameters()))


def test_compensation_of_convolutions():
    net = fresh(SMOKE, 0)
    before = [p.clone() for p in net.parameters()]
    state = torch.random.get_rng_state()
    raised = compensated(net, 2, 100.0)
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(map(torch.equal, before, net.parameters()))
    assert [type(layer) for layer in raised[:3]] == [nn.Conv2d, nn.Conv2d, nn.ReLU]
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(raised(x), net(x), rtol=1e-3, atol=1e-4)
    sigma = [torch.linalg.svdvals(layer.weight.detach().flatten(1)) for layer in (net[0], raised[0])]  # fmt: skip
    torch.testing.assert_close(sigma[1][:2], 100 * sigma[0][:2], rtol=1e-4, atol=0)
    assert all(p.requires_grad for p in raised.parameters())


def row(optimizer, at, lock, accuracy, *, seed=0, start=0.05, task="CIFAR-10, 4 steps of 32", status="finished"):  # fmt: skip
    return {
        "model": MODEL, "task": task, "attack": f"full-{optimizer}", "optimizer": optimizer, "at": at, "lock": lock, "seed": seed,
        "accuracy": accuracy, "loss": 1.0, "start_accuracy": start, "learning_rate": 0.1, "status": status,
        "curve": [[0, 9.0, start], [2, 2.0, None if accuracy is None else accuracy]],
    }  # fmt: skip


def planted(*, dead=()):
    """Rows of every optimiser: unlocked accuracy 0.5; under the locks chance, unless said otherwise; no control for `dead`."""
    rows = []
    for name in TITLES:
        for at in (PAPER, SWEEP) if name in PAPERS else (SWEEP,):
            rows.append(row(name, at, UNLOCKED, CHANCE if name in dead else 0.5))
            rows += [row(name, at, lock, CHANCE) for lock in LOCKS]
    return rows


def facts(after=0.985):
    return [
        {"lock": lock, "utility_before": 0.99, "utility_after": after, "model": MODEL, "seed": 0}
        for lock in LOCKS
    ]


SETTINGS = replace(SIZES["full"], groups=(Group(steps=4, papers=tuple(PAPERS), sweeps=tuple(TITLES)),))  # fmt: skip


def verdicts(rows, known=None):
    entries = comparisons(facts() if known is None else known, summarise(from_chance(rows)), SETTINGS)  # fmt: skip
    return {entry["quantity"]: entry for entry in entries}


def test_gains_count_from_chance():
    low, high, none = from_chance([row("sgd", PAPER, UNLOCKED, 0.3, start=s) for s in (0.05, 0.2, None)])  # fmt: skip
    assert (low["start_accuracy"], high["start_accuracy"], none["start_accuracy"]) == (0.1, 0.2, 0.1)  # fmt: skip
    cells = summarise(from_chance([row("sgd", PAPER, UNLOCKED, 0.5), row("sgd", PAPER, ABSORBED, 0.14)]))  # fmt: skip
    assert share(find(cells, "sgd", PAPER, ABSORBED)) == pytest.approx(0.1)
    assert find(cells, "sgd", SWEEP, ABSORBED) is None and share(None) is None


def test_few_rates_become_one_row():
    runs = [
        {**row("lbfgs", PAPER, lock, accuracy), "best_accuracy": best, "learning_rate": rate, "loss": loss, "seconds": 1.5, "steps": 4}
        for lock, accuracy, best, rate, loss in (
            (UNLOCKED, 0.2, 0.25, 0.05, 2.0), (UNLOCKED, 0.2, 0.2, 0.2, 1.9), (ABSORBED, None, 0.1, 0.2, None)
        )
    ]  # fmt: skip
    others = [row("lbfgs", SWEEP, UNLOCKED, 0.3), row("sgd", PAPER, UNLOCKED, 0.3)]
    group = Group(steps=4, papers=("sgd",), few=(("lbfgs", (0.05, 0.2)),))
    *same, free, held = best_of_few([*runs, *others], group)
    assert same == others
    assert (free["at"], free["accuracy"], free["learning_rate"], free["seconds"]) == (
        FEW,
        0.25,
        0.2,
        3.0,
    )
    assert [run[0] for run in free["runs"]] == [0.05, 0.2]
    assert (held["lock"], held["accuracy"]) == (ABSORBED, 0.1)
    cells = summarise(from_chance([free, held]))
    assert (
        best_of(cells, "lbfgs", ABSORBED)["at"] == FEW and best_of(cells, "sgd", ABSORBED) is None
    )
    assert best_of(summarise(from_chance([*others, free])), "lbfgs", UNLOCKED)["at"] == SWEEP


def test_a_seed_without_a_sweep_is_compared_with_the_sweeps_of_others():
    rows = [
        row("sgd", SWEEP, UNLOCKED, 0.5), row("sgd", PAPER, UNLOCKED, 0.2), row("sgd", PAPER, UNLOCKED, 0.2, seed=1),
        row("sgd", PAPER, DEFORMATION, 0.2, seed=1), row("sgd", PAPER, SCRATCH, 0.2, seed=1, task="another"),
    ]  # fmt: skip
    cells = summarise(from_chance(rows))
    assert share(find(cells, "sgd", PAPER, DEFORMATION)) == pytest.approx(0.25)
    assert find(cells, "sgd", PAPER, UNLOCKED)["recovered"]["values"] == pytest.approx([0.25, 0.25])
    own = summarise(from_chance(rows[2:4]))
    assert share(find(own, "sgd", PAPER, DEFORMATION)) == pytest.approx(1.0)


def test_all_claims_hold_where_only_the_unlocked_net_learns():
    entries = verdicts(planted())
    assert len(entries) == 1 + 3 + 4 + 4 * 3 + 2 * 4 + 2 * 3
    assert {entry["verdict"] for entry in entries.values()} == {HELD}
    assert all("not learn" not in e["note"] and "nothing is shown" not in e["note"] for e in entries.values())  # fmt: skip


@pytest.mark.parametrize(
    ("at_rate", "best", "verdict"),
    [(0.1, 0.5, ONLY_THERE), (0.3, 0.3, FAILED), (0.13, 0.13, HELD), (None, 0.1, HELD)],
)
def test_resistance_at_the_papers_rate_and_anywhere(at_rate, best, verdict):
    rows = planted()
    for entry in rows:
        if entry["optimizer"] == "xmat" and entry["lock"] == COMPENSATED:
            entry["accuracy"] = at_rate if entry["at"] == PAPER else best
    found = verdicts(rows)[f"XMat does not teach the {MODEL} CIFAR-10, {COMPENSATED}"]
    assert found["verdict"] == verdict and found["paper"].startswith("of its own lock")
    assert ("diverged" in found["ours"]) == (at_rate is None)
    expected = 0.0 if at_rate is None else (at_rate - CHANCE) / 0.4
    assert found["numbers"]["share_at_the_papers_rate"] == pytest.approx(expected)


def test_a_control_that_does_not_learn_is_told():
    entries = verdicts(planted(dead=("adamw", "natural-gradient")))
    control = entries[f"AdamW at 0.1 teaches the unlocked {MODEL} CIFAR-10"]
    assert control["verdict"] == FAILED and control["numbers"]["share_at_the_papers_rate"] == 0
    assert "does not learn here either: 0%" in entries[f"AdamW does not teach the {MODEL} CIFAR-10, {DEFORMATION}"]["note"]  # fmt: skip
    natural = entries[f"natural gradient teaches the unlocked {MODEL} CIFAR-10, so that it is the lock that stops it"]  # fmt: skip
    assert natural["verdict"] == FAILED and natural["note"] == "4 steps of 32"
    locked = entries[f"natural gradient is not effective, {ABSORBED}"]
    assert locked["verdict"] == HELD and "not effective here either: 0%" in locked["note"]


def test_a_share_that_rounds_to_nothing_has_no_sign():
    rows = planted()
    rows[1]["accuracy"] = CHANCE - 1e-4
    assert rows[1]["lock"] == LOCKS[0] and rows[1]["at"] == PAPER
    found = verdicts(rows)[f"SGD does not teach the {MODEL} CIFAR-10, {LOCKS[0]}"]
    assert found["ours"].startswith("0% of the gain")


def test_what_was_not_run_shows_nothing():
    rows = [r for r in planted() if not (r["optimizer"] in ("lbfgs", "sgd") and r["lock"] == ABSORBED and r["at"] == SWEEP)]  # fmt: skip
    entries = verdicts(rows)
    found = entries[f"L-BFGS is not effective, {ABSORBED}"]
    assert found["verdict"] == FAILED and "nothing is shown" in found["note"]
    assert found["ours"].startswith("not run")
    found = entries[f"SGD does not teach the {MODEL} CIFAR-10, {ABSORBED}"]
    assert found["verdict"] == ONLY_THERE and "nothing is shown" in found["note"]


@pytest.mark.parametrize(("after", "verdict"), [(0.981, HELD), (0.979, FAILED), (1.0, HELD)])
def test_utility_under_the_locks(after, verdict):
    found = verdicts(planted(), facts(after))[f"{MODEL} on its own task under the lock, {ABSORBED}"]
    assert found["verdict"] == verdict and found["ours"] == f"99.0% → {after:.1%}"
    assert found["numbers"]["largest_loss"] == pytest.approx(0.99 - after)


def test_the_figure_has_a_panel_for_every_optimiser_of_the_paper():
    rows = planted()
    rows[2]["curve"].append([3, None, None])
    rows[2]["status"] = "diverged"
    figure = draw(rows, summarise(from_chance(rows)), SETTINGS)
    *panels, bars = figure.axes
    assert [panel.get_title().split(",")[0] for panel in panels] == ["SGD at 0.1", "AdamW at 0.1", "Kron at 0.001", "XMat at 0.01"]  # fmt: skip
    lines = [len(panel.lines) for panel in panels]
    assert lines == [4 + 1 + 1, 5, 5, 5]  # chance, and where one diverged
    assert len(bars.patches) == len(TITLES) * 4
    heights = [patch.get_height() for patch in bars.patches]
    assert heights[: len(TITLES)] == [0.5] * len(TITLES) and not any(map(math.isnan, heights))
