"""`specdef lock --search`: what it prints and writes, where it is kept when stopped, and what it refuses."""

from __future__ import annotations

import json

import pytest

from specdef.audit import design
from specdef.audit.design_records import DesignTrial
from specdef.cli import lock as verb
from specdef.cli.lock_search import trial_line
from specdef.lock.config import LockConfig
from specdef.models.tiny import tiny_inputs


@pytest.fixture
def text(monkeypatch):
    """Stand-in for a calibration text: four small batches, two for the channels and two for the attacks; one attack."""
    inputs = [tiny_inputs("llama", seed=i, batch=1, length=8) for i in (0, 1, 2, 2)]
    batches = [x | {"labels": x["input_ids"]} for x in inputs]
    monkeypatch.setattr(verb, "_calibration", lambda choice, *_: choice and batches)
    monkeypatch.setattr(design, "ATTACKS", ("only-norms",))
    return batches


@pytest.fixture
def measured(text, monkeypatch):
    """Leave out everything that trains; what a design leaves is what the test says. Returns the designs that were asked for."""
    asked: list[LockConfig] = []

    def measure(self, config, watch):
        asked.append(config)
        return {"only-norms": 0.5 if config.gap == 7 else 0.25}, ""

    monkeypatch.setattr(design._Bench, "run_controls", lambda self, *_: self.controls.update(a=()))
    monkeypatch.setattr(design._Bench, "forecast", lambda self, config: ())
    monkeypatch.setattr(design._Bench, "measure", measure)
    return asked


OPTIONS = ("--calibration", "builtin", "--search", "3", "--search-steps", "2")


def test_dry_run_shows_the_design_and_writes_nothing(run, tiny_folder, measured, tmp_path, tree):
    result = run("lock", tiny_folder("llama"), tmp_path / "out", *OPTIONS, "--dry-run", "--json")
    assert result.code == 0, result.err
    assert tree() == set()
    assert len(measured) == 3 and result.json["search"]["steps"] == 2
    assert (
        "search: 1/3 top 2^48, gap 7, slack 8, sides both, least-useful: only-norms 50.00% recovered; best 50.00%"
        in result.err
    )
    assert "3/3" in result.err and "left" in result.err
    assert any("The design was searched: 3 trials" in note for note in result.json["notes"])
    assert "note: The design was searched" in result.err and "nothing was written" in result.err


def test_the_lock_is_the_design_that_was_found(run, tiny_folder, measured, text, tmp_path, tree):
    import specdef

    result = run(
        "lock",
        tiny_folder("llama"),
        tmp_path / "out",
        *OPTIONS,
        "--gap",
        "7",
        "--json",
        "--no-check",
    )
    assert result.code == 0, result.err
    certificate = json.loads((tmp_path / "out" / "specdef_certificate.json").read_text())
    assert certificate["config"] == result.json["search"]["best"] == result.json["config"]
    assert certificate["config"]["gap"] != 7 and measured[0].gap == 7
    assert any(note.startswith("The design was searched") for note in certificate["notes"])
    assert "The design was searched" in (tmp_path / "out" / "README.md").read_text()
    assert not [name for name in tree() if "search" in name]
    # the channels are those of the search: chosen on the first half of the text
    config = LockConfig.from_dict(certificate["config"])
    model = specdef.load_model(tiny_folder("llama"))
    assert (
        specdef.lock_model(model, config, calibration=text[:2]).key.lock_id
        == certificate["lock_id"]
    )


def test_a_real_search(run, tiny_folder, text, tmp_path):
    options = (
        "--calibration",
        "builtin",
        "--search",
        "1",
        "--search-steps",
        "2",
        "--no-check",
        "--json",
    )
    result = run("lock", tiny_folder("llama"), tmp_path / "out", *options)
    assert result.code == 0, result.err
    assert result.json["search"]["recovered"]["only-norms"] < 0.1
    assert result.json["search"]["trials"][0]["config"] == LockConfig.preset("max").to_dict()
    assert result.json["search"]["forecast"][0]["part"] == "all"


def test_a_stopped_search_is_kept_and_gone_on_with(
    run, tiny_folder, measured, monkeypatch, tmp_path, tree
):
    whole = run(
        "lock", tiny_folder("llama"), tmp_path / "whole", *OPTIONS, "--json", "--no-check"
    ).json
    first = design._Bench.measure

    def stop(self, config, watch):
        if len(measured) == 5:
            raise KeyboardInterrupt
        return first(self, config, watch)

    monkeypatch.setattr(design._Bench, "measure", stop)
    result = run("lock", tiny_folder("llama"), tmp_path / "out", *OPTIONS)
    assert result.code == 130
    assert "out.search.journal" in result.err and "The same command goes on" in result.err
    assert "out.search.journal" in tree() and "out" not in tree()
    monkeypatch.setattr(design._Bench, "measure", first)
    again = run("lock", tiny_folder("llama"), tmp_path / "out", *OPTIONS, "--json", "--no-check")
    assert (
        again.json["search"]["best"] == whole["search"]["best"]
        and again.json["lock_id"] == whole["lock_id"]
    )
    assert len(measured) == 6  # two and one
    assert not [name for name in tree() if "search" in name]


@pytest.mark.parametrize(
    ("options", "said", "hint"),
    [
        (("--search", "2"), "it needs some", "--calibration"),
        (("--search", "2", "--strength", "convex", "--calibration", "builtin"), "covering", "--strength max"),
        (("--search", "0", "--calibration", "builtin"), "--search must be at least 1", ""),
        (("--search", "2", "--search-steps", "0", "--calibration", "builtin"), "--search-steps must be", ""),
        (("--search-steps", "2"), "an option of --search", "--search N"),
        (("--search", "2", "--method", "compensated"), "not an option of --method compensated", "absorbed"),
    ],
)  # fmt: skip
def test_what_cannot_be_searched_is_refused(
    run, tiny_folder, text, tmp_path, tree, options, said, hint
):
    result = run("lock", tiny_folder("llama"), tmp_path / "out", *options)
    assert result.code == 2 and said in result.err
    assert hint in result.err.rstrip().splitlines()[-1]
    assert tree() == set()


def test_a_taken_output_is_refused_before_the_search(run, tiny_folder, measured, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("")
    result = run("lock", tiny_folder("llama"), tmp_path / "out", *OPTIONS)
    assert result.code == 2 and "already exists" in result.err and not measured


def test_a_state_that_is_none_is_refused(run, tiny_folder, measured, tmp_path):
    (tmp_path / "out.search.journal").mkdir()
    result = run("lock", tiny_folder("llama"), tmp_path / "out", *OPTIONS)
    assert result.code == 2 and "out.search.journal" in result.err


def test_a_design_that_was_not_measured_says_why():
    trial = DesignTrial(number=0, config=LockConfig.preset("max"), reason="no room")
    progress = type("P", (), {"ended": 1, "trials": 2})
    assert trial_line(progress, trial, trial).endswith("not measured (no room); none so far")  # type: ignore[arg-type]
