"""`specdef reproduce`: an experiment is run by name, and its record, figure and verdicts come out."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from specdef.cli import reproduce


def fake(record: dict[str, Any], seen: dict[str, Any]) -> SimpleNamespace:
    """An experiment that takes no time."""

    def run(out: Path, *, seeds: Any, size: str, progress: Any) -> dict[str, Any]:
        seen.update(out=out, seeds=seeds, size=size)
        progress("working")
        out.mkdir(exist_ok=True)
        (out / "figure2.json").write_text("{}")
        (out / "figure2.png").write_bytes(b"")
        return record

    return SimpleNamespace(run=run)


RECORD = {
    "claims": [
        {"claim": "one.", "held": True, "numbers": {"n": 1}},
        {"claim": "two.", "held": False, "numbers": {"worst": float("inf")}},
    ],
    "seconds": 0.5,
}


def test_figure_1(run, tmp_path) -> None:
    result = run(
        "reproduce", "figure1", "--size", "smoke", "--seeds", 1, "--seed", 4, "--out", tmp_path / "out", "--json"
    )  # fmt: skip
    assert result.code == 0, result.err
    report = result.json
    assert report.keys() == {"experiment", "size", "seeds", "seconds", "held", "claims", "files"}
    assert (report["experiment"], report["size"], report["seeds"]) == ("figure1", "smoke", [4])
    assert report["held"] == sum(claim["held"] for claim in report["claims"]) > 0
    assert [Path(path).name for path in report["files"]] == [
        "figure1.json",
        "figure1.png",
        "figure1.md",
    ]
    assert (tmp_path / "out" / "figure1.png").read_bytes().startswith(b"\x89PNG")
    written = json.loads((tmp_path / "out" / "figure1.json").read_text())
    assert written["claims"] == report["claims"] and written["seeds"] == [4]
    text = (tmp_path / "out" / "figure1.md").read_text()
    for claim in report["claims"]:
        assert f"{'held' if claim['held'] else '**NOT held**'}: {claim['claim']}" in text
        assert f"{'held' if claim['held'] else 'NOT held'}: {claim['claim']}" in result.err


def test_options_reach_the_experiment(run, tmp_path, monkeypatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(reproduce.importlib, "import_module", lambda _: fake(RECORD, seen))
    result = run("reproduce", "figure2", "--seeds", 2, "--seed", 5, "--out", tmp_path / "a", "--json")  # fmt: skip
    assert seen == {"out": tmp_path / "a", "seeds": (5, 6), "size": "cpu"}
    assert result.code == 0  # a claim that does not hold is a result, not an error
    assert result.json["held"] == 1
    assert result.json["claims"][1]["numbers"]["worst"] is None
    assert "held: one.\n" in result.err and "NOT held: two.\n" in result.err
    result = run("reproduce", "figure2", "--out", tmp_path / "a")
    assert result.code == 2 and "already exists" in result.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["figure9"], "figure9"),
        (["figure1", "--data", "."], "figure1 reads no data sets"),
        ([], "xperiment"),
        (["figure1", "--size", "huge"], "huge"),
        (
            ["toy-locks", "--size", "full"],
            "--size full is for figure1, figure2, calibration, deformation",
        ),
        (["figure1", "--seeds", "0"], "--seeds must be at least 1"),
        (["calibration", "--seeds", "2"], "calibration takes one seed"),
        (["figure1", "--device", "meta"], "--device meta cannot be used"),
    ],
)
def test_mistakes(run, tmp_path, tree, arguments, message) -> None:
    result = run("reproduce", *arguments, "--out", tmp_path / "out")
    assert result.code == 2 and result.out == ""
    assert message in result.err
    assert not tree()


@pytest.mark.parametrize("below", ["", "deeper"])
def test_a_file_in_the_way_is_noticed_before_the_work(run, tmp_path, monkeypatch, below) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(reproduce.importlib, "import_module", lambda _: fake(RECORD, {}))
    result = run("reproduce", "figure1", "--out", tmp_path / "file" / below, "--json")
    assert result.code == 2 and "file: is no folder" in result.json["error"]
