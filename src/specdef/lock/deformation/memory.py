"""How much memory a deformation takes before it begins, and what to say where there was not enough."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from specdef.errors import SpecDefError
from specdef.lock.deformation.config import DeformationConfig

OPTIMIZER_COPIES = {"adadelta": 2, "adam": 2, "adamw": 2, "rmsprop": 1, "sgd": 1}
"""Numbers an optimiser keeps per parameter (sgd: its momentum)."""

HINT = (
    "Use a smaller batch or shorter texts (--batch-size, --length), --train targets with fewer --target-modules, "
    "--optimizer sgd, or a machine with more memory."
)


def memory_bytes(model: nn.Module, config: DeformationConfig, trained: int) -> int:
    """Estimate the memory of a deformation without activations, which depend on the batch.

    Args:
        model: The model.
        config: The recipe.
        trained: Numbers in the parameters that move.

    Returns:
        Bytes: weights, the original, the last good state, gradients, optimiser, and the copy that teaches KL where there is one.
    """
    parameter = next(model.parameters())
    weights = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    copies = 3 + (config.retain_loss != "task" and config.teacher == "online")
    moving = (1 + OPTIMIZER_COPIES[config.optimizer]) * trained * parameter.element_size()
    return copies * weights + moving


def memory_total(device: torch.device) -> int | None:
    """Return the memory of a device in bytes; None where it does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


def require_memory(model: nn.Module, config: DeformationConfig, trained: int) -> None:
    """Refuse a deformation that cannot fit, before the first step.

    Args:
        model: The model.
        config: The recipe.
        trained: Numbers in the parameters that move.

    Raises:
        SpecDefError: It needs more than the device has.
    """
    device = next(model.parameters()).device
    needed = {device: memory_bytes(model, config, trained)}
    if device.type != "cpu":  # the original and the last good state are kept beside the CPU
        copies = 2 * sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
        needed = {device: needed[device] - copies, torch.device("cpu"): copies}
    for place, size in needed.items():
        total = memory_total(place)
        if total is not None and size > total:
            raise SpecDefError(
                f"the deformation needs {size / 1e9:.1f} GB besides activations, and the device has {total / 1e9:.1f} GB",
                hint=HINT,
            )


@contextmanager
def explained_memory() -> Iterator[None]:
    """Say what to do where memory runs out.

    Raises:
        SpecDefError: In place of torch's own error.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise SpecDefError("the device ran out of memory", hint=HINT) from error
    except RuntimeError as error:
        if "allocate memory" not in str(error) and "not enough memory" not in str(error):
            raise
        raise SpecDefError("the device ran out of memory", hint=HINT) from error
