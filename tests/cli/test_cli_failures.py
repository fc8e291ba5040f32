"""Exit codes: 1 for a finding, 2 for bad input; each with one message and a hint, and nothing left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file


def damage(folder, *, tensor="model.norm.weight", value=None):
    """Change one number of one tensor, keeping everything else."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    flat = tensors[tensor].view(-1)
    flat[0] = flat[0] + 1 if value is None else value
    save_file(tensors, path, metadata={"format": "pt"})


def expect_bad_input(result, *words):
    """Check exit 2, the words, and that the last line of all says what to do next."""
    assert result.code == 2, result
    for word in words:
        assert word in result.err
    assert result.err.rstrip().splitlines()[-1].startswith("  -> "), result.err


# findings: exit 1


def test_tampered_tensor(run, locked, copy):
    folder = copy(locked.folder)
    damage(folder)
    result = run("verify", folder, "--json")
    assert result.code == 1
    assert result.json["valid"] is False
    assert result.json["problems"] == [
        "tensor model.norm.weight was changed since the model was locked"
    ]


def test_tampered_file(run, locked, copy):
    folder = copy(locked.folder)
    (folder / "config.json").write_text(
        (folder / "config.json").read_text().replace("silu", "relu")
    )
    result = run("verify", folder, "--json")
    assert result.code == 1
    assert "config.json" in result.json["problems"][0]


def test_tampered_certificate(run, locked, copy, tmp_path):
    folder = copy(locked.folder)
    path = folder / "specdef_certificate.json"
    path.write_text(path.read_text().replace('"absorbed"', '"scaled"', 1))
    assert run("verify", folder, "--json").json["valid"] is False
    result = run("unlock", folder, tmp_path / "back", "--key", locked.key)
    assert result.code == 1
    assert "  -> " in result.err and not (tmp_path / "back").exists()


def test_unlocking_changed_weights_is_refused(run, locked, copy, tmp_path, tree):
    folder = copy(locked.folder)
    damage(folder)
    before = tree()
    result = run("unlock", folder, tmp_path / "back", "--key", locked.key, "--json")
    assert result.code == 1
    assert result.json["type"] == "CertificateMismatch"
    assert tree() == before


def test_another_original(run, locked, tiny_folder):
    result = run(
        "verify",
        locked.folder,
        "--original",
        tiny_folder("llama", seed=1),
        "--dtype",
        "float32",
        "--json",
    )
    assert result.code == 1
    assert result.json["source_matches"] is result.json["bit_identical"] is False
    assert result.json["max_abs_logit_difference"] > 0


def test_another_key_is_a_finding_of_verify(run, locked, other_key):
    result = run("verify", locked.folder, "--key", other_key, "--json")
    assert (result.code, result.json["key_matches"]) == (1, False)


def test_a_lock_that_changes_outputs_is_a_finding(run, locked, tmp_path, monkeypatch):
    """What a wrong symmetry table would do: the producer of a channel is scaled and its readers are not."""
    from specdef.symmetries import Site

    monkeypatch.setattr(Site, "legs", lambda self: ((leg, 1) for leg in self.producers))
    result = run("lock", locked.source, tmp_path / "out", "--scale", "1024", "--json")
    assert result.code == 1
    assert result.json["outputs_identical"] is False
    assert result.json["output_difference"]["float32"] > 0
    assert "do not publish" in result.err
    assert (
        run("verify", tmp_path / "out", "--original", locked.source, "--dtype", "float32").code == 1
    )


# bad input: exit 2


@pytest.fixture(scope="session")
def other_key(tiny_folder, tmp_path_factory):
    import specdef

    folder = tmp_path_factory.mktemp("other")
    return specdef.lock_checkpoint(tiny_folder("qwen2"), folder / "out").key


def test_wrong_key(run, locked, other_key, tmp_path):
    result = run("unlock", locked.folder, tmp_path / "back", "--key", other_key)
    expect_bad_input(result, "the key is of lock")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("what", ["missing", "empty", "no key", "truncated"])
def test_damaged_key(run, locked, tmp_path, what, tree):
    key = tmp_path / "key.safetensors"
    if what == "empty":
        key.write_bytes(b"")
    if what == "no key":
        save_file({"a": torch.zeros(1)}, key)
    if what == "truncated":
        key.write_bytes(locked.key.read_bytes()[:-5])
    for arguments in (["unlock", locked.folder, tmp_path / "back"], ["verify", locked.folder]):
        expect_bad_input(run(*arguments, "--key", key), "key.safetensors")
    assert tree() <= {"key.safetensors"}


@pytest.mark.parametrize("verb", ["inspect", "lock", "verify", "unlock"])
def test_missing_model(run, tmp_path, verb):
    rest = {
        "lock": [tmp_path / "out"],
        "unlock": [tmp_path / "out", "--key", tmp_path / "key"],
    }.get(verb, [])
    expect_bad_input(run(verb, tmp_path / "none", *rest), "does not exist")
    assert not list(tmp_path.iterdir())


def test_empty_folder_and_pickled_weights(run, tmp_path, tree):
    (tmp_path / "m").mkdir()
    expect_bad_input(run("lock", tmp_path / "m", tmp_path / "out"), "no safetensors file")
    (tmp_path / "m" / "pytorch_model.bin").write_bytes(b"x")
    expect_bad_input(run("inspect", tmp_path / "m"), "pickled")
    assert tree() == {"m", "m/pytorch_model.bin"}


def test_a_file_is_no_folder(run, locked, tmp_path):
    expect_bad_input(
        run("lock", locked.source / "model.safetensors", tmp_path / "out"), "is not a folder"
    )


def test_a_model_without_certificate(run, locked, tmp_path):
    expect_bad_input(run("verify", locked.source), "has no specdef certificate")
    expect_bad_input(
        run("unlock", locked.source, tmp_path / "b", "--key", locked.key),
        "has no specdef certificate",
    )


def test_hub_id_without_network(tmp_path):
    """In a process of its own: the hub client reads its settings once."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    done = subprocess.run(
        [sys.executable, "-m", "specdef.cli.app", "lock", "nobody/nothing", str(tmp_path / "out"), "--json"],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert (
        "nobody/nothing: is no local folder, and the hub did not give it"
        in json.loads(done.stdout)["error"]
    )
    assert done.stderr.rstrip().splitlines()[-1].startswith("  -> Check the name and the network")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options", [[], ["--dry-run"], ["--method", "compensated", "--scale", "100", "--k", "2"]]
)
def test_existing_output(run, locked, tmp_path, options, tree):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    expect_bad_input(run("lock", locked.source, tmp_path / "out", *options), "already exists")
    expect_bad_input(
        run("unlock", locked.folder, tmp_path / "out", "--key", locked.key), "already exists"
    )
    assert tree() == {"out", "out/mine"}


def test_existing_key_of_another_lock(run, locked, other_key, copy, tmp_path, tree):
    key = tmp_path / "key.safetensors"
    key.write_bytes(Path(other_key).read_bytes())
    before = key.read_bytes()
    expect_bad_input(
        run("lock", locked.source, tmp_path / "out", "--key", key), "key of another lock"
    )
    assert key.read_bytes() == before
    assert tree() == {"key.safetensors"}


def test_key_inside_the_output(run, locked, tmp_path):
    expect_bad_input(
        run("lock", locked.source, tmp_path / "out", "--key", tmp_path / "out" / "k"), "inside"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
def test_locking_twice(run, locked, tmp_path, options):
    expect_bad_input(run("lock", locked.folder, tmp_path / "out", *options), "locked already")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", ["absorbed", "compensated"])
def test_nan_and_inf(run, locked, copy, tmp_path, method, value):
    folder = copy(locked.source)
    damage(folder, tensor="model.layers.0.mlp.up_proj.weight", value=value)
    result = run("lock", folder, tmp_path / "out", "--method", method, "--scale", "64")
    expect_bad_input(result, "NaN or Inf", "up_proj")
    assert {path.name for path in tmp_path.iterdir()} == {"copy"}


def test_unknown_family(run, locked, copy, tmp_path):
    folder = copy(locked.source)
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "lama"}
    (folder / "config.json").write_text(json.dumps(config))
    result = run("lock", folder, tmp_path / "out")
    expect_bad_input(result, "No symmetry table", "Closest: llama", "docs/adding_a_family.md")
    assert {path.name for path in tmp_path.iterdir()} == {"copy"}


def test_quantised(run, locked, copy, tmp_path):
    folder = copy(locked.source)
    config = json.loads((folder / "config.json").read_text()) | {
        "quantization_config": {"quant_method": "gptq"}
    }
    (folder / "config.json").write_text(json.dumps(config))
    expect_bad_input(run("lock", folder, tmp_path / "out"), "gptq", "float checkpoint")


def test_float16_has_no_room(run, tiny_folder, tmp_path):
    expect_bad_input(run("lock", tiny_folder("llama", torch.float16), tmp_path / "out"), "bfloat16")
    assert not list(tmp_path.iterdir())


def test_scale_that_breaks_the_function(run, tiny_folder, tmp_path):
    folder = tiny_folder("llama", torch.bfloat16)
    result = run(
        "lock", folder, tmp_path / "out", "--method", "compensated", "--scale", "1e4", "--k", "2"
    )
    expect_bad_input(result, "the largest scale that fits is about")
    assert not list(tmp_path.iterdir())


ARGUMENTS = {
    "not a power of two": ["--scale", "1000"],
    "below one": ["--scale", "0.5"],
    "not a number": ["--scale", "nan"],
    "no k": ["--method", "compensated", "--k", "0"],
    "layers as words": ["--layers", "first"],
    "layers backwards": ["--layers", "3-1"],
    "layers without end": ["--layers", "0-99999999999"],
    "storage": ["--storage-dtype", "float8"],
    "device": ["--device", "nonsense"],
    "expression": ["--target-modules", "(q_proj"],
}


@pytest.mark.parametrize("options", ARGUMENTS.values(), ids=ARGUMENTS)
def test_argument_mistakes(run, locked, tmp_path, options):
    expect_bad_input(run("lock", locked.source, tmp_path / "out", *options))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["float17", "", "int8", "nn"])
def test_verify_with_an_unknown_dtype(run, locked, dtype):
    expect_bad_input(
        run("verify", locked.folder, "--original", locked.source, "--dtype", dtype), "--dtype"
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_place(run, locked, tmp_path):
    tmp_path.chmod(0o500)
    try:
        expect_bad_input(run("lock", locked.source, tmp_path / "out"), "cannot be written")
    finally:
        tmp_path.chmod(0o700)


def test_place_below_a_file(run, locked, tmp_path, tree):
    (tmp_path / "file").write_text("")
    expect_bad_input(run("lock", locked.source, tmp_path / "file" / "out"))
    assert tree() == {"file"}


def test_outputs_that_cannot_be_compared(run, locked, copy, tmp_path):
    """The lock itself needs no architecture. By default the comparison is skipped; asked for, that is a finding."""
    folder = copy(locked.source)
    config = json.loads((folder / "config.json").read_text()) | {"architectures": ["NobodyKnows"]}
    (folder / "config.json").write_text(json.dumps(config))
    result = run("lock", folder, tmp_path / "out", "--json")
    assert result.code == 0
    assert result.json["outputs_identical"] is None
    assert "not compared" in result.err
    result = run("lock", folder, tmp_path / "checked", "--check")
    assert result.code == 1
    assert "NobodyKnows" in result.err and "FINDING: outputs could not be compared" in result.err
