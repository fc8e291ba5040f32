"""What the experiments of the papers share: verdicts, shares of the unlocked gain, kept state, pages, pictures."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

from specdef.attacks.task import Budget, Setting, Task
from specdef.data.pictures import picture_batches, read_pictures
from specdef.errors import SpecDefError
from specdef.experiments.kept import Clock, Kept
from specdef.experiments.lock_table import SCRATCH, UNLOCKED
from specdef.experiments.paper.conclude import conclude
from specdef.experiments.paper.locks import ABSORBED, COMPENSATED, DEFORMATION, Recipes, lock_all
from specdef.experiments.paper.results import TARGETS, read_records, results_table
from specdef.experiments.paper.runs import (
    PAPER,
    SWEEP,
    Case,
    Plan,
    Recipe,
    attack_case,
    summarise,
)
from specdef.experiments.paper.tables import attack_table, columns_of, draw_attacks, lock_table
from specdef.experiments.paper.verdicts import (
    FAILED,
    HELD,
    ONLY_THERE,
    claims_of,
    comparison,
    resistance,
)
from specdef.experiments.record import markdown
from specdef.lock.config import LockConfig
from specdef.lock.deformation.config import DeformationConfig


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPECDEF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_verdicts() -> None:
    assert resistance(0.0, 0.09) == HELD
    assert resistance(0.09, 0.1) == ONLY_THERE
    assert resistance(0.1, 0.0) == FAILED
    assert resistance(None, 0.0) == FAILED and resistance(0.0, math.nan) == ONLY_THERE
    with pytest.raises(ValueError, match="verdict must be"):
        comparison("x", paper="1", ours="2", verdict="maybe")
    entries = [
        comparison("a", paper="1", ours="2", verdict=HELD, n=3),
        comparison("b", paper="1", ours="2", verdict=ONLY_THERE),
    ]
    claims = claims_of(entries)
    assert [c["held"] for c in claims] == [True, False] and claims[0]["numbers"] == {"n": 3}
    assert claims[1]["claim"].endswith(f"({ONLY_THERE})")
    page = markdown("x", {"comparisons": entries, "claims": claims, "seconds": 1.0, "table": ["one", "| a |", "|---|", "two"]})  # fmt: skip
    assert "| b | 1 | 2 | only at the paper's learning rate |" in page
    assert "## Claims" not in page  # the comparisons say it already
    assert "one\n\n| a |\n|---|\n\ntwo\n" in page


def test_a_record_is_written_and_the_state_forgotten(cache, tmp_path) -> None:
    kept = Kept("x", 1)
    told: list[str] = []
    clock = Clock(kept, told.append)
    clock.say("one")
    first = clock.total()
    again = Clock(kept, None)
    again.say("two")
    assert told == ["one"] and again.total() > 0 and first > 0
    kept.file("seconds", ".txt").write_text("100.0")
    assert 100 < Clock(kept, None).total() < 200  # an interrupted run counts
    entry = comparison("a", paper="1", ours="2", verdict=HELD)
    record = conclude(
        tmp_path / "out", "table-x", kept, options={"seeds": (0,), "data": Path("/some/where")}, seconds=2.0, comparisons=[entry],
        table=["t"], settings={}, data={"n": 1}, figure=Figure(),
    )  # fmt: skip
    assert record["command"] == "specdef.experiments.table_x.run(out, seeds=(0,), data='DIR')"
    assert (
        record["claims"][0]["held"]
        and json.loads((tmp_path / "out" / "table-x.json").read_text()) == record
    )
    assert (tmp_path / "out" / "table-x.md").read_text() == markdown("table-x", record)
    assert not list((cache / "experiments").iterdir())


def row(lock: str, at: str, accuracy: float | None, seed: int = 0, loss: float = 1.0) -> dict:
    return {
        "model": "m", "task": "t", "seed": seed, "lock": lock, "attack": "full-adamw", "optimizer": "adamw", "at": at,
        "accuracy": accuracy, "loss": loss, "start_accuracy": 0.1, "start_loss": 2.0, "learning_rate": 0.1, "status": "diverged",
    }  # fmt: skip


def test_shares_are_of_the_best_the_unlocked_model_gains() -> None:
    rows = [
        row(UNLOCKED, PAPER, 0.3), row(UNLOCKED, SWEEP, 0.9), row("lock", PAPER, None), row("lock", SWEEP, 0.5),
        row(SCRATCH, SWEEP, 0.7),
    ]  # fmt: skip
    found = {(c["lock"], c["at"]): c for c in summarise(rows)}
    assert found[UNLOCKED, PAPER]["recovered"]["mean"] == pytest.approx(0.25)
    assert found["lock", SWEEP]["recovered"]["mean"] == pytest.approx(0.5)
    assert found["lock", PAPER]["recovered"]["mean"] == 0  # it diverged
    assert found["lock", PAPER]["accuracy"] is None
    losses = summarise([row(UNLOCKED, SWEEP, None, loss=1.0), row("lock", SWEEP, None, loss=1.75)], "loss")  # fmt: skip
    assert losses[1]["recovered"]["mean"] == pytest.approx(0.25)
    nothing = summarise([row(UNLOCKED, SWEEP, 0.1), row("lock", SWEEP, 0.5)])
    assert nothing[1]["recovered"] is None  # the control learned nothing: there is no share
    seeds = summarise([row(UNLOCKED, PAPER, 0.5), row(UNLOCKED, PAPER, 0.7, seed=1)])
    assert seeds[0]["accuracy"]["mean"] == pytest.approx(0.6) and len(seeds[0]["seeds"]) == 2
    assert columns_of(summarise(rows)) == [UNLOCKED, "lock", SCRATCH]
    lines = attack_table(summarise(rows))
    assert "| full-adamw at 0.1, paper's rate | 0.30 | diverged | – |" in lines
    assert "| full-adamw, best over the sweep | 0.90 (0.1) | 0.50 (0.1) | 0.70 (0.1) |" in lines
    assert (
        len(draw_attacks(summarise(rows), {("m", "t", UNLOCKED): 0.8}, chance={"t": 0.1}).axes) == 1
    )


def test_what_was_made_is_kept(cache) -> None:
    model = nn.Linear(2, 2)
    made = []

    def train(net: nn.Module) -> dict[str, float]:
        made.append(1)
        with torch.no_grad():
            net.weight.fill_(3.0)
        return {"seconds": 1.0, "bad": math.inf}

    for _ in range(2):
        kept = Kept("x", 1)
        fresh = nn.Linear(2, 2)
        assert kept.trained("a, b", fresh, train) == {"seconds": 1.0, "bad": None}
        assert bool((fresh.weight == 3).all()) and not fresh.training
        assert kept.once("n", lambda: len(made)) == 1
    assert len(made) == 1
    other = Kept("x", 2)
    assert other.once("n", lambda: 7) == 7
    kept.file("a, b").unlink()
    kept.trained("a, b", model, train)  # the facts alone are not the weights
    assert len(made) == 2
    kept.forget()
    assert [p.name for p in (cache / "experiments").iterdir()] == [other.path.name]


def net() -> nn.Sequential:
    generator = torch.Generator().manual_seed(0)
    made = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))  # fmt: skip
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.4, generator=generator)
    return made.eval()


def batches(seed: int, flip: bool = False) -> list:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(64, 6, generator=generator)
    y = (x[:, :3] * (-1 if flip else 1)).argmax(1)
    return list(zip(x.split(16), y.split(16), strict=True))


def test_locks_and_attacks_go_on_where_they_were(cache) -> None:
    plan = Plan(
        recipes=[Recipe(setting=Setting(learning_rate=0.05), budget=Budget(steps=8, evaluations=2))],
        sweeps=("full-sgd",), budget=Budget(steps=8, evaluations=2),
    )  # fmt: skip
    recipes = Recipes(deformation=DeformationConfig(steps=4, max_utility_loss=None), compensated=None, others={"uniform": LockConfig.preset("uniform")})  # fmt: skip
    said: list[str] = []

    def run(stop: str = "nothing stops it") -> tuple[list, list]:
        def say(line: str) -> None:
            said.append(line)
            if stop in line:
                raise KeyboardInterrupt

        kept = Kept("t", "s")
        locks, facts = lock_all(net(), recipes, retain=batches(0), heldout=batches(1), test=batches(2), kept=kept, name="n", say=say)  # fmt: skip
        case = Case(model="n", task=Task(name="flipped", train=batches(3, True), heldout=batches(4, True)), original=net(), locks=locks)  # fmt: skip
        return facts, attack_case(case, plan, kept, say)

    with pytest.raises(KeyboardInterrupt):
        run("uniform: full-adamw with adamw at 0.05")
    assert any("deformation, step" in line for line in said)
    said.clear()
    facts, rows = run()
    assert not any("deformation, step" in line or "unlocked: full-adamw" in line for line in said)
    assert {f["lock"] for f in facts} == {DEFORMATION, ABSORBED, "uniform"} and COMPENSATED not in {f["lock"] for f in facts}  # fmt: skip
    assert facts[0]["growth_max"] > 1 and facts[1]["loss_after"] == facts[1]["loss_before"]
    at = {(r["lock"], r["at"]) for r in rows}
    assert {(UNLOCKED, PAPER), (UNLOCKED, SWEEP), (ABSORBED, PAPER), (ABSORBED, SWEEP), (SCRATCH, SWEEP)} <= at  # fmt: skip
    timeless = [{n: v for n, v in fact.items() if n != "seconds"} for fact in facts]
    again, same = run()
    assert [{n: v for n, v in fact.items() if n != "seconds"} for fact in again] == timeless
    assert same == rows
    assert len(lock_table(facts)) == 3 + len(facts)
    assert all(r["start_loss"] > 0 for r in rows)


def jpeg(value: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (4, 4), (value, value, value)).save(stream, "JPEG")
    return stream.getvalue()


def test_pictures_in_one_file(tmp_path: Path) -> None:
    files = [jpeg(v) for v in (0, 100, 200)]
    np.savez(
        tmp_path / "packed.npz", data=np.frombuffer(b"".join(files), np.uint8), size=np.array([len(f) for f in files], np.uint16),
        label=np.array([3, 4, 5], np.uint8), train=np.array([True, False, True]),
    )  # fmt: skip
    x, y = read_pictures(tmp_path / "packed.npz", "train", 2, channels=3, side=8)
    assert x.shape == (2, 3, 8, 8) and x.dtype == torch.float32
    assert dict(zip(y.tolist(), x.amax((1, 2, 3)).mul(255).round().tolist(), strict=True)) == {3: 0.0, 5: 200.0}  # fmt: skip
    pixels = np.arange(10 * 16, dtype=np.uint8).reshape(10, 4, 4)
    np.savez(tmp_path / "plain.npz", images=pixels, labels=np.arange(10))
    x, y = read_pictures(tmp_path / "plain.npz", "test", 2, side=4)
    assert sorted(y.tolist()) == [8, 9]
    assert torch.equal(x[:, 0], torch.from_numpy(pixels[y.numpy()] / np.float32(255)))
    again = read_pictures(tmp_path / "plain.npz", "train", 8, seed=1, side=4)[1]
    assert sorted(again.tolist()) == list(range(8)) and not torch.equal(again, read_pictures(tmp_path / "plain.npz", "train", 8, seed=2, side=4)[1])  # fmt: skip
    parts = picture_batches(x, y, 2)
    assert len(parts) == 1 and parts[0]["labels"] is not None


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda p: None, "there is no such file"),
        (lambda p: p.write_bytes(b"PK\x03\x04 cut off"), "pictures cannot be read"),
        (lambda p: np.savez(p, images=np.zeros((2, 4, 4), np.uint8)), "pictures cannot be read"),
        (lambda p: np.savez(p, data=np.zeros(9, np.uint8), size=np.array([9]), label=np.array([0])), "pictures cannot be read"),
        (lambda p: np.savez(p, images=np.zeros((2, 4, 4), np.uint8), labels=np.zeros(2)), "pictures of the split train; 5 were asked for"),
        (lambda p: np.savez(p, images=np.array([{}], dtype=object), labels=np.zeros(1)), "pictures cannot be read"),
    ],
)  # fmt: skip
def test_pictures_that_cannot_be_read(tmp_path: Path, write, message) -> None:
    path = tmp_path / "x.npz"
    write(path)
    rows = 5 if "asked" in message else 1
    with pytest.raises(SpecDefError, match=message) as caught:
        read_pictures(path, "train", rows)
    assert caught.value.hint and str(path) in str(caught.value)


def test_splits_have_two_names(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="train or test"):
        read_pictures(tmp_path / "x.npz", "dev", 1)


def test_readme_has_the_records_numbers() -> None:
    root = Path(__file__).parent.parent
    lines = results_table(read_records(root / "docs" / "results"))
    readme = (root / "README.md").read_text(encoding="utf-8")
    assert "\n".join(lines) in readme
    for name in TARGETS:
        record = json.loads((root / "docs" / "results" / f"{name}.json").read_text())
        assert (root / "docs" / "results" / f"{name}.md").read_text() == markdown(name, record)
