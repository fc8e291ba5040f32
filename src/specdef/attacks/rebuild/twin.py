"""A model of the same architecture with fresh weights."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn

from specdef.errors import SpecDefError
from specdef.lock.compensated import compensated_layers


def why_no_twin(model: nn.Module) -> str:
    """Return why no twin with fresh weights can be made of a model; empty where one can."""
    if _has_config(model):
        return ""
    skeleton = _without_inserted(model)
    stuck = [
        f"{path} ({type(module).__name__})" if path else type(module).__name__
        for path, module in skeleton.named_modules()
        if any(True for _ in module.parameters(recurse=False)) and _reset(module) is None
    ]
    return f"no way to draw the weights of {', '.join(stuck[:3])} anew" if stuck else ""


def fresh_twin(model: nn.Module, generator: torch.Generator) -> nn.Module:
    """Make a model of the same architecture with fresh weights.

    A transformers model is built from its configuration; of another module every submodule is copied and reset with its
    own `reset_parameters()`. Layers that a lock inserted are left out.

    Args:
        model: Not changed.
        generator: Its next number seeds the drawing of the weights; the global random state is left as it was.

    Returns:
        The twin, in evaluation mode, with the model's dtype and device.

    Raises:
        SpecDefError: Neither way works.
    """
    if why := why_no_twin(model):
        raise SpecDefError(why, hint="Give the modules that hold parameters a reset_parameters().")
    like = next(p for p in model.parameters() if p.is_floating_point())
    seed = int(torch.randint(2**31, (), generator=generator))
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        if _has_config(model):
            twin: nn.Module = type(model)(copy.deepcopy(model.config))
        else:
            twin = _without_inserted(model)
            for module in twin.modules():
                if (reset := _reset(module)) is not None:
                    reset()
    return twin.to(device=like.device, dtype=like.dtype).eval()


def _has_config(model: nn.Module) -> bool:
    """Tell whether a model is one of transformers, which are built from their configuration alone."""
    return hasattr(model, "config") and hasattr(type(model), "config_class")


def _without_inserted(model: nn.Module) -> nn.Module:
    copied = copy.deepcopy(model)
    for path, pair in compensated_layers(copied).items():
        if not path:
            return pair.bare()
        parent, _, name = path.rpartition(".")
        setattr(copied.get_submodule(parent), name, pair.bare())
    return copied


def _reset(module: nn.Module) -> Callable[[], None] | None:
    """Return what draws a module's own weights anew; nn.MultiheadAttention has it under another name."""
    return getattr(module, "reset_parameters", getattr(module, "_reset_parameters", None))
