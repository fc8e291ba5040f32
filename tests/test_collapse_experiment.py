"""The experiment of the quartic law runs, goes on where it was, and its planted part says what is planted."""

from __future__ import annotations

import json

import pytest

from specdef.cli import fragility_run
from specdef.data.cache import cache_dir
from specdef.experiments import collapse
from specdef.experiments.collapse_planted import planted_results
from specdef.experiments.collapse_report import claims, table

pytestmark = pytest.mark.usefixtures("cache")


def test_the_planted_law_is_found():
    said = {c["claim"]: c["held"] for c in claims(planted_results(3), [], []) if "Planted" in c["claim"]}  # fmt: skip
    assert len(said) == 4 and all(said.values())


def test_a_planted_exponent_that_is_off_is_no_claim_held():
    planted = planted_results(3)
    planted[0]["report"]["exponent"]["value"] = 3.8
    (law,) = [c for c in claims(planted, [], []) if "fourth power of time" in c["claim"]]
    assert not law["held"]


def test_smoke_goes_on_where_it_was(tmp_path, monkeypatch):
    made = []
    whole = fragility_run.fragility

    def counted(*arguments, **options):
        made.append((options["task_name"], options["subspace"] is not None))
        if len(made) == 3:
            raise KeyboardInterrupt
        return whole(*arguments, **options)

    monkeypatch.setattr(fragility_run, "fragility", counted)
    with pytest.raises(KeyboardInterrupt):
        collapse.run(tmp_path / "out", size="smoke")
    assert not (tmp_path / "out").exists()
    record = collapse.run(tmp_path / "out", size="smoke")
    # The second task of gradient descent takes the subspace of the first; what was made is not made again.
    assert made == [
        ("moby-dick", False), ("arithmetic", True), ("moby-dick", False), ("moby-dick", False), ("arithmetic", True),
    ]  # fmt: skip
    rows = record["data"]["runs"]
    assert [row["run"] for row in rows] == ["sgd"] * 2 + ["lora, sgd"] * 2
    assert all(row["observed"]["status"] == "completed" for row in rows)
    assert json.loads((tmp_path / "out" / "collapse.json").read_text())["data"]["runs"] == rows
    assert (tmp_path / "out" / "collapse.png").stat().st_size > 10_000
    text = table(rows, record["data"]["ranks"])
    assert sum(line.startswith(("| sgd", "| lora")) for line in text) == 4
    assert not list((cache_dir() / "experiments").glob("collapse-*"))
