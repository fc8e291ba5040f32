"""`specdef audit`: what it writes and ends with, that it goes on where it was, and that mistakes leave nothing behind."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace

import pytest

import specdef
from specdef.attacks.optimizers import OPTIMIZERS
from specdef.attacks.registry import ATTACKS
from specdef.attacks.task import Budget
from specdef.audit.suite import SUITES
from specdef.audit.sweeps import Progress
from specdef.cli import audit as verb
from specdef.cli.audit_plan import AROUND, SEARCH, parse_tiers
from specdef.cli.audit_progress import describe, time_left

CELL = {"attack", "tier", "optimizer", "learning_rate", "steps", "locked", "control", "recovered", "slowdown", "status", "flags"}  # fmt: skip
FILES = {"audit.html", "audit.md", "audit.json", "audit.journal"}
TINY = ("--batch-size", 8, "--num-batches", 2, "--eval-batches", 2, "--length", 8, "--steps", 2, "--evaluations", 2, "--seeds", 1)  # fmt: skip


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    """Texts that a classifier learns to tell apart in a few steps."""
    path = tmp_path_factory.mktemp("letters") / "letters.jsonl"
    rows = [{"text": "abc"[i % 3] * (3 + i % 4), "label": i % 3} for i in range(64)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def pair(ready, tmp_path_factory):
    """A tiny classifier and a locked form of it."""
    folder = tmp_path_factory.mktemp("audit") / "locked"
    specdef.lock_checkpoint(ready("bert"), folder)
    return ready("bert"), folder


@pytest.fixture
def short(monkeypatch):
    """Make searches short."""
    monkeypatch.setattr("specdef.audit.sweeps.Sweep", _few)


def _few(**values):
    from specdef.audit.grid import Sweep

    return Sweep(**{**values, "max_trials": 3})


def arguments(pair, letters, *more, only="full-adamw,only-head"):
    return ("audit", pair[1], "--original", pair[0], "--data", letters, "--only", only, *TINY, *more)  # fmt: skip


def test_an_audit_and_its_folder(run, pair, letters, short, tmp_path):
    out = tmp_path / "out"
    result = run(*arguments(pair, letters, "--out", out, "--json", "--steps", 12, "--storage", out / "s.journal"))  # fmt: skip
    report = result.json
    assert result.code == verb.exit_code(report)
    assert {path.name for path in out.iterdir()} >= FILES - {"audit.journal"} | {"s.journal"}
    assert report.keys() >= {"cells", "tiers", "verdict", "not_tested", "files", "about"}
    assert [c["attack"] for c in report["cells"]] == ["full-adamw", "full-adamw, clipped", "only-head"]  # fmt: skip
    for cell in report["cells"]:
        assert cell.keys() >= CELL
        assert cell["status"] == "pruned by tier" or cell["control"] > 0
    assert [tier["tier"] for tier in report["tiers"]] == [1, 2, 3, 4, 5, 6]
    written = json.loads((out / "audit.json").read_text())
    assert {n: v for n, v in written.items() if n != "curves"} == {n: v for n, v in report.items() if n != "files"}  # fmt: skip
    assert {curve["side"] for curve in written["curves"]} >= {"scratch", "control"}
    assert [run["trial"] for curve in written["curves"] for run in curve["runs"] if curve["side"] == "scratch"].count(0) == 1  # fmt: skip
    assert report["verdict"] in result.err and str(out / "audit.html") in result.err
    assert str(tmp_path) not in (out / "audit.html").read_text() + (out / "audit.json").read_text()


def test_what_is_not_locked_is_found_broken(run, pair, letters, short, tmp_path):
    out = tmp_path / "out"
    result = run("audit", pair[0], *arguments(pair, letters, "--out", out, "--json", "--steps", 16)[2:], "--retain", "sotu", "--only", "full-adamw")  # fmt: skip
    assert result.code == 2 and not out.exists()  # sotu has no labels
    result = run("audit", pair[0], *arguments(pair, letters, "--out", out, "--json", "--steps", 16)[2:], "--only", "full-adamw")  # fmt: skip
    report = result.json
    assert report["cells"][0]["status"] == "broken" and report["cells"][0]["recovered"] == 1.0
    assert result.code == 1
    assert "tier 2 (tuned training): broken" in result.err


def test_it_goes_on_where_it_was(run, pair, letters, short, tmp_path, monkeypatch):
    out = tmp_path / "out"
    call = arguments(pair, letters, "--out", out, "--json")
    from specdef.audit.sweeps import Sweeps

    tell, runs = Sweeps._tell, []

    def counted(self, entry, side, done):
        runs.append((entry.name, side, done.setting.learning_rate))
        if len(runs) == 4:
            raise KeyboardInterrupt
        tell(self, entry, side, done)

    monkeypatch.setattr(Sweeps, "_tell", counted)
    stopped = run(*call)
    assert stopped.code == 130 and "--resume" in stopped.err
    assert {path.name for path in out.iterdir()} <= {"audit.journal", "audit.journal.lock"}
    again = run(*call)
    assert again.code == 2 and "is there already" in again.json["error"]
    kept = runs[:3]
    finished = run(*call, "--resume")
    assert finished.code == verb.exit_code(finished.json)
    assert {path.name for path in out.iterdir()} >= FILES
    later = runs[4:]
    assert later and not set(kept) & set(later)
    runs[:] = [(), (), (), ()]
    assert run(*call, "--continue").json["cells"] == finished.json["cells"]
    assert len(runs) == 4  # nothing is run twice


def test_runs_in_another_precision(run, pair, letters, short, tmp_path):
    out = tmp_path / "out"
    result = run(*arguments(pair, letters, "--out", out, "--dtype", "float64", only="only-head"))
    report = json.loads((out / "audit.json").read_text())
    assert result.code == verb.exit_code(report)
    assert report["dtype"] == "float64" and "--dtype float64" in report["about"]["command"]
    assert {r["setting"]["dtype"] for curve in report["curves"] for r in curve["runs"]} == {"float64"}  # fmt: skip
    assert "float64" in (out / "audit.md").read_text()


def test_a_storage_that_fails_is_named(run, pair, letters, short, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("optuna.storages.journal.JournalFileBackend.append_logs", full)
    out = tmp_path / "out"
    result = run(*arguments(pair, letters, "--out", out))
    assert result.code == 2
    assert f"{out / 'audit.journal'} cannot be read or written: [Errno 28] No space" in result.err
    assert "--resume" in result.err


def test_pages_are_made_again_from_the_json(run, pair, letters, short, tmp_path):
    out, other = tmp_path / "out", tmp_path / "other"
    first = run(*arguments(pair, letters, "--out", out, only="only-head"))
    result = run("audit", "--report", out / "audit.json", "--out", other, "--json")
    assert result.code == 0 and len(result.json["files"]) == 3
    assert [line for line in result.err.splitlines() if line.startswith("tier")] == [
        line for line in first.err.splitlines() if line.startswith("tier")
    ]
    for name in FILES - {"audit.journal"}:
        assert (out / name).read_bytes() == (other / name).read_bytes()
    bad = run("audit", "--report", out / "audit.md")
    assert bad.code == 2 and "is no report of an audit" in bad.err


def test_list_names_everything(run):
    result = run("audit", "--list", "--json")
    assert result.code == 0
    values = result.json
    assert [a["name"] for a in values["attacks"]] == list(ATTACKS)
    assert {o["name"] for o in values["optimizers"]} == set(OPTIMIZERS)
    assert {s["name"] for s in values["suites"]} == set(SUITES)
    for attack in ATTACKS.values():
        line = next(line for line in result.err.splitlines() if line.split()[:1] == [attack.name])
        assert attack.summary in line and attack.source in line
    text = run("audit", "--list")
    assert (text.out, text.err) == ("", result.err)


def test_a_dry_run_writes_nothing(run, pair, letters, tmp_path, monkeypatch, tree):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments(pair, letters, "--dry-run", "--json", "--seeds", 2, only="recipe,full-muon,merge,known-scale"))  # fmt: skip
    assert result.code == 0
    assert not tree()
    values = result.json
    rows = {cell["attack"]: cell for cell in values["cells"]}
    assert list(rows) == ["recipe", "full-muon", "merge", "known-scale"]
    assert rows["recipe"]["runs"] == 2 * 2 * 2
    assert rows["full-muon"]["runs"] == sum(SEARCH.values()) + 2 * AROUND
    assert "no inserted layer" in rows["merge"]["reason"] and rows["merge"]["runs"] == 0
    assert rows["known-scale"]["reason"] == "no key was given"
    assert values["seconds"] > sum(cell["seconds"] for cell in values["cells"]) > 0
    assert values["step_seconds"] > 0
    assert "merge with adamw: does not apply: no inserted layer" in result.err
    once = run(*arguments(pair, letters, "--dry-run", "--json", only="recipe")).json
    assert math.isclose(once["cells"][0]["runs"], 4)


def test_a_key_and_optimizers(run, pair, letters):
    key = pair[1].with_name("locked.key.safetensors")
    call = arguments(pair, letters, "--dry-run", "--json", "--key", key, "--optimizers", "sgd,muon", only="recipe,full-sgd,rebalance")  # fmt: skip
    rows = [(c["attack"], c["optimizer"], c["reason"]) for c in run(*call).json["cells"]]
    assert rows == [
        ("full-sgd", "sgd", ""), ("rebalance", "sgd", ""), ("rebalance", "muon", ""), ("known-scale", "sgd", ""),
        ("known-scale", "muon", ""),
    ]  # fmt: skip
    assert ATTACKS["rebalance"].optimizers == ("adamw",)  # the registry keeps its own


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--only", "full-adamww"], "no attack is called 'full-adamww'; nearest: full-adam"),
        (["--tiers", "0"], "--tiers takes"),
        (["--tiers", "6"], "no attack is left: those chosen are of other tiers"),
        (["--dtype", "float16"], "float16"),
        (["--tiers", "5-2"], "--tiers takes"),
        (["--suite", "2025.9"], "no suite is called '2025.9'"),
        (["--optimizers", "sdg"], "no optimiser is called 'sdg'"),
        (["--optimizers", "muon", "--only", "full-sgd"], "no attack is left"),
        (["--steps", "0"], "steps must be at least 1"),
        (["--seconds", "0"], "--seconds must be positive"),
        (["--seeds", "0"], "--seeds must be at least 1"),
        (["--data", "none.csv"], "no such file or folder"),
        (["--num-batches", "99"], "were asked for"),
        (["--original", "none"], "does not exist"),
        (["--key", "none.safetensors"], "none.safetensors"),
        (["--storage", "nosql://host/name"], "address of the database"),
        (["--size", "tiny"], "tiny"),
        (["--workers", "0"], "--workers must be at least 1"),
        (["--budget", "soon"], "--budget takes STEPS"),
        (["--budget", "/"], "--budget takes STEPS"),
        (["--budget", "20"], "give one of them"),
    ],
)
def test_mistakes(run, pair, letters, tmp_path, monkeypatch, tree, changes, message):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments(pair, letters, "--out", tmp_path / "out"), *changes)
    assert result.code == 2
    assert message in result.err
    assert not tree()


def test_what_an_audit_needs(run, pair, ready, letters, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for call in (["audit"], ["audit", pair[1]], ["audit", pair[1], "--original", pair[0]]):
        result = run(*call)
        assert result.code == 2 and "--data DATA" in result.err
    same = run(*arguments(pair, letters, "--retain", letters))
    assert same.code == 2 and "--retain names the very data" in same.err
    other = run("audit", ready("llama"), "--original", pair[0], "--data", letters, *TINY)
    assert other.code == 2 and "the original for sequence-classification" in other.err
    shutil.copy(letters, tmp_path / "file")
    result = run(*arguments(pair, letters, "--out", tmp_path / "file"))
    assert result.code == 2 and "is no folder" in result.err


@pytest.mark.parametrize(
    ("statuses", "useless", "code"),
    [
        (["held at this budget", "not tested"], False, 0),
        (["held at this budget", "weakened"], False, 1),
        (["held at this budget", "broken"], False, 1),
        (["held at this budget"], True, 1),
        (["not tested", "not tested"], False, 3),
        ([], False, 3),
    ],
)
def test_exit_codes(statuses, useless, code):
    report = {"tiers": [{"status": status} for status in statuses], "useless": useless}
    assert verb.exit_code(report) == code


def test_a_budget_is_read():
    usual = Budget(steps=8, evaluations=4)
    assert verb._budget(usual, "20", None, None, None) == Budget(steps=20, evaluations=4)
    assert verb._budget(usual, "20/1.5", None, 2, None) == Budget(steps=20, evaluations=2, seconds=1.5)  # fmt: skip
    assert verb._budget(usual, "/60", 5, None, None) == Budget(steps=5, evaluations=4, seconds=60)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        verb._budget(usual, "0", None, None, None)


def test_tiers_are_read():
    assert parse_tiers("1-3,5,2") == (1, 2, 3, 5)


def test_the_command_of_a_report_names_no_one():
    import inspect

    given = {name: p.default for name, p in inspect.signature(verb.audit).parameters.items()}
    given |= {"locked": "/home/someone/my model", "tiers": "1-5", "keep_going": True, "json": True, "storage": "postgresql://me:word@host/name?x=word"}  # fmt: skip
    assert verb.command_line(given) == "specdef audit 'my model' --tiers 1-5 --keep-going --storage postgresql://host/name"  # fmt: skip


def test_progress_says_how_long_it_takes():
    progress = Progress(
        cell=2, cells=4, attack="lora", optimizer="adamw", side="locked", seed=1, learning_rate=1e-4, loss=2.5, status="diverged"
    )  # fmt: skip
    assert describe(progress) == "2/4 lora with adamw, locked, seed 1, rate 0.0001: loss 2.5 (diverged)"  # fmt: skip
    assert time_left(progress, 30.0) == "about 50 s left"
    first = replace(progress, cell=0, status="finished")
    assert (time_left(first, 30.0), describe(first)) == ("", "from-scratch reference, locked, seed 1, rate 0.0001: loss 2.5")  # fmt: skip
