"""The guard's table: its cut language model is the model, every guard runs, and the whole in its small size."""

from __future__ import annotations

import json
import math

import pytest
import torch

from specdef.curvature.losses import LMLoss
from specdef.experiments import fragility_guard as experiment
from specdef.experiments.fragility_guard_plot import tables
from specdef.experiments.fragility_guard_setup import (
    Digits,
    Language,
    LastBlocks,
    behind,
    digits_case,
    language_case,
)
from specdef.models.tiny import tiny_model


def test_the_last_blocks_give_the_model_s_logits():
    model, generator = tiny_model("llama"), torch.Generator().manual_seed(0)
    ids = torch.randint(4, 96, (3, 9), generator=generator)
    mask, labels = torch.ones_like(ids), ids.clone()
    mask[1, 7:], labels[1, 7:], labels[:, :4] = 0, -100, -100
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    for count in (1, 2):
        tail, made = LastBlocks(model, count), behind(model, count, batch)
        logits = tail(made["states"], made["attention_mask"], made["counted"])
        targets = LMLoss().targets(batch)
        whole = model(input_ids=ids, attention_mask=mask).logits
        kept = made["labels"] >= 0
        torch.testing.assert_close(logits[kept], whole[targets >= 0])
        assert torch.equal(made["labels"][kept], targets[targets >= 0])
        trained = {name.split(".")[2] for name, p in tail.named_parameters() if p.requires_grad}
        assert trained == {str(i) for i in range(count)}


def test_every_guard_runs_and_is_compared_at_equal_task_loss():
    case = digits_case(Digits(hidden=8, pretraining=40, aligned=40, kept=40, rows=256), 0)
    again = digits_case(Digits(hidden=8, pretraining=40, aligned=40, kept=40, rows=256), 0)
    start = [p.detach().clone() for p in case.model.parameters()]
    assert all(map(torch.equal, start, again.model.parameters()))
    plan = experiment.Plan(case=Digits(), rates={"sgd": 0.05, "adamw": 3e-3}, steps=8, interval=2, rank=4, every=4, strengths=(1.0, 1e30))  # fmt: skip
    said = []
    rows = experiment.compare(case, plan, 0, "cpu", said.append)
    assert all(map(torch.equal, start, case.model.parameters()))
    assert len(rows) == len(said) == 2 * (len(experiment.GUARDS) + 2)
    found = {(r["optimizer"], r["guard"], r["strength"]): r for r in rows}
    for optimizer in plan.rates:
        free = found[optimizer, experiment.NONE, None]
        assert free["curve"][0][2] == pytest.approx(0, abs=1e-12) and free["curve"][-1][2] > 1e-4
        assert [p[0] for p in free["curve"]] == [0, 2, 4, 6, 8]
        assert all(value > 0 for value in free["at"].values())
        assert found[optimizer, experiment.UPDATE, None]["drift"] < 1e-3
    # too strong a pull diverges under SGD: the curve ends, and no task loss is reached
    wild = found["sgd", experiment.EWC, 1e30]
    assert (
        len(wild["curve"]) < 5
        or not math.isfinite(wild["curve"][-1][1])
        or wild["at"]["0.75"] is None
    )
    lines = tables("mlp", rows, experiment.LEVELS)
    assert len(lines) == 3 + len(experiment.GUARDS) + 2
    assert {line.count("|") for line in lines[1:]} == {lines[1].count("|")}


def test_a_tiny_language_model_is_cut_and_drawn():
    case = language_case(Language(tiny=True, train=2, heldout=1, aligned=1, kept=1, batch_size=2, length=24, blocks=1), 0)  # fmt: skip
    assert [len(x) for x in (case.aligned, case.kept, case.task, case.heldout)] == [1, 1, 2, 1]
    for batch in [*case.aligned, *case.task]:
        assert batch["labels"].shape == batch["counted"].shape and (batch["labels"] >= 0).any()
    assert math.isfinite(float(experiment.mean_loss(case.model, case, case.task[0]).detach()))


@pytest.mark.slow
def test_the_small_size(tmp_path):
    record = experiment.run(tmp_path, seeds=(0,), size="smoke")
    stored = json.loads((tmp_path / "fragility-guard.json").read_text())
    assert stored["table"] == record["table"] and len(record["claims"]) == 16
    assert (tmp_path / "fragility-guard.png").read_bytes().startswith(b"\x89PNG")
    held = {c["claim"]: c["held"] for c in record["claims"]}
    assert [yes for text, yes in held.items() if "nothing drifts into M under SGD" in text] == [True, True]  # fmt: skip
