"""`specdef spectrum`: the numbers are the operator's own, every kind of model runs, and mistakes cost no computation."""

from __future__ import annotations

import json

import pytest
import torch

from specdef.cli.analysis import DataOptions, load_workload, parse_columns
from specdef.cli.spectrum_report import group_by_block, make_operator

SMALL = ("--batch-size", 2, "--num-batches", 1, "--length", 8)
QUICK = (*SMALL, "--k", 2, "--num-probes", 2, "--num-steps", 10)
KEYS = {
    "model", "data", "task", "operator", "dtype", "num_parameters", "terms", "loss", "top", "blocks", "bounds", "density",
    "num_matvecs", "seconds", "files",
}  # fmt: skip


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert", "vit", "resnet"])
def test_every_kind_of_model(run, ready, data, family) -> None:
    result = run("spectrum", ready(family), "--data", data[family], *QUICK, "--tol", "0.1", "--no-blocks", "--json")  # fmt: skip
    assert result.code == 0, result.err
    report = result.json
    assert report.keys() == KEYS
    assert len(report["top"]) == 2
    assert abs(report["top"][0]["value"]) >= abs(report["top"][1]["value"]) > 0
    for row in report["top"]:
        assert sum(row["mass"].values()) == pytest.approx(1, abs=1e-4)
    assert report["density"]["trace_standard_error"] > 0


def test_numbers_are_those_of_the_matrix(run, ready, data, tmp_path) -> None:
    """Against the dense matrix of a few parameters of a real layer."""
    names = "transformer.ln_f,transformer.h.1.ln_1,transformer.h.1.ln_2"
    result = run(
        "spectrum", ready("gpt2"), "--data", "sotu", *SMALL, "--parameters", names, "--dtype", "float64",
        "--k", 3, "--num-probes", 10, "--num-steps", 60, "--tol", "1e-8", "--json", "--seed", 3,
    )  # fmt: skip
    report = result.json
    options = DataOptions(data="sotu", batch_size=2, num_batches=1, length=8, split=None, columns=None, task=None, seed=3)  # fmt: skip
    work = load_workload(ready("gpt2"), options, dtype="float64", device="cpu")
    H = make_operator("hessian", work, names.split(","), "float64")
    dense = H.to_dense()
    values, vectors = torch.linalg.eigh(dense)
    order = values.abs().argsort(descending=True)
    assert report["num_parameters"] == len(values) == 192
    found = torch.tensor([row["value"] for row in report["top"]], dtype=torch.float64)
    torch.testing.assert_close(found, values[order[:3]], rtol=1e-6, atol=0)
    first = vectors[:, order[0]].square()
    for block, members in group_by_block(H.slices).items():
        where = torch.cat([torch.arange(192)[H.slices[name]] for name in members])
        assert report["top"][0]["mass"][block] == pytest.approx(float(first[where].sum()), abs=1e-5)
        part = torch.linalg.eigvalsh(dense[where][:, where])
        largest = float(part[part.abs().argmax()])
        assert report["blocks"][block]["value"] == pytest.approx(largest, rel=1e-6)
        assert report["blocks"][block]["num_parameters"] == len(where)
    d = report["density"]
    assert abs(d["trace"] - float(dense.trace())) < 4 * d["trace_standard_error"] + 1e-9
    assert d["quantiles"]["0.01"] <= d["quantiles"]["0.5"] <= d["quantiles"]["0.99"]
    bound = report["bounds"][0]
    assert bound["value"] == max(abs(row["value"]) for row in report["blocks"].values())
    assert bound["tightness"] == pytest.approx(abs(found[0]) / bound["value"])
    assert bound["tightness"] >= 1 - 1e-9
    assert report["bounds"][1]["value"] is None
    assert "cross-entropy" in report["bounds"][1]["reason"]
    assert report["loss"] == pytest.approx(H.loss())


@pytest.mark.parametrize("operator", ["ggn", "fisher"])
def test_other_matrices_are_positive(run, ready, data, operator) -> None:
    report = run(
        "spectrum", ready("bert"), "--data", data["bert"], *QUICK, "--operator", operator, "--json"
    ).json
    assert report["operator"] == operator
    assert all(row["value"] > 0 for row in report["top"])
    assert all(row["value"] >= 0 for row in report["blocks"].values())


def test_files_and_the_human_text(run, ready, data, tmp_path, tree) -> None:
    out = tmp_path / "out"
    result = run("spectrum", ready("bert"), "--data", data["bert"], *QUICK, "--out", out, "--json")
    assert result.code == 0
    written = json.loads((out / "spectrum.json").read_text())
    assert written.keys() == KEYS | {"curves"}
    assert {k: v for k, v in written.items() if k != "curves"} == result.json
    assert result.json["files"] == [str(out / "spectrum.json"), str(out / "spectrum.png")]
    assert (out / "spectrum.png").read_bytes().startswith(b"\x89PNG")
    x, y = (torch.tensor(written["curves"]["linear"][key]) for key in ("eigenvalue", "density"))
    assert torch.trapezoid(y, x) == pytest.approx(1, abs=0.01)
    for text in ("classifier", "most of its vector lies in", "blocks on the diagonal", "trace"):
        assert text in result.err
    before = tree()
    again = run("spectrum", ready("bert"), "--data", data["bert"], *QUICK, "--out", out)
    assert again.code == 2 and "exists" in again.err and again.out == ""
    assert tree() == before


def test_without_density_and_blocks(run, ready, data, tmp_path) -> None:
    result = run(
        "spectrum", ready("bert"), "--data", data["bert"], *SMALL, "--k", 1, "--num-probes", 0, "--no-blocks",
        "--out", tmp_path / "out", "--json",
    )  # fmt: skip
    assert result.json["density"] is None
    assert [bound["name"] for bound in result.json["bounds"]] == ["weights"]
    assert (tmp_path / "out" / "spectrum.png").is_file()


def test_a_seed_repeats_the_numbers(run, ready, data) -> None:
    def numbers(seed: int) -> object:
        report = run(
            "spectrum", ready("bert"), "--data", data["bert"], *QUICK, "--no-blocks", "--seed", seed, "--json"
        ).json  # fmt: skip
        return report["top"], report["density"]

    assert numbers(1) == numbers(1) != numbers(2)


def test_what_has_not_converged_is_shown_and_exits_3(run, ready, data) -> None:
    result = run(
        "spectrum", ready("llama"), "--data", "sotu", *QUICK, "--max-matvecs", 3, "--no-blocks", "--json"
    )  # fmt: skip
    assert result.code == 3
    assert not result.json["top"][0]["converged"]
    assert "not converged" in result.err and "--max-matvecs" in result.err


def test_a_locked_model_has_the_larger_eigenvalue(run, ready, tmp_path) -> None:
    import specdef

    specdef.lock_checkpoint(ready("llama"), tmp_path / "locked", specdef.LockConfig(scale=2.0**10, min_scale=4.0))  # fmt: skip
    values = [
        abs(run("spectrum", folder, "--data", "sotu", *SMALL, "--k", 1, "--num-probes", 0, "--no-blocks", "--json").json["top"][0]["value"])
        for folder in (ready("llama"), tmp_path / "locked")
    ]  # fmt: skip
    assert values[1] > 100 * values[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "none.jsonl"], "no such file or folder"),
        (["--data", "a" * 300], "no such file or folder"),
        (["--data", "sotu", "--device", "meta"], "--device meta cannot be used"),
        (["--data", "sotu", "--max-matvecs", "0"], "--max-matvecs must be at least 1"),
        (["--data", "sotu", "--k", "0"], "--k must be at least 1"),
        (["--data", "sotu", "--num-steps", "0"], "--num-steps"),
        (["--data", "sotu", "--parameters", "mlp.nothing"], "no floating parameter fits"),
        (["--data", "sotu", "--columns", "text"], "--columns takes pairs"),
        (["--data", "sotu", "--columns", "text=body"], "no column 'body'"),
        (["--data", "sotu", "--split", "test"], "no split 'test'"),
        (["--data", "sotu", "--length", "1000"], "at most 64"),
        (["--data", "sotu", "--task", "image-classification"], "is no image-classification"),
        (["--data", "sotu", "--batch-size", "0"], "batch_size must be at least 1"),
        (["--data", "sotu", "--operator", "jacobian"], "jacobian"),
        ([], "--data"),
    ],
)
def test_mistakes(run, ready, tmp_path, tree, arguments, message) -> None:
    before = tree()
    result = run("spectrum", ready("llama"), *arguments, "--out", tmp_path / "out")
    assert result.code == 2
    assert message in result.err
    assert result.out == "" and tree() == before


def test_columns_are_pairs() -> None:
    assert parse_columns(None) == {}
    assert parse_columns("text=body, label=gold") == {"text": "body", "label": "gold"}
    for wrong in ("text", "=a", "text="):
        with pytest.raises(ValueError, match="pairs"):
            parse_columns(wrong)
