"""`--config file.toml`: defaults for a verb, below what stands on the command line."""

from __future__ import annotations

import pytest


@pytest.fixture
def toml(tmp_path):
    def write(text):
        (tmp_path / "file.toml").write_text(text)
        return tmp_path / "file.toml"

    return write


def dry_run(run, locked, tmp_path, *options):
    return run("lock", locked.source, tmp_path / "out", "--dry-run", "--json", *options)


@pytest.mark.parametrize(
    "text",
    [
        '[lock]\nmethod = "compensated"\nscale = 64.0\nk = 3\nlayers = "1"\n[verify]\ndtype = "float32"\n',
        'method = "compensated"\nscale = 64\nk = 3\nlayers = 1\n',
        '[lock]\nmethod = "compensated"\nscale = 64\nk = 3\nlayers = [1]\ntarget-modules = ["q_proj", "k_proj"]\n',
    ],
    ids=["table", "top level", "lists and hyphens"],
)
def test_values_are_taken_from_the_file(run, locked, tmp_path, toml, text):
    plan = dry_run(run, locked, tmp_path, "--config", toml(text)).json
    assert plan["method"] == "compensated"
    assert {(site["k"], site["scale"], site["layer"]) for site in plan["sites"]} == {(3, 64.0, 1)}
    if "target" in text:
        assert {site["name"].split(".")[-2] for site in plan["sites"]} == {"q_proj", "k_proj"}


@pytest.mark.parametrize("first", [True, False], ids=["config first", "config last"])
def test_the_command_line_wins(run, locked, tmp_path, toml, first):
    config = ["--config", toml('[lock]\nmethod = "compensated"\nscale = 64\nk = 3\n')]
    options = ["--k", "2"]
    plan = dry_run(run, locked, tmp_path, *(config + options if first else options + config)).json
    assert {(site["k"], site["scale"]) for site in plan["sites"]} == {(2, 64.0)}


def test_flags(run, locked, tmp_path, toml):
    config = toml(
        "[lock]\ndry_run = true\ncheck = false\njson = true\n[inspect]\nspectra = false\njson = true\n"
    )
    assert run("lock", locked.source, tmp_path / "out", "--config", config).json["dry_run"] is True
    assert not (tmp_path / "out").exists()
    assert not any(
        "sigma_max" in row
        for row in run("inspect", locked.source, "--config", config).json["tensors"]
    )


def test_a_table_of_another_verb_says_nothing(run, locked, tmp_path, toml):
    plan = dry_run(run, locked, tmp_path, "--config", toml('[verify]\ndtype = "float32"\n')).json
    assert plan["method"] == "absorbed"


BAD = {
    "no TOML": ("[lock\nscale = 2", "not valid TOML"),
    "unknown option": ("[lock]\nscales = 2", "no option 'scales'"),
    "unknown option at the top": ("scales = 2", "no option 'scales'"),
    "no table": ("lock = 3", "is no table"),
    "nested": ("[lock.scale]\nvalue = 2", "no option 'scale'"),
    "itself": ('[lock]\nconfig = "other.toml"', "no option 'config'"),
    "not UTF-8": (b"\xff\xfe", "not valid TOML"),
    "bad value": ("[lock]\nscale = 3", "power of two"),
}


@pytest.mark.parametrize(("text", "words"), BAD.values(), ids=BAD)
def test_damaged_files(run, locked, tmp_path, text, words):
    path = tmp_path / "file.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    result = run("lock", locked.source, tmp_path / "out", "--config", path)
    assert result.code == 2
    assert words in result.err
    assert result.err.rstrip().splitlines()[-1].startswith("  -> ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", ['k = "many"', 'method = "magic"'])
def test_values_of_the_wrong_kind(run, locked, tmp_path, toml, value):
    result = run("lock", locked.source, tmp_path / "out", "--config", toml(f"[lock]\n{value}\n"))
    assert result.code == 2
    assert not (tmp_path / "out").exists()


def test_missing_file(run, locked, tmp_path):
    result = run("lock", locked.source, tmp_path / "out", "--config", tmp_path / "none.toml")
    assert result.code == 2
    assert "cannot be read" in result.err
