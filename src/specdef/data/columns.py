"""Which column is what: the names data sets commonly use, in the order in which they are tried."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from specdef.errors import SpecDefError

TEXT = ("text", "content", "document", "sentence", "review", "sentence1", "question", "prompt")
"""Columns taken as the text."""

TEXT_PAIR = (
    ("text", "text_pair"),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
)
"""Columns taken as a text and its second part, for classification."""

PROMPT = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
)
"""Columns taken as a prompt, which is not learned, and what follows it, for language modelling."""

LABEL = ("label", "labels", "target", "class", "category", "fine_label")
"""Columns taken as the class."""

IMAGE = ("image", "img", "picture")
"""Columns taken as the picture."""

ROLES = ("text", "text_pair", "prompt", "completion", "label", "image")
"""What `columns` may name."""


def check_roles(columns: Mapping[str, str], found: Sequence[str], source: str) -> None:
    """Refuse a mapping that names an unknown role or a column the data lacks.

    Args:
        columns: Role -> column, as the caller gave it.
        found: The columns there are.
        source: The data, for messages.

    Raises:
        ValueError: A role is unknown.
        SpecDefError: A column does not exist.
    """
    for role, name in columns.items():
        if role not in ROLES:
            raise ValueError(f"columns must be among {', '.join(ROLES)}, got {role!r}.")
        if name not in found:
            raise SpecDefError(
                f"{source}: no column {name!r}; there are {', '.join(found)}.",
                hint="Name one of these columns.",
            )


def find_column(
    role: str, names: Sequence[str], columns: Mapping[str, str], found: Sequence[str], source: str
) -> str:
    """Find the column of a role.

    Args:
        role: One of `ROLES`.
        names: Names it may have, the first one found is taken.
        columns: Role -> column, as the caller gave it; it wins.
        found: The columns there are.
        source: The data, for messages.

    Returns:
        The column.

    Raises:
        SpecDefError: There is none.
    """
    if role in columns:
        return columns[role]
    for name in names:
        if name in found:
            return name
    raise SpecDefError(
        f"{source}: no {role} column among {', '.join(found)}.",
        hint=f"Call it one of {', '.join(names)}, or name it: {role}=COLUMN.",
    )


def find_pair(
    roles: tuple[str, str],
    pairs: Sequence[tuple[str, str]],
    columns: Mapping[str, str],
    found: Sequence[str],
) -> tuple[str, str] | None:
    """Find two columns that belong together.

    Args:
        roles: The two roles.
        pairs: Names they may have, the first pair found is taken.
        columns: Role -> column, as the caller gave it; both or none of the two roles decide.
        found: The columns there are.

    Returns:
        The columns, or None.
    """
    first, second = roles
    if first in columns or second in columns:
        return (columns[first], columns[second]) if {first, second} <= columns.keys() else None
    return next((pair for pair in pairs if set(pair) <= set(found)), None)
