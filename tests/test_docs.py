"""The documentation runs: Python blocks are executed, `$ specdef …` lines go through the command line, links lead somewhere."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

from specdef.cli.app import main
from specdef.models.tiny_tokenizer import save_tiny_tokenizer

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[tuple[str, str]]:
    return [(match[1], match[2]) for match in _BLOCK.finditer(page.read_text(encoding="utf-8"))]


RUNNABLE = [
    page for page in PAGES if any(kind in ("python", "console") for kind, _ in blocks(page))
]


@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: page.stem)
def test_examples_run(page, tiny_folder, tmp_path, monkeypatch):
    """In the order of the page, in a folder that holds a tiny model with a tokenizer, called `model`."""
    monkeypatch.chdir(tmp_path)
    save_tiny_tokenizer(shutil.copytree(tiny_folder("llama"), "model"))
    namespace: dict[str, object] = {"__name__": page.stem}
    for kind, text in blocks(page):
        if kind == "toml":
            Path("lock.toml").write_text(text)
        elif kind == "python":
            exec(compile(text, f"<{page.name}>", "exec"), namespace)
        elif kind == "console":
            for line in text.splitlines():
                assert line.startswith("$ specdef "), line
                with pytest.raises(SystemExit) as ended:
                    main(shlex.split(line)[2:])
                assert not ended.value.code, line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_to_pages(page):
    for target in re.findall(r"\]\(([\w./-]+\.md)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).is_file(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_nothing_is_called_secure(page):
    assert not re.search(
        r"\b(secure|unbreakable|tamper-proof)\b", page.read_text(encoding="utf-8"), re.IGNORECASE
    )


def test_every_option_is_documented(capsys):
    """The page names every option that the verbs have, and no other."""
    text = (DOCS / "cli.md").read_text(encoding="utf-8")
    found = set()
    for verb in (
        "inspect",
        "lock",
        "verify",
        "unlock",
        "audit",
        "fragility",
        "predict",
        "spectrum",
        "reproduce",
    ):
        with pytest.raises(SystemExit):
            main([verb, "--help"])
        found |= set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))
    named = set(re.findall(r"--[a-z][a-z-]*", text))
    assert named - found <= {"--help"}
    assert found - named <= {"--help", "--spectra", "--blocks"}
