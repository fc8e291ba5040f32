"""Further processes of an audit: they do its work, and leave with it."""

from __future__ import annotations

import multiprocessing
import os
import time

import optuna

import specdef
from specdef.attacks.full import FullTraining
from specdef.attacks.task import Budget
from specdef.audit.audit import audit
from specdef.audit.storage import open_storage
from specdef.cli.audit_workers import further_workers, load_audited
from specdef.cli.retain_data import RetainData

WAIT_SECONDS = 120


def test_another_process_does_the_same_work(ready, tmp_path):
    specdef.lock_checkpoint(ready("llama"), tmp_path / "locked")
    journal = tmp_path / "audit.journal"
    drawn = RetainData(retain="moby-dick", batch_size=2, num_batches=2, eval_batches=1, length=8)
    models = (tmp_path / "locked", ready("llama"), drawn, None, "cpu")
    options = {
        "attacks": [FullTraining(("sgd",), learning_rates=(1e-2, 1e-3, 1e-4), tier=2)], "budget": Budget(steps=2, evaluations=1),
        "seeds": 1, "tiers": (2,), "storage": journal, "suite": "2026.1-quick",
    }  # fmt: skip

    def workers(side: str) -> list[int]:
        """Return who ran the trials of one side, those that have ended."""
        if not journal.exists():
            return []
        studies = [
            s
            for s in optuna.get_all_study_summaries(open_storage(journal))
            if f"/{side}/" in s.study_name
        ]
        trials = [
            t
            for s in studies
            for t in optuna.load_study(
                study_name=s.study_name, storage=open_storage(journal)
            ).trials
        ]
        return [t.user_attrs["worker"]["pid"] for t in trials if t.state.is_finished()]

    with further_workers(2, models, options):
        until = time.monotonic() + WAIT_SECONDS
        while len(workers("control")) < 3 and time.monotonic() < until:
            time.sleep(0.5)
        ran = set(workers("control"))
    assert len(ran) == 1 and os.getpid() not in ran
    told = []
    report = audit(*load_audited(*models), progress=told.append, **options)
    assert report.cells and not any(p.side == "control" for p in told)


def test_one_worker_is_this_process(ready):
    with further_workers(1, (), {}):
        pass


def test_a_worker_that_fails_is_told(tmp_path, capsys):
    nothing = (tmp_path / "none", tmp_path / "none", RetainData(retain="sotu"), None, "cpu")
    with further_workers(2, nothing, {}):
        until = time.monotonic() + WAIT_SECONDS
        while multiprocessing.active_children() and time.monotonic() < until:
            time.sleep(0.2)
    assert "1 of 2 worker processes ended early" in capsys.readouterr().err
