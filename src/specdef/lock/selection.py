"""What `target_modules` and `layers` select, and the refusal of a selection any part of which selects nothing."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from specdef.errors import SelectionError
from specdef.lock.config import LockConfig
from specdef.lock.deformation.config import DeformationConfig
from specdef.symmetries import layer_index, matches, module_name


def check_selection(names: Iterable[str], config: LockConfig | DeformationConfig) -> None:
    """Refuse a selection of which any part selects nothing: a typing error would leave that part unlocked in silence.

    Args:
        names: Tensor names of the model.
        config: The recipe.

    Raises:
        SelectionError: A name, the expression or a block is not in the model.
    """
    paths = {module_name(name) for name in names}
    modules = config.target_modules
    for pattern in (modules,) if isinstance(modules, str) else modules or ():
        selection = pattern if isinstance(modules, str) else (pattern,)
        if not any(matches(path, selection) for path in paths):
            ends = {path.rpartition(".")[2] for path in paths} | paths
            nearest = difflib.get_close_matches(pattern, sorted(ends), n=3, cutoff=0.5)
            close = f"; nearest: {', '.join(nearest)}" if nearest else ""
            raise SelectionError(
                f"target_modules: {pattern!r} is no module of the model{close}",
                patterns=(pattern,), nearest=nearest, hint="`specdef inspect MODEL` lists the modules.",
            )  # fmt: skip
    blocks = {i for path in paths if (i := layer_index(path)) is not None}
    missing = [i for i in config.layers or () if i not in blocks]
    if missing:
        raise SelectionError(
            f"layers: the model has no block {missing[0]}; it has {len(blocks)} blocks"
            + (f", {min(blocks)} to {max(blocks)}" if blocks else ""),
            hint="`specdef inspect MODEL` lists the tensors.",
        )
