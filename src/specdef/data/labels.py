"""Labels as data sets write them, and the class indices a model is trained on."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from specdef.errors import SpecDefError


def class_indices(
    labels: Sequence[Any],
    config: Any,
    *,
    names: Sequence[str] | None,
    place: Callable[[int], str],
    note: Callable[[str], None],
) -> list[int]:
    """Translate labels into the class indices of a model.

    Args:
        labels: The labels of all rows: integers (or such as strings), or names of classes.
        config: The model's transformers config: `num_labels`, `label2id`, `problem_type`.
        names: Names of the classes that integers stand for, where the data set states them. They are looked up in
            `label2id`, since a model may count its classes in another order.
        place: Says where row i stands.
        note: Told how names were translated.

    Returns:
        Indices in 0..num_labels - 1. Names are looked up in `label2id`, with or without capitals; where it has none of
        them, they are counted in sorted order.

    Raises:
        SpecDefError: A label is missing or out of range, `label2id` knows some names and not others, there are more names
            than classes, or the model is no classifier with one class per input.
    """
    if getattr(config, "problem_type", None) in {"regression", "multi_label_classification"}:
        raise SpecDefError(
            f"The model's problem_type is {config.problem_type}; one class per input is needed.",
            hint="Use a model with problem_type single_label_classification.",
        )
    for i, label in enumerate(labels):
        if label is None or label == "" or not isinstance(label, int | str):
            raise SpecDefError(
                f"{place(i)}: the label is {label!r}.",
                hint="Give every row a label: an integer from 0, or the name of a class.",
            )
    count = int(config.num_labels)
    known = _known(config)
    if names and all(name.lower() in known for name in names):
        table: Mapping[Any, int] = {i: known[name.lower()] for i, name in enumerate(names)}
        indices = [table.get(int(label), -1) for label in labels]
    elif all(_is_integer(label) for label in labels):
        indices = [int(label) for label in labels]
    else:
        indices = _by_name([str(label) for label in labels], known, count, place, note)
    for i, index in enumerate(indices):
        if not 0 <= index < count:
            raise SpecDefError(
                f"{place(i)}: label {labels[i]!r} is out of range: the model has {count} classes, 0 to {count - 1}.",
                hint="Labels count from 0; -1 often marks a test set without labels. Or take a model with more classes.",
            )
    return indices


def _known(config: Any) -> dict[str, int]:
    """Return the model's class names in small letters, without transformers' place holders LABEL_0, LABEL_1, …."""
    table = {str(name).lower(): int(i) for name, i in (config.label2id or {}).items()}
    return {} if table == {f"label_{i}": i for i in range(len(table))} else table


def _is_integer(label: int | str) -> bool:
    return isinstance(label, int) or re.fullmatch(r"\s*-?[0-9]{1,9}\s*", label) is not None


def _by_name(
    labels: list[str],
    known: Mapping[str, int],
    count: int,
    place: Callable[[int], str],
    note: Callable[[str], None],
) -> list[int]:
    unknown = [i for i, label in enumerate(labels) if label.lower() not in known]
    if not unknown:
        return [known[label.lower()] for label in labels]
    if known and len({labels[i] for i in unknown}) < len(set(labels)):
        raise SpecDefError(
            f"{place(unknown[0])}: the model has no class {labels[unknown[0]]!r}; it has {', '.join(list(known)[:8])}.",
            hint="Write labels as the model's config.json does under label2id, or as integers.",
        )
    distinct = sorted(set(labels))
    if len(distinct) > count:
        raise SpecDefError(
            f"{place(0)}: the data has {len(distinct)} classes, the model {count}.",
            hint="Take a model with more classes, or other data.",
        )
    order = {name: i for i, name in enumerate(distinct)}
    shown = ", ".join(f"{name} = {i}" for name, i in list(order.items())[:5])
    note(
        f"the model's config does not name these classes; counted in sorted order: {shown}"
        + (", …" if len(order) > 5 else "")
    )
    return [order[label] for label in labels]
