"""Digests of what a study's results depend on: a study is gone on with only if nothing of it has changed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from specdef.attacks.attack import Prepared
from specdef.attacks.task import Task


def model_digest(model: nn.Module) -> str:
    """Return a digest of a model: its modules and every number it holds.

    Args:
        model: The model.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        hooks = sorted(
            hook.__qualname__
            for hooks in (module._forward_hooks, module._forward_pre_hooks)
            for hook in hooks.values()
            if hasattr(hook, "__qualname__")
        )
        digest.update(f"{name}:{type(module).__qualname__}:{module.extra_repr()}:{hooks};".encode())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        digest.update(name.encode())
        _add(digest, tensor)
    return digest.hexdigest()


def prepared_digest(prepared: Prepared) -> str:
    """Return a digest of an attack's edits: two attacks that edit a model alike and train alike need one control.

    Args:
        prepared: What an attack made of a model.

    Returns:
        64 hexadecimal digits.
    """
    names = {id(p): name for name, p in prepared.model.named_parameters()}
    groups = [
        (sorted(names.get(id(p), "?") for p in g["params"]), {n: v for n, v in g.items() if n != "params"})
        for g in prepared.groups
    ]  # fmt: skip
    return _text(model_digest(prepared.model), repr(groups))


def task_digest(task: Task) -> str:
    """Return a digest of a task's data and loss.

    Args:
        task: The task.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256(f"{task.name}:{type(task.loss).__qualname__}".encode())
    for batches in (task.train, task.heldout, task.retain):
        digest.update(str(len(batches)).encode())
        for batch in batches:
            _add(digest, batch)
    return digest.hexdigest()


def batches_digest(batches: Sequence[Any]) -> str:
    """Return a digest of batches in their order.

    Args:
        batches: Tensors in dicts, lists or tuples.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256(str(len(batches)).encode())
    for batch in batches:
        _add(digest, batch)
    return digest.hexdigest()


def study_digest(*parts: object) -> str:
    """Return a short digest of digests and settings, for the name of a study."""
    return _text(*(str(part) for part in parts))[:16]


def _text(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _add(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        digest.update(flat.view(torch.uint8).numpy().data)
    elif isinstance(value, Mapping):
        for name, x in sorted(value.items()):
            digest.update(str(name).encode())
            _add(digest, x)
    elif isinstance(value, Sequence | Iterable) and not isinstance(value, str | bytes):
        for x in value:
            _add(digest, x)
    else:
        digest.update(repr(value).encode())
