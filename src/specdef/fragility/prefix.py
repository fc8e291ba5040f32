"""Leading blocks that nothing selected lies in give the same activations at every evaluation: they are computed once.

Where only the last blocks of a model are fine-tuned, the blocks before them are most of every forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

# Activations kept, in bytes; beyond it blocks are computed as ever.
_LIMIT = 2 << 30


@contextmanager
def remembered_prefix(model: nn.Module, names: Iterable[str]) -> Iterator[int]:
    """Let the leading frozen blocks of a model remember what they gave, for a block of code.

    A block is an entry of a module list; it leads if no selected parameter lies in it or in an entry before it. It is asked
    for its memory only with inputs equal, tensor by tensor, to those it has seen, and not while they require a gradient: so
    its answer is the one it would give, as long as its weights stay. The model must be deterministic in evaluation mode.

    Args:
        model: The model; its blocks' `forward` is replaced meanwhile.
        names: The selected parameters.

    Yields:
        How many blocks remember.
    """
    chosen = list(names)
    blocks: list[nn.Module] = []
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            for name, block in module.named_children():
                prefix = f"{path}.{name}." if path else f"{name}."
                if any(other.startswith(prefix) for other in chosen):
                    break
                blocks.append(block)
    # Lists within a block that remembers are never reached.
    inner = {id(m) for block in blocks for m in block.modules() if m is not block}
    outer = [b for b in blocks if id(b) not in inner and "forward" not in vars(b)]
    room = [_LIMIT]
    for block in outer:
        block.forward = _remembering(block.forward, room)
    try:
        yield len(outer)
    finally:
        for block in outer:
            del block.forward


def _remembering(forward: Callable[..., Any], room: list[int]) -> Callable[..., Any]:
    seen: list[tuple[list[Any], Any]] = []

    def remembered(*arguments: Any, **options: Any) -> Any:
        given = tree_flatten((arguments, options))[0]
        if any(isinstance(x, Tensor) and x.requires_grad for x in given):
            return forward(*arguments, **options)
        for before, answer in seen:
            if _same(before, given):
                return answer
        answer = forward(*arguments, **options)
        kept = [x for x in tree_flatten(answer)[0] if isinstance(x, Tensor)]
        size = sum(x.nbytes for x in (*kept, *given) if isinstance(x, Tensor))
        if size <= room[0] and not any(x.requires_grad for x in kept):
            room[0] -= size
            seen.append((given, answer))
        return answer

    return remembered


def _same(before: list[Any], given: list[Any]) -> bool:
    if len(before) != len(given):
        return False
    for x, y in zip(before, given, strict=True):
        if x is y:
            continue
        if isinstance(x, Tensor) and isinstance(y, Tensor):
            if x.dtype != y.dtype or x.device != y.device or not torch.equal(x, y):
                return False
        elif isinstance(x, Tensor) or isinstance(y, Tensor) or type(x) is not type(y) or x != y:
            return False
    return True
