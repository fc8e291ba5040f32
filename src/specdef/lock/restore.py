"""Undo a lock in memory: for good, or (`authorised`) for a while."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from specdef.errors import CheckpointError, KeyMismatch, SpecDefError
from specdef.lock.compensated import Compensated, compensated_layers, module_path
from specdef.lock.key import Key, load_key
from specdef.lock.names import NameMap
from specdef.lock.stack import Lock, locks, set_locks
from specdef.lock.unlock import restore_difference, restore_matrix
from specdef.weights.edit import apply_all, inverses
from specdef.weights.tensor_bytes import tensor_sha256

UNLOCKED = "_specdef_unlocked"
"""Attribute that marks a model while it is unlocked."""

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def unlock_model(model: nn.Module, key: Key | str | Path) -> None:
    """Unlock a model in memory, in place and for good: weights to the last bit, inserted layers taken out.

    Of two locks the upper one is undone first, with its own key.
    Parameters stay the same objects; gradients are dropped. Of an absorbed or compensated lock, weights that were trained
    since keep what they learned; a deformation has no way to tell that apart and refuses them.

    Args:
        model: A locked model: from `lock_model`, `load_model` or `from_pretrained`, in any dtype that holds what is stored.
        key: Its key, or the path.

    Raises:
        KeyMismatch: The key is of another lock, or of the one beneath, or the weights are no longer those it belongs to.
        CheckpointError: The key is damaged.
        SpecDefError: The model is unlocked for a while, or lacks inserted layers. The model is as it was, whatever is raised.
    """
    key = key if isinstance(key, Key) else load_key(key)
    weights = locked_weights(model, key)
    layers = inserted_layers(model, key) if key.method == "compensated" else {}
    # everything is computed before anything is changed
    restored = {name: restored_tensor(key, name, weights[name]) for name in key.projections}
    if key.method == "deformation":
        restored = {name: _without_difference(key, name, weights[name]) for name in key.residuals}
    plain = _plain_dtype(model, [*(weights[n] for n in key.projections), *(x.compensation for x in layers.values())])  # fmt: skip
    apply_all(weights, {name: inverses(edits) for name, edits in key.scalings.items()})
    drop_gradients(model)
    for name, value in restored.items():
        # a pair may be stored wider than the model it was inserted into
        dtype = plain or value.dtype if name in key.projections else weights[name].dtype
        weights[name].data = value.to(device=weights[name].device, dtype=dtype)
    for path, layer in layers.items():
        parent, _, attribute = path.rpartition(".")
        setattr(model.get_submodule(parent), attribute, layer.bare())
    set_locks(model, locks(model)[:-1])


def locked_weights(model: nn.Module, key: Key) -> dict[str, Tensor]:
    """Find the tensors a key belongs to.

    Args:
        model: A locked model.
        key: The key.

    Returns:
        Name in the checkpoint to the model's own tensor.

    Raises:
        KeyMismatch: The model's lock is another one, or cannot be told and the weights are not those of the key.
        SpecDefError: The model is unlocked for a while.
    """
    if getattr(model, UNLOCKED, False):
        raise SpecDefError("the model is unlocked already", hint="Leave the other block first.")
    carried = locks(model)
    lock_id = carried[-1].lock_id if carried else None
    names = NameMap(model)
    try:
        weights = {name: names.tensor(name) for name in key.tensors}
    except SpecDefError as error:
        if lock_id == key.lock_id:
            raise
        raise _foreign(key, carried) from error
    # A foreign absorbed key would silently scale the wrong channels. A model loaded by other means does not name its
    # lock: the weights themselves must then be those that were locked.
    own = (
        lock_id == key.lock_id
        if lock_id is not None
        else all(_at_lock_time(key, name, weight) is not None for name, weight in weights.items())
    )
    if not own:
        raise _foreign(key, carried)
    return weights


def inserted_layers(model: nn.Module, key: Key) -> dict[str, Compensated]:
    """Return the pairs of a compensated lock by module path.

    Raises:
        SpecDefError: The model lacks one.
    """
    layers = compensated_layers(model)
    own = {p: layers[p] for name in key.projections if (p := module_path(model, name)) in layers}
    if len(own) != len(key.projections):
        raise SpecDefError(
            "the model lacks inserted layers of this key", hint="Load it with specdef.load_model."
        )
    return own


def restored_tensor(key: Key, name: str, weight: Tensor) -> Tensor:
    """Undo a projection, checked against the key's hash where the weights are those of lock time.

    Args:
        key: The key.
        name: The tensor.
        weight: W~ in the model.

    Returns:
        W on the CPU, in its original dtype.

    Raises:
        CheckpointError: The key is damaged.
    """
    locked = _at_lock_time(key, name, weight)
    if locked is None:  # trained since
        return restore_matrix(key, name, weight.detach().cpu(), exact=False)
    return _require_original(key, name, restore_matrix(key, name, locked, exact=True))


def drop_gradients(model: nn.Module) -> None:
    """Forget gradients: those of the locked weights mean nothing for the unlocked ones, nor the reverse."""
    for parameter in model.parameters():
        parameter.grad = None


def _without_difference(key: Key, name: str, weight: Tensor) -> Tensor:
    locked = _at_lock_time(key, name, weight)
    if locked is None:
        raise KeyMismatch(
            f"{name} is no longer what was locked, and the key holds the difference to that",
            hint="Load the locked model again; what was trained since can only be kept locked.",
        )
    return _require_original(key, name, restore_difference(key, name, locked))


def _at_lock_time(key: Key, name: str, weight: Tensor) -> Tensor | None:
    """Return a weight as it was stored, if it is the one that was locked, loaded in this or a wider dtype."""
    value = weight.detach().cpu()
    dtypes = {value.dtype: None}
    if value.is_floating_point():
        dtypes |= {d: None for d in _FLOATS if d.itemsize <= value.dtype.itemsize}
    known = key.hashes.get(name)
    for dtype in dtypes if known else ():
        stored = value.to(dtype)
        if known is not None and tensor_sha256(stored) == known.after:
            return stored
    return None


def _require_original(key: Key, name: str, tensor: Tensor) -> Tensor:
    if key.hashes[name].before != tensor_sha256(tensor):
        raise CheckpointError("does not unlock to the original: the key is damaged", tensor=name)
    return tensor


def _plain_dtype(model: nn.Module, locked: Iterable[Tensor]) -> torch.dtype | None:
    """Return the dtype of the parameters that the lock did not touch."""
    own = {id(tensor) for tensor in locked}
    return next((p.dtype for p in model.parameters() if id(p) not in own), None)


def _foreign(key: Key, carried: Sequence[Lock]) -> KeyMismatch:
    if any(lock.lock_id == key.lock_id for lock in carried[:-1]):
        return KeyMismatch(
            f"the key is of the {key.method} lock beneath, and an {carried[-1].method} lock is on top of that",
            hint="Undo the lock on top first, with its own key.",
        )
    return KeyMismatch(
        "the key is not of this model's lock",
        hint="Load the locked folder with specdef.load_model and use the key that was written with it.",
    )
