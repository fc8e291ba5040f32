"""Two locks through the command line: put on one by one, checked, audited, and undone one by one."""

from __future__ import annotations

import json

import pytest
import torch

import specdef
from helpers import snapshot
from specdef.audit.grid import Sweep
from specdef.lock.stack import locks
from specdef.models.tiny import tiny_inputs

FAST = specdef.DeformationConfig(steps=3, optimizer="adamw", learning_rate=1e-3, max_utility_loss=None)  # fmt: skip
TINY = ("--batch-size", 8, "--num-batches", 2, "--eval-batches", 2, "--length", 8, "--steps", 2, "--evaluations", 2, "--seeds", 1)  # fmt: skip


@pytest.fixture(scope="module")
def deformed(ready, tmp_path_factory):
    """A deformed classifier and its key."""
    folder = tmp_path_factory.mktemp("deformed") / "deformed"
    inputs = [tiny_inputs("bert", seed=seed) for seed in range(3)]
    batches = [{**batch, "labels": torch.arange(len(batch["input_ids"])) % 3} for batch in inputs]
    certificate = specdef.lock_checkpoint(ready("bert"), folder, FAST, retain=batches)
    return folder, certificate.key


def test_there_and_back(run, ready, deformed, tmp_path):
    model, (folder, key) = ready("bert"), deformed
    before = snapshot(folder)
    report = run("inspect", folder, "--no-spectra", "--json").json
    assert report["plan"]["method"] == "absorbed"
    plan = run("lock", folder, tmp_path / "both", "--dry-run", "--json").json
    assert plan["dry_run"] and not list(tmp_path.iterdir())

    result = run("lock", folder, tmp_path / "both", "--key", tmp_path / "upper.key", "--json")
    assert result.code == 0 and result.json["outputs_identical"]
    assert result.json["below"]["method"] == "deformation"
    assert "Both keys are needed" in result.err

    checked = run("verify", tmp_path / "both", "--original", folder, "--key", tmp_path / "upper.key", "--json")  # fmt: skip
    assert checked.code == 0 and checked.json["bit_identical"] and checked.json["key_matches"]
    assert (checked.json["below"], checked.json["original_of"]) == ("deformation", "absorbed")
    assert "absorbed on top of deformation" in checked.err
    checked = run("verify", tmp_path / "both", "--original", model, "--dtype", "float32")
    assert checked.code == 0 and "the model that was locked by deformation" in checked.err
    assert "beneath the absorbed one" in checked.err

    wrong = run("unlock", tmp_path / "both", tmp_path / "out", "--key", key)
    assert wrong.code == 2 and "is on top of that" in wrong.err and "lock on top" in wrong.err
    assert not (tmp_path / "out").exists()
    one = run("unlock", tmp_path / "both", tmp_path / "a", "--key", tmp_path / "upper.key", "--json")  # fmt: skip
    assert one.code == 0 and one.json["still_locked"] == "deformation"
    assert "still locked, by deformation" in one.err
    assert snapshot(tmp_path / "a") == before == snapshot(folder)
    two = run("unlock", tmp_path / "a", tmp_path / "b", "--key", key)
    assert two.code == 0 and "still locked" not in two.err
    assert snapshot(tmp_path / "b") == snapshot(model)


def test_what_does_not_go_on_top(run, locked, deformed, tmp_path):
    """Each before any work: the reason, and what to do instead."""
    for source, options, said in (
        (locked.folder, ("--method", "deformation", "--retain", "sotu"), "put the absorbed lock on top"),
        (locked.folder, (), "lock the original with the scales"),
        (locked.folder, ("--method", "deformation", "--retain", "sotu", "--dry-run"), "put the absorbed lock on top"),
        (deformed[0], ("--method", "compensated"), "Put an absorbed lock on top"),
        (deformed[0], ("--method", "compensated", "--dry-run"), "Put an absorbed lock on top"),
    ):  # fmt: skip
        result = run("lock", source, tmp_path / "out", *options)
        assert result.code == 2 and "is locked already, by" in result.err and said in result.err
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("beneath", ["deformed", "model"])
def test_an_audit_of_both(run, ready, deformed, tmp_path, monkeypatch, beneath):
    """Beside what the lock on top was put on, and beside the model beneath both; with the key of the lock on top."""
    monkeypatch.setattr("specdef.audit.sweeps.Sweep", lambda **values: Sweep(**{**values, "max_trials": 3}))  # fmt: skip
    both, key = tmp_path / "both", tmp_path / "upper.key"
    specdef.lock_checkpoint(deformed[0], both, key_path=key)
    rows = [{"text": "abc"[i % 3] * (3 + i % 4), "label": i % 3} for i in range(64)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    original = {"deformed": deformed[0], "model": ready("bert")}[beneath]
    result = run(
        "audit", both, "--original", original, "--data", tmp_path / "a.jsonl", "--only", "rebalance,rebalance-clip,known-scale",
        *TINY, "--key", key, "--out", tmp_path / "audit", "--json", "--tiers", "5",
    )  # fmt: skip
    cells = {cell["attack"]: cell for cell in result.json["cells"]}
    assert set(cells) == {"rebalance", "rebalance-clip", "known-scale"}
    assert result.code in (0, 1, 3), result.err
    assert all(cell["status"] != "not applicable" for cell in cells.values()), cells
    assert [lock.method for lock in locks(specdef.load_model(both))] == ["deformation", "absorbed"]
