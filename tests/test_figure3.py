"""Figure 3: the smoke run's record, and that an interrupted run goes on."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from specdef.experiments import figure3
from specdef.experiments.figure3_report import RATES
from specdef.experiments.lock_table import UNLOCKED
from specdef.experiments.paper.locks import LOCKS
from specdef.experiments.paper.runs import PAPER, SWEEP
from specdef.experiments.record import markdown


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return the record of a smoke run and the folder of its files."""
    folder = tmp_path_factory.mktemp("figure3")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPECDEF_CACHE", str(folder / "cache"))
        record = figure3.run(folder / "out", seeds=(0,), size="smoke")
    return record, folder


def test_the_record(made):
    record, folder = made
    assert {"figure3.json", "figure3.png"} <= {path.name for path in (folder / "out").iterdir()}
    assert json.loads((folder / "out" / "figure3.json").read_text()) == record
    assert not list((folder / "cache").rglob("figure3*"))  # forgotten once it is written
    assert record["settings"]["made"] and str(folder) not in json.dumps(record)
    assert len(record["comparisons"]) == len(record["claims"])
    assert all(lock in str(record["comparisons"]) for lock in LOCKS)
    assert "## The paper's numbers beside ours" in markdown("figure3", record)


def test_every_rate_is_on_every_curve(made):
    points = made[0]["data"]["curves"]
    for lock in (UNLOCKED, *LOCKS):
        rates = [p["learning_rate"] for p in points if (p["lock"], p["at"]) == (lock, PAPER)]
        assert sorted(rates) == sorted(RATES)
        assert any((p["lock"], p["at"]) == (lock, SWEEP) for p in points)
    assert max(p["share"] for p in points if p["lock"] == UNLOCKED) == 1


class Interrupted(Exception):
    pass


def test_an_interrupted_run_goes_on(made, cache, tmp_path):
    said = []

    def until(text):
        def progress(line):
            said.append(line)
            if text in line:
                raise Interrupted

        return progress

    stops = (
        "tiny encoder: MRPC",
        "deformation, step 2",
        "compensated: full-adamw with adamw at 1e-05",
        "absorbed max: full-adamw with adamw, locked",
    )
    for text in stops:
        with pytest.raises(Interrupted):
            figure3.run(tmp_path, seeds=(0,), size="smoke", progress=until(text))
    assert not (tmp_path / "figure3.json").exists()
    record = figure3.run(tmp_path, seeds=(0,), size="smoke", progress=said.append)
    assert timeless(record) == timeless(made[0])
    assert record["seconds"] > 0
    stopped = Counter(line for line in said if any(text in line for text in stops))
    for line, times in Counter(line for line in said if "with adamw at" in line or "steps of AdamW" in line).items():  # fmt: skip
        assert times == 1 + (
            stopped[line] == 2
        )  # once more only where it was stopped before it began
    assert not list(cache.rglob("figure3*"))


def timeless(value):
    """Leave out whatever is a time, and lines of tables that hold one."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if "seconds" not in k and k != "table"}
    return [timeless(v) for v in value] if isinstance(value, list) else value
