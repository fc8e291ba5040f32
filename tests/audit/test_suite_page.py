"""docs/suite.md is what the registry says."""

from __future__ import annotations

from pathlib import Path

from specdef.attacks.optimizers import OPTIMIZERS
from specdef.attacks.registry import ATTACKS
from specdef.audit.render.suite_page import suite_page
from specdef.audit.suite import SUITES

PAGE = Path(__file__).parents[2] / "docs" / "suite.md"


def test_the_page_is_in_step_with_the_registry():
    """Make it again: python -m specdef.audit.render.suite_page > docs/suite.md."""
    assert PAGE.read_text(encoding="utf-8") == suite_page()


def test_it_names_everything():
    text = suite_page()
    for name in (*ATTACKS, *OPTIMIZERS, *SUITES):
        assert text.count(f"\n| `{name}` |") == 1, name
    for attack in ATTACKS.values():
        row = next(line for line in text.splitlines() if line.startswith(f"| `{attack.name}` |"))
        assert attack.summary in row and attack.source in row
