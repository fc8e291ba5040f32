"""How pages write numbers, and text that anyone may have chosen."""

from __future__ import annotations

import html
import math
import re
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

MISSING = "–"
"""Stands where there is no number."""

_SPECIAL = re.compile(r"([\\`*_{}\[\]|~#])")


def environment(package: str, *, markdown: bool = False) -> Environment:
    """Return what fills in the templates of a package, every value escaped: anyone may have chosen it.

    Args:
        package: Whose folder `templates` is read.
        markdown: Escape for Markdown; otherwise for HTML.

    Returns:
        The environment.
    """
    escaped: dict[str, Any] = {"finalize": escape_markdown} if markdown else {"autoescape": True}
    return Environment(
        loader=PackageLoader(package), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, **escaped
    )  # fmt: skip


def number(value: Any, digits: int = 3) -> str:
    """Write a number; a dash where there is none.

    Args:
        value: The number; None and what is not finite give a dash.
        digits: Significant ones.

    Returns:
        The number.
    """
    if value is None or not math.isfinite(value):
        return MISSING
    if value == int(value) and abs(value) < 1e6:
        return f"{int(value)}"
    return f"{value:.{digits}g}"


def share(value: Any) -> str:
    """Write a share in per cent.

    Args:
        value: Between 0 and 1.

    Returns:
        Per cent; a dash where there is no number.

    >>> [share(x) for x in (0.91234, 0.0123, None)]
    ['91 %', '1.2 %', '–']
    """
    if value is None or not math.isfinite(value):
        return MISSING
    return f"{value:.0%}".replace("%", " %") if abs(value) >= 0.1 else f"{100 * value:.2g} %"


def seconds(value: float | None) -> str:
    """Write a time as people read it.

    Args:
        value: Seconds; None gives a dash.

    Returns:
        The time with its unit.

    >>> [seconds(x) for x in (0.123, 42.0, 600.0, 7500.0)]
    ['0.12 s', '42 s', '10.0 min', '2.1 h']
    """
    if value is None or not math.isfinite(value):
        return MISSING
    if value < 100:
        return f"{value:.2g} s" if value < 10 else f"{value:.0f} s"
    return f"{value / 60:.1f} min" if value < 6000 else f"{value / 3600:.1f} h"


def escape_markdown(value: Any) -> Any:
    r"""Write a value on one line, so that Markdown and the HTML in it take it as it stands.

    Args:
        value: Anything; `Markup` is taken to be escaped.

    Returns:
        The text.

    >>> escape_markdown("a|b\n<i>")
    'a\\|b &lt;i&gt;'
    """
    if isinstance(value, Markup):
        return value
    return _SPECIAL.sub(r"\\\1", html.escape(" ".join(str(value).split()), quote=False))
