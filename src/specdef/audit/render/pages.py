"""HTML, Markdown and JSON of an audit; names of models, tasks and data are escaped, since anyone may have chosen them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from specdef.audit.render.view import view
from specdef.errors import CheckpointError
from specdef.fragility.render.text import environment
from specdef.weights.atomic import atomic_file

NAMES = ("audit.html", "audit.md", "audit.json")
"""Files of a report."""

_PACKAGE = "specdef.audit.render"


def html_page(report: Mapping[str, Any]) -> str:
    """Make the page: one file, nothing is fetched.

    Args:
        report: `AuditReport.to_dict()`, with `about` where it is known.

    Returns:
        HTML.
    """
    return environment(_PACKAGE).get_template("audit.html.j2").render(view(report))


def markdown_page(report: Mapping[str, Any]) -> str:
    """Make the same in Markdown, without charts.

    Args:
        report: As for `html_page`.

    Returns:
        Markdown.
    """
    return environment(_PACKAGE, markdown=True).get_template("audit.md.j2").render(view(report))


def json_page(report: Mapping[str, Any]) -> str:
    """Write the report as JSON; numbers that JSON does not know become null."""
    return json.dumps(_finite(report), indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def write_pages(folder: Path, report: Mapping[str, Any]) -> list[Path]:
    """Write all three, replacing older ones.

    Args:
        folder: Made where there is none.
        report: As for `html_page`.

    Returns:
        The files.
    """
    pages = (html_page(report), markdown_page(report), json_page(report))
    for name, text in zip(NAMES, pages, strict=True):
        with atomic_file(folder / name) as path:
            path.write_text(text, encoding="utf-8")
    return [folder / name for name in NAMES]


def read_report(path: Path) -> dict[str, Any]:
    """Read a report back.

    Args:
        path: An `audit.json`.

    Returns:
        What `html_page` takes.

    Raises:
        CheckpointError: It cannot be read, or is something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        view(values)
    except OSError as error:
        raise CheckpointError(f"cannot be read ({error.strerror})", path=path) from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"is no report of an audit ({type(error).__name__}: {error})", path=path,
            hint="Name the audit.json that `specdef audit` wrote.",
        ) from error  # fmt: skip
    return dict(values)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
