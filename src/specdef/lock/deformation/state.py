"""The state of an unfinished deformation on disk: one safetensors file, so nothing is ever unpickled."""

from __future__ import annotations

import hashlib
import json
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from specdef.curvature.losses import Batch
from specdef.errors import CheckpointError
from specdef.lock.deformation.config import DeformationConfig
from specdef.weights.atomic import atomic_file
from specdef.weights.header import read_header
from specdef.weights.tensor_bytes import as_bytes

_FORMAT = "specdef-deformation-1"
_MODEL, _GOOD, _OPTIMIZER, _TRACKER = "model.", "good.", "optimizer.", "tracker."


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """List parameters and buffers, each tensor once: all that training changes."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def copy_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Copy parameters and buffers to the CPU."""
    return {n: t.detach().to("cpu", copy=True) for n, t in model_tensors(model).items()}


def restore_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Set parameters and buffers, in place; one that took another shape since, as caches do, takes its own again."""
    with torch.no_grad():
        for name, tensor in model_tensors(model).items():
            if name not in tensors:  # registered since
                continue
            if tensor.shape == tensors[name].shape:
                tensor.copy_(tensors[name])
            else:
                tensor.data = tensors[name].to(tensor, copy=True)


def save_state(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tracker: Mapping[str, Tensor],
    good: Mapping[str, Tensor],
    numbers: Mapping[str, Any],
) -> None:
    """Write everything a deformation needs to go on bit for bit, whole or not at all.

    Args:
        path: The file; an older state there is replaced.
        model: In training.
        optimizer: Its state is tensors, all of them.
        tracker: State of the spectral tracker.
        good: The last state that may be kept.
        numbers: JSON values.

    Raises:
        CheckpointError: It cannot be written.
    """
    tensors = {_MODEL + n: t for n, t in copy_tensors(model).items()}
    tensors |= {_GOOD + n: t for n, t in good.items()}
    tensors |= {_TRACKER + n: t for n, t in tracker.items()}
    for index, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            if value is not None:
                tensors[f"{_OPTIMIZER}{index}.{name}"] = torch.as_tensor(value)
    tensors["random.cpu"] = torch.get_rng_state()
    device = next(model.parameters()).device
    if device.type == "cuda":
        tensors["random.cuda"] = torch.cuda.get_rng_state(device)
    try:
        with atomic_file(path) as work:
            save_file(
                {n: t.detach().cpu().contiguous() for n, t in tensors.items()}, work,
                metadata={"format": _FORMAT, "numbers": json.dumps(dict(numbers))},
            )  # fmt: skip
    except SafetensorError as error:  # a full disk, among others
        raise CheckpointError(
            f"cannot be written ({error})", path=path, hint="Free space, or name another --checkpoint; an earlier state is still there."
        ) from error  # fmt: skip


def load_state(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    expected: Mapping[str, Any],
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Set model, optimiser and random numbers to a saved state.

    Args:
        path: The file.
        model: The original, set in place.
        optimizer: Fresh, of the same parameters; set in place.
        expected: Numbers that must be as they were, by name: the recipe, the data.

    Returns:
        (state of the tracker, last good state, numbers).

    Raises:
        CheckpointError: The file is missing, damaged, or of another model, recipe or data.
    """
    header = read_header(path)  # checked strictly before anything is loaded
    if header.metadata.get("format") != _FORMAT:
        raise CheckpointError("is no state of a deformation", path=path, hint="Name the file that an interrupted `specdef lock` left.")  # fmt: skip
    try:
        numbers: dict[str, Any] = json.loads(header.metadata["numbers"])
        for name, value in expected.items():
            if numbers.get(name) != value:
                raise CheckpointError(
                    f"belongs to another run: its {name} is not this one's{_difference(numbers.get(name), value)}",
                    path=path, hint="Repeat the command of the interrupted run, or remove the file to begin anew.",
                )  # fmt: skip
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        parts = {p: {n.removeprefix(p): t for n, t in tensors.items() if n.startswith(p)} for p in (_MODEL, _GOOD, _OPTIMIZER, _TRACKER)}  # fmt: skip
        for name, parameter in model_tensors(model).items():
            for part in (_MODEL, _GOOD):
                found = parts[part][name].shape
                if isinstance(parameter, nn.Parameter) and found != parameter.shape:
                    raise ValueError(f"{name} has shape {list(found)}")
        restore_tensors(model, parts[_MODEL])
        saved = optimizer.state_dict()
        saved["state"] = {}
        for name, value in parts[_OPTIMIZER].items():
            index, _, field = name.partition(".")
            saved["state"].setdefault(int(index), {})[field] = value
        optimizer.load_state_dict(saved)
        torch.set_rng_state(tensors["random.cpu"])
        device = next(model.parameters()).device
        if "random.cuda" in tensors and device.type == "cuda":
            torch.cuda.set_rng_state(tensors["random.cuda"], device)
    except (KeyError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"is damaged, or of another model ({error})", path=path, hint="Remove it to begin anew.") from error  # fmt: skip
    return parts[_TRACKER], parts[_GOOD], numbers


def run_identity(
    config: DeformationConfig,
    original: Mapping[str, Tensor],
    batches: Iterable[Batch],
    per_epoch: int,
    matrices: list[str],
) -> dict[str, Any]:
    """Return what a saved state and the run that goes on from it must agree in, as JSON gives it back.

    Args:
        config: The recipe.
        original: The model's tensors before the deformation, on the CPU.
        batches: Training and held-out batches, as far as they are at hand.
        per_epoch: Batches of an epoch.
        matrices: Names of what is deformed.

    Returns:
        Numbers, for `save_state` and `load_state`.
    """
    recipe = {n: list(v) if isinstance(v, tuple) else v for n, v in config.to_dict().items()}
    data, model = data_digest(batches), data_digest([original])
    return {"recipe": recipe, "data": data, "model": model, "batches": per_epoch, "matrices": matrices}  # fmt: skip


def data_digest(batches: Iterable[Batch]) -> str:
    """Return the SHA-256 of the tensors of some batches; a model's tensors by name are one batch."""
    digest = hashlib.sha256()
    for batch in batches:
        values = batch.items() if isinstance(batch, Mapping) else enumerate(batch)
        for name, value in values:
            if isinstance(value, Tensor):
                digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
                digest.update(as_bytes(value.detach().cpu().contiguous()))
    return digest.hexdigest()


@contextmanager
def deferred_interrupt(active: bool) -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into an event, so that a step is finished before its state is saved; the second acts at once.

    Args:
        active: Only then, and only in the main thread, which alone may handle signals.

    Yields:
        Set once Ctrl-C was pressed.
    """
    asked = threading.Event()
    if not active or threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def handle(number: int, frame: object) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


def _difference(found: object, expected: object) -> str:
    if not (isinstance(found, dict) and isinstance(expected, dict)):
        return ""
    fields = [n for n in expected if found.get(n) != expected[n]]
    return f" ({', '.join(f'{n}: {found.get(n)} then, {expected[n]} now' for n in fields[:3])})"
