"""Which parameters a curvature operator speaks of, and how they lie in one flat vector."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from torch import Tensor, nn

from specdef.errors import SelectionError

Params = str | Iterable[str | Tensor] | Mapping[str, Tensor] | None
"""Selection of parameters, as `select_parameters` takes it."""


def select_parameters(model: nn.Module, params: Params = None) -> dict[str, nn.Parameter]:
    """Return the chosen parameters by name, each tensor once however many names it is tied to.

    Args:
        model: The model.
        params: None for all that require a gradient (frozen ones can be named); a regular expression that must match
            the whole name; or a list of names ("model.norm.weight"), modules ("model.layers.3"), shell patterns
            ("*.mlp.*") and parameters themselves; or a mapping, whose values are taken.

    Returns:
        Name to parameter, in the model's own order.

    Raises:
        SelectionError: Something is not in the model, or nothing is left.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> list(select_parameters(net, ["0", "*.bias"]))
        ['0.weight', '0.bias', '2.bias']
    """
    unique = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
    if params is None:
        chosen = {name for name, p in unique.items() if p.requires_grad}
        if not chosen:
            raise SelectionError(
                "no parameter of the model requires a gradient",
                hint="Name the parameters, or call requires_grad_(True) on them.",
            )
    else:
        every = dict(model.named_parameters(remove_duplicate=False))
        first = {id(p): name for name, p in unique.items()}
        chosen = set()
        items = params.values() if isinstance(params, Mapping) else params
        for item in (re.compile(params),) if isinstance(params, str) else items:
            found = {first[id(p)] for name, p in every.items() if _fits(name, p, item) and id(p) in first}  # fmt: skip
            if not found:
                raise _nothing_found(item, list(every))
            chosen |= found
        if not chosen:
            raise SelectionError(
                "no parameter is selected", hint="Name at least one, or leave `params` out for all."
            )
    return {name: p for name, p in unique.items() if name in chosen}


def flat_slices(parameters: Mapping[str, Tensor]) -> dict[str, slice]:
    """Return where each parameter lies in the flat vector.

    Args:
        parameters: Name to tensor.

    Returns:
        Name to slice, in order and without gaps.
    """
    slices, start = {}, 0
    for name, p in parameters.items():
        slices[name] = slice(start, start + p.numel())
        start += p.numel()
    return slices


def _fits(name: str, p: Tensor, item: str | re.Pattern[str] | Tensor) -> bool:
    if isinstance(item, Tensor):
        return p is item
    if isinstance(item, re.Pattern):
        return item.fullmatch(name) is not None
    return name == item or name.startswith(f"{item}.") or fnmatchcase(name, item)


def _nothing_found(item: object, names: list[str]) -> SelectionError:
    if isinstance(item, Tensor):
        return SelectionError(
            f"a tensor {list(item.shape)} is no floating parameter of this model",
            hint="Pass parameters of the same model, or their names.",
        )
    text = item.pattern if isinstance(item, re.Pattern) else str(item)
    nearest = difflib.get_close_matches(text, names, 3, 0.3)
    return SelectionError(
        f"no floating parameter fits {text!r}; nearest: {', '.join(nearest) or names[0]}",
        patterns=(text,), nearest=nearest,
        hint="Give names, module prefixes or shell patterns in a list; a single string is a regular expression.",
    )  # fmt: skip
