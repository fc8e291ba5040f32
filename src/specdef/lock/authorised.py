"""Authorised training: with the key, a locked model trains at full speed without an unlocked copy ever being saved.

model = specdef.load_model("locked")
with specdef.authorised(model, "locked.key.safetensors"):
    train(model)                                   # unlocked in memory, here and nowhere else
specdef.save_locked(model, "locked-v2", "locked.key.safetensors", like="locked")
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from specdef.errors import CheckpointError, KeyMismatch, SpecDefError
from specdef.lock.card import write_card
from specdef.lock.certificate import LockCertificate, load_certificate, table_digest, tool_versions
from specdef.lock.files import other_files_sha256
from specdef.lock.key import Key, load_key, require_match
from specdef.lock.names import NameMap
from specdef.lock.projected import scaled_matrix
from specdef.lock.restore import (
    UNLOCKED,
    drop_gradients,
    inserted_layers,
    locked_weights,
    restored_tensor,
)
from specdef.lock.stack import Lock, locks, set_locks
from specdef.lock.unlock import inverse_edits
from specdef.weights.atomic import atomic_folder
from specdef.weights.checkpoint import Checkpoint
from specdef.weights.edit import OutOfRange, ReplaceEdit, apply_all, inverses
from specdef.weights.folder import COMPENSATION_NAME
from specdef.weights.rewrite import copy_other_files, rewrite_tensors
from specdef.weights.tensor_bytes import TORCH_DTYPES


@contextmanager
def authorised(model: nn.Module, key: Key | str | Path) -> Iterator[nn.Module]:
    """Unlock a model in memory for the length of a `with` block, and lock it again on the way out.

    Parameters stay the same objects, so build the optimiser inside the block (its state belongs to the unlocked scale).
    The model is locked again also when the block raises, and also when a trained value no longer fits: it is then rounded
    (NaN stays NaN), and an error says so. Merge adapters before the block ends: they were trained on unlocked inputs.

    Args:
        model: A locked model: from `load_model`, `from_pretrained` or `lock_model`.
        key: Its key, or the path.

    Yields:
        The same model, unlocked.

    Raises:
        KeyMismatch: The key is of another lock.
        CheckpointError: The key is damaged; the model is as it was.
        SpecDefError: The method does not allow it, the model is unlocked already, or the trained weights cannot be locked
            exactly with the key.
    """
    key = key if isinstance(key, Key) else load_key(key)
    if key.method == "scaled":
        raise SpecDefError(
            "a scaled lock does not preserve the function, so there is nothing to train"
        )
    _refuse_deformation(key.method, *(lock.method for lock in locks(model)))
    weights = locked_weights(model, key)
    modules = list(inserted_layers(model, key).values())
    stored = {name: weight.dtype for name, weight in weights.items()}
    trainable = [module.compensation.requires_grad for module in modules]
    # every matrix is computed before any is changed: a key that does not fit leaves the model as it was
    restored = {name: restored_tensor(key, name, weights[name]) for name in key.projections}
    apply_all(weights, {name: inverses(edits) for name, edits in key.scalings.items()})
    drop_gradients(model)
    for name, matrix in restored.items():
        weights[name].data = matrix.to(weights[name].device)
    restored.clear()
    for module in modules:
        module.unlocked = True
        module.compensation.requires_grad_(False)
    setattr(model, UNLOCKED, True)
    set_locks(model, locks(model) or (Lock(key.method, key.lock_id),))

    def lock_again() -> list[str]:
        drop_gradients(model)
        problems = _lock_again(model, key, weights, stored)
        setattr(model, UNLOCKED, False)
        for module, flag in zip(modules, trainable, strict=True):
            module.unlocked = False
            module.compensation.requires_grad_(flag)
        return problems

    try:
        yield model
    except BaseException as error:
        for problem in lock_again():
            error.add_note(problem)
        raise
    if problems := lock_again():
        raise SpecDefError(
            problems[0],
            hint="The model is locked again, but is not what was trained: load the locked folder and repeat the training.",
        )


def save_locked(
    model: nn.Module, out: str | Path, key: Key | str | Path, *, like: str | Path
) -> LockCertificate:
    """Save a locked model that was trained with authorisation, with a new certificate for the same key.

    Args:
        model: The locked model (outside the `with authorised(…)` block).
        out: Folder to create.
        key: The key of its lock, or the path.
        like: The locked folder it came from: layout, configuration, tokenizer and history are taken from there.

    Returns:
        The new certificate. `unlock_checkpoint(out, …, key)` gives the trained, unlocked weights.

    Raises:
        CheckpointError: A tensor of the folder is not in the model, has another shape, or the output cannot be written.
        KeyMismatch: The key is of another lock than the model or the folder; a model that is not locked has none.
        SpecDefError: The model is unlocked, or was locked by deformation, beneath another lock or alone.
    """
    key = key if isinstance(key, Key) else load_key(key)
    _refuse_deformation(key.method)
    if getattr(model, UNLOCKED, False):
        raise SpecDefError(
            "the model is unlocked", hint="Leave the `with specdef.authorised(…)` block first."
        )
    old = Checkpoint.open(like)
    certificate = load_certificate(old.folder)
    require_match(key, certificate.to_dict())
    _refuse_deformation(certificate.below.get("method", ""))
    if not locks(model) or locks(model)[-1].lock_id != key.lock_id:
        raise KeyMismatch(
            "the model was not locked with this key, so it would be saved unlocked",
            hint="Save the model that was loaded from the locked folder and trained with authorisation.",
        )
    names = NameMap(model)
    tensors = {name: names.tensor(name) for name in old.names}

    def current(name: str) -> ReplaceEdit:
        def compute(stored: Tensor) -> Tensor:
            value = tensors[name].detach().cpu()
            if value.shape != stored.shape:
                raise CheckpointError(
                    f"has shape {tuple(value.shape)} in the model", path=old.folder, tensor=name
                )
            return value.to(TORCH_DTYPES[old.info(name).dtype]).contiguous()

        return ReplaceEdit(compute=compute)

    with atomic_folder(Path(out)) as work:
        written = rewrite_tensors(old, work, {name: current(name) for name in old.names}, workers=1)
        copy_other_files(old, work)
        if (old.folder / COMPENSATION_NAME).exists():
            # C belongs to the key: unchanged by authorised training
            (work / COMPENSATION_NAME).write_bytes((old.folder / COMPENSATION_NAME).read_bytes())
        new = Checkpoint.open(work)
        draft = _renewed(certificate, {n: (h.after, "") for n, h in written.items()}, work)
        unlocked = rewrite_tensors(new, None, inverse_edits(key, draft), workers=1)
        renewed = _renewed(certificate, {n: (h.before, h.after) for n, h in unlocked.items()}, work)
        write_card(work, renewed)
        renewed.write(work)
    return renewed


def _refuse_deformation(*methods: str) -> None:
    if "deformation" in methods:
        raise SpecDefError(
            "a deformation is a training of its own, which its key undoes for the very weights it led to, and no others",
            hint="Unlock the model (unlock_checkpoint, unlock_model), train it, and lock it again; that gives a new key.",
        )


def _renewed(
    old: LockCertificate, hashes: dict[str, tuple[str, str]], folder: Path
) -> LockCertificate:
    values = old.to_dict() | {
        "tensors": {
            n: {"sha256": after, "sha256_original": before} for n, (after, before) in hashes.items()
        },
        "source": {
            "name": old.source["name"],
            "sha256": table_digest({n: o for n, (_, o) in hashes.items()}),
        },
        "history": [*old.history, "authorised training"],
        "files": other_files_sha256(folder),
        "versions": tool_versions(),
        "output_difference": {},
    }
    return LockCertificate(**values)


def _lock_again(
    model: nn.Module, key: Key, weights: Mapping[str, Tensor], stored: Mapping[str, torch.dtype]
) -> list[str]:
    """Lock whatever now stands where the weights stood, whatever its values are; return what went wrong."""
    problems, now, names = [], {}, NameMap(model)
    for name, weight in weights.items():
        try:
            now[name] = names.tensor(name)
        except SpecDefError:  # an adapter has wrapped it
            now[name] = weight
            problems.append(
                f"{name} was wrapped or renamed inside the block; what was put around it does not fit the locked model"
            )
    try:
        apply_all(now, key.scalings)
    except OutOfRange as error:
        # an unlocked model must not be left behind: better a rounded one
        apply_all(now, key.scalings, exact=False)
        problems.insert(
            0,
            f"{error.tensor}: trained values no longer fit the lock exactly (NaN, Inf or too small)",
        )
    for name, projection in key.projections.items():
        now[name].data = scaled_matrix(now[name].detach(), projection).to(stored[name])
    return problems
