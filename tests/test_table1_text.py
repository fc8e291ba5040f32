"""The text half of Table 1: the smoke run's record, and that an interrupted run goes on."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from specdef.experiments import table1_text
from specdef.experiments.lock_table import UNLOCKED
from specdef.experiments.paper.locks import DEFORMATION, LOCKS
from specdef.experiments.paper.runs import SWEEP
from specdef.experiments.record import markdown


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return the record of a smoke run and the folder of its files."""
    folder = tmp_path_factory.mktemp("table1_text")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPECDEF_CACHE", str(folder / "cache"))
        record = table1_text.run(folder / "out", seeds=(0,), size="smoke")
    return record, folder


def test_the_record(made):
    record, folder = made
    assert {"table1-text.json", "table1-text.png"} <= {
        path.name for path in (folder / "out").iterdir()
    }
    assert json.loads((folder / "out" / "table1-text.json").read_text()) == record
    assert not list((folder / "cache").rglob("table1-text*"))  # forgotten once it is written
    assert record["settings"]["made"] and str(folder) not in json.dumps(record)
    assert len(record["comparisons"]) == len(record["claims"])
    assert all(lock in str(record["comparisons"]) for lock in LOCKS)
    assert "## The paper's numbers beside ours" in markdown("table1-text", record)


def test_what_the_smoke_run_shows(made):
    own = {(o["model"], o["lock"]): o["f1"] for o in made[0]["data"]["own"]}
    assert min(own.values()) > 0.9
    shares = {
        (c["model"], c["lock"], c["at"]): c["recovered"]["mean"] for c in made[0]["data"]["cells"]
    }
    for model in ("tiny encoder", "tiny decoder"):
        assert shares[model, DEFORMATION, SWEEP] > 0.5  # four steps of it resist nothing
        assert max(share for (m, lock, at), share in shares.items() if (m, lock, at) == (model, UNLOCKED, SWEEP)) == 1  # fmt: skip


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
        "tiny encoder: deformation, step 2",
        "compensated: full-adamw with adamw at",
        "tiny decoder: MRPC",
        "tiny decoder, RTE, seed 0, absorbed max: full-adamw with adamw, locked",
    )
    for text in stops:
        with pytest.raises(Interrupted):
            table1_text.run(tmp_path, seeds=(0,), size="smoke", progress=until(text))
    assert not (tmp_path / "table1-text.json").exists()
    record = table1_text.run(tmp_path, seeds=(0,), size="smoke", progress=said.append)
    assert timeless(record) == timeless(made[0])
    assert record["seconds"] > 0
    stopped = Counter(line for line in said if any(text in line for text in stops))
    for line, times in Counter(line for line in said if "with adamw at" in line or "steps of AdamW" in line).items():  # fmt: skip
        assert times == 1 + (
            stopped[line] == 2
        )  # once more only where it was stopped before it began
    assert not list(cache.rglob("table1-text*"))


def timeless(value):
    """Leave out whatever is a time, and lines of tables that hold one."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if "seconds" not in k and k != "table"}
    return [timeless(v) for v in value] if isinstance(value, list) else value
