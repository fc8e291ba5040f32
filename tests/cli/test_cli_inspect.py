"""`specdef inspect`: tensors, spectra, sites and plan, of good and of odd folders."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import specdef


def rows(result):
    return {row["name"]: row for row in result.json["tensors"]}


def change(folder, **tensors):
    path = folder / "model.safetensors"
    save_file(load_file(path) | tensors, path, metadata={"format": "pt"})


def test_a_llama(run, locked):
    result = run("inspect", locked.source, "--json")
    assert result.code == 0
    report = result.json
    assert (report["model_type"], report["family"]) == ("llama", "llama")
    tensors = load_file(locked.source / "model.safetensors")
    assert rows(result).keys() == tensors.keys()
    assert report["bytes"] == sum(t.nbytes for t in tensors.values())
    for name, row in rows(result).items():
        tensor = tensors[name]
        assert (row["shape"], row["dtype"]) == (list(tensor.shape), "F32")
        if tensor.ndim == 2:
            values = torch.linalg.svdvals(tensor.double())
            assert row["sigma_max"] == pytest.approx(float(values[0]), rel=1e-4)
            assert row["stable_rank"] == pytest.approx(
                float(values.square().sum() / values[0] ** 2), rel=1e-3
            )
            assert row["condition"] == pytest.approx(float(values[0] / values[-1]), rel=1e-2)
            assert 0 <= row["residual"] < 1e-3 and row["method"]
        elif row["role"] == "norm":
            assert row["sigma_max"] == float(tensor.abs().max())
    kinds = [site["kind"] for site in report["sites"]]
    assert (kinds.count("norm"), kinds.count("value"), kinds.count("gated")) == (5, 2, 2)
    covered = {name for site in report["sites"] for name in site["covers"]}
    linear = {n for n, row in rows(result).items() if row["role"] in ("linear", "head")}
    assert covered | {item["tensor"] for item in report["uncovered"]} == linear
    plan = report["plan"]
    assert (plan["method"], plan["sites"]) == ("absorbed", 9)
    assert plan["bytes_read"] == plan["bytes_written"] == report["bytes"]
    assert plan["largest_tensor"] in tensors


def test_gelu_is_not_covered_and_says_why(run, tiny_folder):
    report = run("inspect", tiny_folder("gpt2"), "--no-spectra", "--json").json
    assert any(
        "gelu" in item["reason"] and "c_proj" in item["tensor"] for item in report["uncovered"]
    )


def test_gemma_says_what_is_left(run, tiny_folder):
    report = run("inspect", tiny_folder("gemma"), "--no-spectra", "--json").json
    assert {site["kind"] for site in report["sites"]} == {"offset-norm", "value", "gated"}
    assert any("1 + weight" in item["reason"] for item in report["uncovered"])


@pytest.mark.parametrize("family", ["gpt2", "resnet", "mixtral"])
def test_other_families(run, tiny_folder, family):
    result = run("inspect", tiny_folder(family), "--json")
    assert result.code == 0
    assert result.json["plan"]["sites"] > 0
    transposed = rows(result).get("transformer.h.0.attn.c_attn.weight")
    assert family != "gpt2" or transposed["sigma_max"] > 0


def test_without_spectra_only_headers_and_samples_are_read(run, locked, monkeypatch):
    monkeypatch.setattr(
        "specdef.cli.inspect.inspect_sites", lambda _: {"sites_error": "", "hint": ""}
    )
    monkeypatch.setattr("specdef.weights.checkpoint.Checkpoint.read", None)
    assert not any(
        "sigma_max" in row
        for row in rows(run("inspect", locked.source, "--no-spectra", "--json")).values()
    )


def test_selection_restricts_the_spectra(run, locked):
    result = run("inspect", locked.source, "--json", "--target-modules", "q_proj", "--layers", "1")
    assert [n for n, row in rows(result).items() if "sigma_max" in row] == [
        "model.layers.1.self_attn.q_proj.weight"
    ]


def test_shards(run, tiny_folder):
    result = run("inspect", tiny_folder("llama", shards=3), "--no-spectra", "--json")
    assert len(result.json["shards"]) > 1
    one = run("inspect", tiny_folder("llama"), "--no-spectra", "--json")
    assert rows(result) == rows(one)
    assert result.json["sites"] == one.json["sites"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name",
    ["model.layers.0.mlp.up_proj.weight", "model.norm.weight", "model.layers.1.mlp.up_proj.bias"],
)
def test_nan_is_reported(run, locked, copy, name, value):
    folder = copy(locked.source)
    tensor = load_file(folder / "model.safetensors")[name]
    tensor.view(-1)[0] = value
    change(folder, **{name: tensor})
    result = run("inspect", folder, "--json")
    assert result.code == 0
    assert [n for n, row in rows(result).items() if "problem" in row] == [name]
    assert "NaN or Inf" in rows(result)[name]["problem"] and "NaN or Inf" in result.err
    assert "sigma_max" not in rows(result)[name]


def test_zero_matrix(run, locked, copy):
    folder = copy(locked.source)
    name = "model.layers.0.mlp.up_proj.weight"
    change(folder, **{name: torch.zeros(48, 32)})
    result = run("inspect", folder, "--json")
    assert result.code == 0
    assert rows(result)[name]["sigma_max"] == 0


@pytest.mark.parametrize("model_type", ["mamba", None], ids=str)
def test_unknown_family_still_shows_its_tensors(run, locked, copy, model_type):
    folder = copy(locked.source)
    if model_type:
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    else:
        (folder / "config.json").unlink()
    result = run("inspect", folder, "--json")
    assert result.code == 0
    assert rows(result)["model.layers.0.mlp.up_proj.weight"]["sigma_max"] > 0
    assert result.json["plan"] is None and result.json["sites"] == []
    assert "No symmetry table" in result.json["sites_error"]
    assert "adding_a_family" in result.json["hint"] and "no lock plan" in result.err


def test_quantised_weights_are_shown_and_not_planned(run, locked, copy):
    folder = copy(locked.source)
    change(folder, **{"model.layers.0.mlp.up_proj.weight": torch.zeros(48, 32, dtype=torch.uint8)})
    result = run("inspect", folder, "--json")
    assert result.code == 0
    assert rows(result)["model.layers.0.mlp.up_proj.weight"]["dtype"] == "U8"
    assert result.json["plan"] is None and "quantised" in result.json["sites_error"]


@pytest.mark.parametrize("method", ["absorbed", "compensated"])
def test_a_locked_folder_is_shown_and_not_planned(run, locked, tmp_path, method):
    folder = locked.folder
    if method == "compensated":
        folder = tmp_path / "out"
        specdef.lock_checkpoint(
            locked.source, folder, specdef.LockConfig(method=method, scale=64, k=2)
        )
    report = run("inspect", folder, "--json").json
    assert report["plan"] is None and "locked already" in report["sites_error"]
    assert any(row.get("sigma_max", 0) > 1 for row in report["tensors"])
