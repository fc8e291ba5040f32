"""The command line starts without torch, and every verb has the options that all verbs have."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.metadata import version

import pytest

VERBS = ("inspect", "lock", "verify", "unlock", "audit", "predict", "spectrum", "reproduce")


def test_help_loads_no_heavy_package():
    """Time is not measured here: what would take it must not be imported."""
    script = f"""
import sys
from specdef.cli.app import main
for arguments in [["--help"], ["--version"], *([verb, "--help"] for verb in {VERBS!r})]:
    try:
        main(arguments)
    except SystemExit as ended:
        assert not ended.code, arguments
heavy = {{"torch", "transformers", "safetensors", "numpy", "huggingface_hub", "matplotlib"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert all(verb in done.stdout for verb in VERBS)
    assert f"specdef {version('specdef')}\n" in done.stdout


def test_importing_the_package_loads_no_torch():
    script = "import sys, specdef; assert 'torch' not in sys.modules; assert 'lock_model' in dir(specdef)"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_installed_command_runs():
    command = shutil.which("specdef", path=f"{sys.exec_prefix}/bin") or shutil.which("specdef")
    if command is None:
        pytest.skip("specdef is not installed as a command here")
    done = subprocess.run([command, "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"specdef {version('specdef')}\n")


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("option", ["--json", "--seed", "--device", "--config"])
def test_every_verb_has_the_common_options(run, verb, option):
    assert option in run(verb, "--help").out


def test_no_arguments_show_the_help(run):
    result = run()
    assert result.code == 2
    assert "Usage: specdef" in result.out + result.err


@pytest.mark.parametrize(
    "arguments", [["fly"], ["lock"], ["unlock", "a", "b"], ["lock", "a", "b", "--fast"]]
)
def test_usage_errors_exit_2_and_name_the_help(run, arguments):
    result = run(*arguments)
    assert result.code == 2
    assert result.out == ""
    assert "--help" in result.err


def test_interrupt_exits_130_and_says_so(run, locked, tmp_path, monkeypatch):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("specdef.lock.lock.plan_lock", interrupted)
    result = run("lock", locked.source, tmp_path / "out")
    assert result.code == 130
    assert "interrupted" in result.err
    assert not list(tmp_path.iterdir())
