"""`--json`: one object on stdout with the keys of the contract; what people read goes to stderr."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from specdef.weights.checkpoint import Checkpoint
from specdef.weights.folder import file_sha256

LOCK = {
    "method", "sites", "tensors_total", "tensors_changed", "sigma_max_before", "sigma_max_after", "seconds", "key",
    "certificate",
}  # fmt: skip
VERIFY = {"valid", "bit_identical", "max_abs_logit_difference", "dtype", "tensors_checked"}
UNLOCK = {"restored", "sha256_equal"}
INSPECT = {
    "model",
    "model_type",
    "bytes",
    "shards",
    "tensors",
    "family",
    "sites",
    "uncovered",
    "plan",
}

METHODS = {
    "absorbed": [],
    "compensated": ["--method", "compensated", "--scale", "100", "--k", "2"],
    "scaled": ["--method", "scaled", "--scale", "100", "--k", "2"],
}


@pytest.mark.parametrize("method", METHODS)
def test_lock_verify_unlock(run, tiny_folder, tmp_path, method):
    source, out, back = tiny_folder("llama"), tmp_path / "out", tmp_path / "back"
    result = run("lock", source, out, *METHODS[method], "--json")
    assert result.code == 0
    lock = result.json
    assert lock.keys() >= LOCK
    assert lock["method"] == method
    assert lock["tensors_total"] == len(Checkpoint.open(source).names)
    assert 0 < lock["tensors_changed"] <= lock["tensors_total"]
    assert lock["sigma_max_after"] > 10 * lock["sigma_max_before"] > 0
    assert {"name", "kind", "scale", "covers"} <= lock["sites"][0].keys()
    assert Path(lock["key"]).is_file()
    assert Path(lock["certificate"]) == out / "specdef_certificate.json"
    assert lock["key"] in result.err  # people are told where the key is, and to keep it
    if method == "absorbed":
        assert lock["output_difference"] == {"float32": 0.0, "bfloat16": 0.0}
        assert lock["outputs_identical"] is True

    result = run(
        "verify", out, "--original", source, "--key", lock["key"], "--dtype", "float32", "--json"
    )
    verify = result.json
    assert verify.keys() >= VERIFY
    assert (result.code, verify["valid"], verify["dtype"]) == (0, True, "float32")
    assert verify["tensors_checked"] == lock["tensors_total"]
    assert verify["bit_identical"] is (method == "absorbed")
    assert (verify["max_abs_logit_difference"] == 0.0) is (method == "absorbed")
    assert verify["key_matches"] is True

    result = run("unlock", out, back, "--key", lock["key"], "--json")
    assert result.code == 0
    assert result.json.keys() >= UNLOCK
    assert result.json["sha256_equal"] is True
    assert Path(result.json["restored"]) == back
    for path in source.iterdir():
        assert file_sha256(path) == file_sha256(back / path.name)


def test_verify_without_the_original_compares_nothing(run, locked):
    verify = run("verify", locked.folder, "--json").json
    assert verify["valid"] is True
    assert verify["bit_identical"] is verify["max_abs_logit_difference"] is verify["dtype"] is None


def test_without_json_stdout_stays_empty(run, locked, tmp_path):
    for arguments in (
        ["inspect", locked.source, "--no-spectra"],
        ["lock", locked.source, tmp_path / "out"],
        ["verify", locked.folder],
        ["unlock", locked.folder, tmp_path / "back", "--key", locked.key],
    ):
        result = run(*arguments)
        assert (result.code, result.out) == (0, "")
        assert result.err


def test_an_error_is_one_object_too(run, tmp_path):
    result = run("verify", tmp_path / "none", "--json")
    assert result.code == 2
    assert result.json.keys() == {"error", "type", "hint"}
    assert result.json["type"] == "CheckpointError"
    assert result.json["error"] in result.err


def test_the_locks_verdict_names_what_it_does_not_stop(run, locked, tmp_path):
    result = run("lock", locked.source, tmp_path / "out", "--no-check")
    assert "re-balancing" in result.err and "not encryption" in result.err
    assert "secure" not in result.err


def test_certificate_on_disk_holds_nothing_private(run, locked, tmp_path):
    lock = run("lock", locked.source, tmp_path / "out", "--json").json
    text = (tmp_path / "out" / "specdef_certificate.json").read_text()
    assert lock["key"] not in text
    assert json.loads(text)["sites"].keys() <= {
        "norm",
        "value",
        "gated",
    }  # counts; channels are the key's business
    assert 'channel":' not in text.replace('"channel": "least-useful"', "")


def test_seed_and_device_reach_unlock_and_inspect(run, locked, tmp_path):
    assert (
        run(
            "unlock",
            locked.folder,
            tmp_path / "a",
            "--key",
            locked.key,
            "--seed",
            "3",
            "--device",
            "cpu",
        ).code
        == 0
    )
    assert run("inspect", locked.source, "--no-spectra", "--seed", "3", "--device", "cpu").code == 0


def test_in_a_process_of_its_own(locked, tmp_path):
    """As a shell pipeline sees it: warnings and progress of every library stay off stdout."""
    command = [
        sys.executable,
        "-m",
        "specdef.cli.app",
        "lock",
        str(locked.source),
        str(tmp_path / "out"),
        "--no-check",
        "--json",
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout).keys() >= LOCK
    assert "locked" in done.stderr


def test_nan_in_outputs_is_null_and_a_finding(run, locked, tmp_path, monkeypatch):
    """JSON has no NaN; and a difference that is no number must not pass for none."""
    from specdef.lock.verify import OutputDifference

    def broken(_a: object, _b: object, dtype: str, **_: object) -> OutputDifference:
        return OutputDifference(
            dtype=dtype,
            bit_identical=False,
            max_abs_logit_difference=float("nan"),
            max_abs_logit=1.0,
        )

    monkeypatch.setattr("specdef.lock.verify.compare_outputs", broken)
    result = run("lock", locked.source, tmp_path / "out", "--json")
    assert result.code == 1
    assert result.json["outputs_identical"] is False
    assert "FINDING" in result.err
    result = run("verify", locked.folder, "--original", locked.source, "--json")
    assert result.code == 1
    assert result.json["max_abs_logit_difference"] is None


def test_bf16_checkpoint(run, tiny_folder, tmp_path):
    result = run("lock", tiny_folder("llama", torch.bfloat16), tmp_path / "out", "--json")
    assert result.json["output_difference"] == {"float32": 0.0, "bfloat16": 0.0}
