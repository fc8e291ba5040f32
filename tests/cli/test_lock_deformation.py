"""`specdef lock --method deformation` from end to end: what it writes, what it refuses, how it is interrupted and resumed."""

from __future__ import annotations

import json
import math
import shutil
import signal
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from specdef.cli import training_progress
from specdef.cli.retain_data import RetainData, recorded
from specdef.errors import SpecDefError
from specdef.lock.certificate import _digest, load_certificate
from specdef.lock.deformation.config import DeformationConfig
from specdef.lock.deformation.plot import draw
from specdef.models.tiny import tiny_model
from specdef.weights.folder import file_sha256

SMALL = ("--method", "deformation", "--batch-size", 2, "--num-batches", 4, "--eval-batches", 2)
FAST = ("--optimizer", "adam", "--learning-rate", "3e-3")
MEASURED = {"metric", "before", "after", "retain_loss_before", "retain_loss_after", "rows", "data"}
TRAINING = {"steps", "kept_step", "stopped", "reason", "seconds", "step_seconds", "spectral_seconds", "history"}  # fmt: skip


@pytest.fixture(scope="session")
def retain(tmp_path_factory):
    """Data by family: a text of many windows, and pictures that the tiny vit classifies without a mistake."""
    folder = tmp_path_factory.mktemp("retain")
    (folder / "a.txt").write_text("It is what it is, and it was what it was. " * 60)
    images = np.random.default_rng(0).standard_normal((64, 3, 16, 16), dtype=np.float32)
    with torch.no_grad():
        labels = tiny_model("vit").eval()(pixel_values=torch.from_numpy(images)).logits.argmax(-1)
    np.savez(folder / "own.npz", images=images, labels=labels.numpy())
    np.savez(folder / "a.npz", images=images, labels=np.arange(64) % 5)
    return {"llama": folder / "a.txt", "resnet": folder / "a.npz", "vit": folder / "own.npz"}


@pytest.fixture
def deform(run, ready, retain, tmp_path):
    """Return a function that locks a tiny model of a family into `out`."""

    def call(family, *options, out="out", data=None):
        length = ("--length", 16) if family == "llama" else ()
        return run(
            "lock", ready(family), tmp_path / out, *SMALL, *length, "--retain", data or retain[family], *options
        )  # fmt: skip

    return call


@pytest.mark.parametrize("family", ["llama", "resnet"])
def test_lock_verify_unlock(run, deform, ready, retain, tmp_path, family):
    result = deform(family, *FAST, "--steps", 12, "--max-utility-loss", "none", "--seed", 3, "--json")  # fmt: skip
    assert result.code == 0, result.err
    lock, out = result.json, tmp_path / "out"
    assert lock["method"] == "deformation" and lock["bit_identical"] is False
    assert lock["config"]["seed"] == 3 and lock["config"]["steps"] == 12
    assert lock["utility"].keys() == MEASURED and lock["training"].keys() == TRAINING
    assert (lock["training"]["steps"], lock["training"]["stopped"]) == (12, "finished")
    assert len(lock["training"]["history"]) == 13
    assert lock["outputs_identical"] is None
    assert {site["kind"] for site in lock["sites"]} == {"matrix"}
    assert max(site["scale"] for site in lock["sites"]) > 1
    assert lock["plot"] == str(tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.key.safetensors", "out.png"]  # fmt: skip
    for words in ("step 12/12", "held-out tokens" if family == "llama" else "held-out rows", "per step", lock["key"], "what this does not stop"):  # fmt: skip
        assert words in result.err
    published = load_certificate(out)
    data = published.utility["data"]
    assert data["retain"] == retain[family].name and str(tmp_path.parent) not in json.dumps(data)

    result = run("verify", out, "--original", ready(family), "--key", lock["key"], "--retain", retain[family], "--dtype", "float32", "--json")  # fmt: skip
    assert result.code == 0, result.err
    again = result.json
    assert again["source_matches"] and again["key_matches"] and again["utility"]["same_data"]
    assert again["utility"]["value"] == again["utility"]["recorded"] == lock["utility"]["after"]
    assert again["utility"]["loss"] == pytest.approx(lock["utility"]["retain_loss_after"])
    assert "recorded" in result.err

    assert run("unlock", out, tmp_path / "back", "--key", lock["key"]).code == 0
    name = "model.safetensors"
    assert file_sha256(tmp_path / "back" / name) == file_sha256(ready(family) / name)
    assert file_sha256(out / name) != file_sha256(ready(family) / name)


def test_the_dry_run_measures_and_writes_nothing(deform, tree, monkeypatch):
    result = deform("llama", "--dry-run", "--steps", 9, "--k", 2, "--retain-loss", "task+kl", "--json")  # fmt: skip
    assert result.code == 0, result.err
    plan = result.json
    assert plan["dry_run"] is True and tree() == set()
    assert sum(row["count"] for row in plan["matrices"]) * 2 == plan["singular_values"] == 30
    assert {"kind": "Linear", "shape": [96, 32], "count": 1} in plan["matrices"]
    assert (plan["steps"], plan["steps_per_epoch"], plan["evaluations"]) == (9, 4, 9)
    assert plan["utility"]["rows"] == 2 * 2 * 15 and plan["utility"]["loss"] > 0
    assert plan["memory_bytes"] > 0 and plan["seconds"] > 9 * plan["step_seconds"] > 0
    assert plan["sigma_max_before"] > 0
    assert all(words in result.err for words in ("Linear 96 x 32", "an estimate", "nothing was written"))  # fmt: skip
    # what a real run refuses, a dry run refuses too
    assert deform("llama", "--dry-run", "--k", 40).code == 2


def test_defaults_are_those_of_the_library(run, ready, retain, tmp_path):
    plan = run(
        "lock", ready("vit"), tmp_path / "out", "--method", "deformation", "--retain", retain["vit"], "--batch-size", 1,
        "--num-batches", 3, "--dry-run", "--json",
    ).json  # fmt: skip
    assert plan["config"] == DeformationConfig().to_dict()
    expected = RetainData(retain=retain["vit"].name, batch_size=1, num_batches=3)
    assert plan["data"] == expected.record()
    help_ = run("lock", "--help").out
    assert (
        "[default: 32]" in help_ and "[default: 100]" in help_
    )  # RetainData's batch_size, num_batches
    assert (RetainData(retain="a").batch_size, RetainData(retain="a").num_batches) == (32, 100)


def test_help_is_grouped(run):
    text = run("lock", "--help").out
    parts = [text.index(f"\n{name}:\n") for name in ("Arguments", "Options", "Deformation", "Retain data (deformation)")]  # fmt: skip
    assert parts == sorted(parts)
    assert text.index("--scale") < parts[2] < text.index("--retain-weight") < parts[3] < text.index("--retain <")  # fmt: skip


# how it ends


def test_targets(deform):
    lock = deform("vit", *FAST, "--steps", 200, "--target-growth", 1.02, "--retain-weight", 0.1, "--max-utility-loss", "none", "--json").json  # fmt: skip
    assert lock["training"]["stopped"] == "target" and lock["training"]["steps"] < 200
    assert 1.02 <= max(site["scale"] for site in lock["sites"]) < 1.2
    before = max(site["sigma_max_before"] for site in lock["sites"])
    other = deform("vit", *FAST, "--steps", 200, "--target-sigma-max", 1.02 * before, "--retain-weight", 0.1, "--max-utility-loss", "none", "--json", out="other").json  # fmt: skip
    assert other["training"]["stopped"] == "target"
    assert 1.02 * before <= other["sigma_max_after"] < 1.2 * before


def test_the_floor_ends_it_with_the_last_state_above(deform):
    options = ("--retain-weight", "1e-4", "--optimizer", "adam", "--learning-rate", "1e-2", "--steps", 30, "--eval-every", 1, "--json")  # fmt: skip
    lock = deform("vit", *options, "--max-utility-loss", 0.25, "--patience", 2).json
    training, utility = lock["training"], lock["utility"]
    assert utility["before"] == 1.0 and training["stopped"] == "utility"
    assert 0 < training["kept_step"] == training["steps"] - 2
    assert utility["after"] >= 0.75 > training["history"][-1]["utility"]
    free = deform("vit", *options, "--max-utility-loss", "none", out="free").json
    assert (free["training"]["steps"], free["training"]["stopped"]) == (30, "finished")
    assert min(row["utility"] for row in free["training"]["history"]) < 0.75


def test_where_nothing_may_be_kept_only_the_plot_of_the_attempt_is_written(deform, tree, tmp_path):
    options = ("--optimizer", "sgd", "--learning-rate", "1e8", "--steps", 8, "--json")
    for _ in range(2):  # another attempt replaces the picture
        result = deform("vit", *options)
        assert result.code == 3, result.err
        assert result.json["type"] == "NotConverged" and "learning rate" in result.json["hint"]
        assert tree() == {"out.attempt.png"}
        assert str(tmp_path / "out.attempt.png") in result.err


def test_interrupted_and_resumed(run, deform, tree, tmp_path, monkeypatch):
    options = (*FAST, "--steps", 10, "--max-utility-loss", "none", "--retain-loss", "task+kl")
    assert deform("llama", *options, out="whole").code == 0
    seen: list[int] = []

    def interrupt(self, progress):
        seen.append(progress.step)
        if progress.step == 4:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(training_progress._Lines, "training", interrupt)
        result = deform("llama", *options, "--json")
    state = tmp_path / "out.checkpoint.safetensors"
    assert result.code == 130 and seen[-1] == 4
    assert str(state) in result.json["error"] and "--resume" in result.json["hint"]
    assert "nothing was left behind" not in result.err
    assert state.exists() and not (tmp_path / "out").exists()

    again = deform("llama", *options)
    assert again.code == 2 and "--resume" in again.err
    other = deform("llama", *options, "--seed", 1, "--resume")
    assert other.code == 2 and "another run" in other.err
    assert deform("llama", *options, "--resume").code == 0
    assert not state.exists()
    for one, two in zip(*(sorted(load_file(tmp_path / name / "model.safetensors").items()) for name in ("out", "whole")), strict=True):  # fmt: skip
        assert one[0] == two[0] and torch.equal(one[1], two[1])
    assert deform("llama", *options, "--resume", out="fresh").code == 2  # nothing to resume


def test_places_can_be_named_and_are_not_overwritten(deform, tmp_path, tree):
    (tmp_path / "out.png").write_bytes(b"mine")
    taken = deform("vit", "--steps", 2)
    assert taken.code == 2 and "out.png: already exists" in taken.err
    lock = deform("vit", "--steps", 2, "--max-utility-loss", "none", "--plot", tmp_path / "p.png", "--key", tmp_path / "k", "--json")  # fmt: skip
    assert lock.code == 0, lock.err
    assert {"p.png", "k", "out", "out.png"} <= tree() and (tmp_path / "out.png").read_bytes() == b"mine"  # fmt: skip


# data


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--plot", "k", "--key", "k"), "at once"),
        (("--plot", "out.checkpoint.safetensors"), "at once"),
        (("--plot", "k.png", "--key", "k.attempt.png"), "at once"),
        (("--plot", "out/p.png"), "inside the locked folder"),
        (("--checkpoint", "s", "--key", "s"), "key and the state"),
    ],
)
def test_no_file_is_written_over_another(deform, tmp_path, tree, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    refused = deform("vit", "--steps", 2, "--max-utility-loss", "none", *options)
    assert refused.code == 2 and message in refused.err
    assert not tree()


def test_the_folder_it_is_called_in(run, ready, retain, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    lock = run("lock", ready("vit"), ".", *SMALL, "--retain", retain["vit"], *FAST, "--steps", 2, "--max-utility-loss", "none")  # fmt: skip
    assert lock.code == 0, lock.err
    assert (tmp_path / "here.png").exists() and (tmp_path / "here.key.safetensors").exists()


def test_a_forged_record_is_no_crash(run, deform, retain, tmp_path):
    assert deform("vit", *FAST, "--steps", 2, "--max-utility-loss", "none").code == 0
    path = tmp_path / "out/specdef_certificate.json"
    original = json.loads(path.read_text())
    original.pop("sha256")
    own = original["utility"]["data"]
    changes = [{"batch_size": "2"}, {"columns": 3}, {"split": 3}, {"task": 3}, {"length": None}, {"retain": 5, "seed": "x"}, {"heldout_split": []}]  # fmt: skip
    for change in (
        {"after": "high"}, {"after": math.nan}, {"metric": 4}, {"data": "retain, heldout"}, {"data": [1]}, *({"data": own | x} for x in changes),
    ):  # fmt: skip
        values = original | {"utility": original["utility"] | change}
        path.write_text(json.dumps(values | {"sha256": _digest(values)}))
        found = run("verify", tmp_path / "out", "--retain", retain["vit"])
        assert found.code == (0 if {"after", "metric"} & set(change) else 2), (change, found.err)


def test_held_out_data_of_its_own(run, deform, retain, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("Who goes there? Nobody goes there any more. " * 40)
    options = (*FAST, "--steps", 2, "--heldout", other, "--max-utility-loss", "none")
    lock = deform("llama", *options, "--json").json
    assert lock["utility"]["data"]["heldout"] == "other.txt"
    refused = run("verify", tmp_path / "out", "--retain", retain["llama"])
    assert refused.code == 2 and "--heldout DATA" in refused.err
    found = run("verify", tmp_path / "out", "--heldout", other, "--json")
    assert found.code == 0 and found.json["utility"]["same_data"] is True
    assert found.json["utility"]["value"] == lock["utility"]["after"]


def test_settings_of_verify_can_be_changed(run, deform, retain, tmp_path):
    assert deform("llama", *FAST, "--steps", 2, "--max-utility-loss", "none").code == 0
    found = run("verify", tmp_path / "out", "--retain", retain["llama"], "--eval-batches", 1, "--json")  # fmt: skip
    assert found.code == 0
    assert found.json["utility"]["same_data"] is False and found.json["utility"]["rows"] == 2 * 15
    alone = run("verify", tmp_path / "out", "--eval-batches", 1)
    assert alone.code == 2 and "--retain DATA" in alone.err


def test_verify_of_a_lock_without_utility(run, locked, retain):
    result = run("verify", locked.folder, "--retain", retain["llama"])
    assert result.code == 2 and "record no utility" in result.err


def test_a_split_serves_as_held_out_data(run, ready, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [{"text": "x" * (i + 2), "label": i % 3} for i in range(12)]
    for name, part in (("train", rows[:8]), ("test", rows[8:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    lock = run(
        "lock", ready("bert"), tmp_path / "out", "--method", "deformation", "--retain", folder, "--heldout-split", "test",
        "--batch-size", 4, "--num-batches", 2, "--eval-batches", 1, "--steps", 2, "--max-utility-loss", "none", "--json",
    )  # fmt: skip
    assert lock.code == 0, lock.err
    assert lock.json["utility"]["rows"] == 4
    found = run("verify", tmp_path / "out", "--retain", folder, "--json").json
    assert found["utility"]["same_data"] is True


def test_training_and_held_out_batches_do_not_overlap(ready, retain):
    from specdef.cli.task_model import load_task_model

    data = RetainData(retain=str(retain["resnet"]), batch_size=4, num_batches=12, eval_batches=4)
    loaded = load_task_model(ready("resnet"))
    train, held = data.training(loaded)
    assert (len(train), len(held)) == (12, 4)
    pictures = torch.cat([batch["pixel_values"] for batch in (*train, *held)]).flatten(1)
    assert len(torch.unique(pictures, dim=0)) == 64
    again = data.held(loaded)
    assert all(torch.equal(a["pixel_values"], b["pixel_values"]) for a, b in zip(held, again, strict=True))  # fmt: skip


@pytest.mark.parametrize(
    ("values", "given", "message"),
    [
        ({}, {"retain": "a"}, "does not say how"),
        (RetainData(retain="a").record() | {"batch_size": "many"}, {"retain": "a"}, "cannot be read"),
        (RetainData(retain="a", heldout="b").record(), {"retain": "a"}, "--heldout DATA"),
    ],
)  # fmt: skip
def test_a_certificate_that_does_not_say_what_was_measured(values, given, message):
    with pytest.raises(SpecDefError) as error:
        recorded(values, given)
    assert message in f"{error.value} {error.value.hint}"


# refused


WRONG = {
    "retain is missing": ((), "--retain train.jsonl"),
    "scale": (("--retain", "a.txt", "--scale", 4), "--scale: not an option of --method deformation"),
    "calibration": (("--retain", "a.txt", "--calibration", "builtin"), "--calibration"),
    "two of another method": (("--num-layers", 2, "--power", 8), "--num-layers, --power: not"),
    "floor": (("--retain", "a.txt", "--max-utility-loss", "little"), "--max-utility-loss takes"),
    "negative floor": (("--retain", "a.txt", "--max-utility-loss", "-1"), "max_utility_loss"),
    "alpha": (("--retain", "a.txt", "--retain-weight", 0), "retain_weight"),
    "optimizer": (("--retain", "a.txt", "--optimizer", "lion"), "lion"),
    "no batches": (("--retain", "a.txt", "--eval-batches", 0), "--eval-batches must"),
    "held out is trained on": (("--retain", "a.txt", "--heldout", "a.txt"), "very data"),
    "held out is trained on, by another name": (("--retain", "a.txt", "--heldout", "./a.txt"), "very data"),
    "held out is trained on, by its split": (("--retain", "a.txt", "--heldout-split", "train"), "very data"),
    "columns": (("--retain", "a.txt", "--columns", "text"), "--columns takes"),
    "no data": (("--retain", "none.csv"), "no such file or folder"),
    "too little": (("--retain", "a.txt", "--num-batches", 4000), "4000 to train on and 2 held out"),
}  # fmt: skip


@pytest.mark.parametrize(("options", "message"), WRONG.values(), ids=WRONG)
def test_mistakes(run, ready, retain, tmp_path, tree, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    shutil.copy(retain["llama"], tmp_path / "a.txt")
    before = tree()
    result = run("lock", ready("llama"), "out", *SMALL, "--length", 16, *options, "--json")
    assert result.code == 2, result.err
    assert message in result.err
    assert tree() == before


OTHERS = {
    "absorbed": (("--retain", "a.txt"), "--retain: not an option of --method absorbed"),
    "compensated": (("--epochs", 3), "--epochs"),
    "scaled": (("--plot", "p.png", "--resume"), "--plot, --resume"),
}


@pytest.mark.parametrize("method", OTHERS)
def test_options_of_a_deformation_beside_other_methods(run, ready, tmp_path, tree, method):
    options, message = OTHERS[method]
    result = run("lock", ready("llama"), tmp_path / "out", "--method", method, *options, "--json")
    assert result.code == 2 and message in result.json["error"]
    assert "--method deformation" in result.json["hint"]
    assert tree() == set()


def test_data_that_does_not_fit_the_model(run, ready, retain, tmp_path, tree, copy):
    def refused(folder, data, *options):
        before = tree()
        result = run("lock", folder, tmp_path / "out", *SMALL, "--retain", data, *options)
        assert result.code == 2 and "step" not in result.err, result.err
        assert tree() == before
        return result.err

    images = np.zeros((64, 3, 16, 16), dtype=np.float32)
    np.savez(tmp_path / "far.npz", images=images, labels=np.full(64, 7))
    assert "7" in refused(ready("resnet"), tmp_path / "far.npz")
    (tmp_path / "a.csv").write_text("body,gold\nx,1\n")
    assert "label" in refused(ready("bert"), tmp_path / "a.csv", "--columns", "text=body")
    folder = copy(ready("llama"))
    values = json.loads((folder / "tokenizer.json").read_text())
    values["model"]["vocab"]["i"] = 4000
    (folder / "tokenizer.json").write_text(json.dumps(values))
    assert "token 4000" in refused(folder, retain["llama"], "--length", 16)
    (folder / "tokenizer.json").unlink()
    assert "no tokenizer" in refused(folder, retain["llama"])


def test_options_from_toml(run, ready, retain, tmp_path):
    path = tmp_path / "l.toml"
    path.write_text(
        f'[lock]\nmethod = "deformation"\nretain = "{retain["vit"]}"\nbatch-size = 2\nnum-batches = 3\neval_batches = 1\n'
        'retain_weight = 0.75\nmax-utility-loss = 0.5\ntarget-modules = ["q_proj", "v_proj"]\nsteps = 5\n'
    )
    plan = run("lock", ready("vit"), tmp_path / "out", "--config", path, "--k", 3, "--dry-run", "--json").json  # fmt: skip
    assert plan["config"]["retain_weight"] == 0.75 and plan["config"]["max_utility_loss"] == 0.5
    assert (plan["steps"], plan["steps_per_epoch"], plan["singular_values"]) == (5, 3, 3 * 4)
    path.write_text(path.read_text() + "scale = 4\n")
    result = run("lock", ready("vit"), tmp_path / "out", "--config", path)
    assert result.code == 2 and "--scale: not an option" in result.err
    # of the command line, too, where the file names the method
    path.write_text('[lock]\nmethod = "compensated"\n')
    assert run("lock", ready("vit"), tmp_path / "out", "--config", path, "--retain", "a").code == 2


# what is shown


def test_lines_between_evaluations(deform, monkeypatch):
    monkeypatch.setattr(training_progress, "_LINE_SECONDS", 0.0)
    err = deform("vit", *FAST, "--steps", 4, "--eval-every", 2, "--max-utility-loss", "none").err
    lines = [line.split(":")[0].strip() for line in err.splitlines() if line.startswith("  step")]
    assert lines == ["step 1/4", "step 2/4, epoch 0.5", "step 3/4", "step 4/4, epoch 1"]


def test_a_bar_on_a_terminal(deform, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    result = deform("vit", *FAST, "--steps", 4, "--eval-every", 2, "--max-utility-loss", "none")
    assert result.code == 0
    assert "step 4/4, epoch 1" in result.err and "writing" in result.err


def test_the_plot_draws_what_is_not_finite_as_a_gap(tmp_path):
    row = {"train_loss": None, "retain_loss": 1.0, "utility": 0.5, "sigma_max": 1.0}
    history = [{"step": 0, **row}, {"step": 1, **row, "train_loss": 90.0}, {"step": 2, **row, "retain_loss": None}]  # fmt: skip
    draw(tmp_path / "a.png", history, kept_step=1, metric="accuracy", floor=0.4, target=3.0)
    draw(tmp_path / "b.png", history[:1], kept_step=0)
    pictures = [(tmp_path / name).read_bytes() for name in ("a.png", "b.png")]
    assert all(picture.startswith(b"\x89PNG") for picture in pictures) and len(set(pictures)) == 2


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.012, "0.012 s"), (42.0, "42 s"), (185.0, "3:05 min"), (7500.0, "2:05 h")]
)  # fmt: skip
def test_durations(seconds, text):
    assert training_progress.duration(seconds) == text
    assert math.isfinite(seconds)
