"""The parts of a model an attacker may train alone, found from its modules: no table of families."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from specdef.lock.compensated import Compensated
from specdef.lock.embeddings import input_embeddings
from specdef.lock.embeddings import output_embeddings as output_embeddings
from specdef.lock.sequential import CONVOLUTIONS as CONVOLUTIONS


def is_linear(module: nn.Module) -> bool:
    """Tell whether a module is a linear layer, a convolution, or one of these behind the inserted layer of a lock."""
    # nn.MultiheadAttention only reads the weight of this one, so nothing can stand in its place
    if type(module) is NonDynamicallyQuantizableLinear:
        return False
    return isinstance(module, (nn.Linear, Compensated, *CONVOLUTIONS)) or (
        type(module).__name__ == "Conv1D" and hasattr(module, "weight")
    )


def is_norm(module: nn.Module) -> bool:
    """Tell whether a module is a normalisation: by its class's name, which covers torch's and transformers'."""
    return "norm" in type(module).__name__.lower() and not any(module.children())


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """List linear layers and convolutions by path, in the order of the model."""
    found: dict[str, nn.Module] = {}
    inside: set[int] = set()
    for path, module in model.named_modules():
        if is_linear(module) and id(module) not in inside:
            found[path] = module
            inside.update(map(id, module.modules()))
    return found


def head_path(model: nn.Module) -> str | None:
    """Return the path of the output layer: a language model's own, otherwise the last linear layer; None without one."""
    head = output_embeddings(model)
    if head is None:
        return next(reversed(linear_layers(model)), None)
    return next((path for path, module in model.named_modules() if module is head), None)


def blocks(model: nn.Module) -> list[nn.Module]:
    """List the blocks of a model in order: the children of its outermost lists of modules.

    A list (`nn.ModuleList`, `nn.Sequential`) counts if two or more of its children hold parameters; its lists within do not.

    Args:
        model: Any module.

    Returns:
        Children that hold parameters; empty for a model without such a list.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    >>> [type(block).__name__ for block in blocks(model)]
    ['Linear', 'Linear']
    """
    if isinstance(model, nn.ModuleList | nn.Sequential):
        held = [child for child in model if any(True for _ in child.parameters())]
        if len(held) > 1:
            return held
    return [block for child in model.children() for block in blocks(child)]


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """List the modules whose class is called attention."""
    return [m for m in model.modules() if "attention" in type(m).__name__.lower()]


def embedding_modules(model: nn.Module) -> list[nn.Module]:
    """List embedding tables, and whatever else a transformers model turns its input into vectors with."""
    own = input_embeddings(model)
    return [m for m in model.modules() if m is own or isinstance(m, nn.Embedding)]


def projections(model: nn.Module, words: frozenset[str]) -> list[str]:
    """List linear layers of attention whose name holds one of some words: "q" finds q_proj, "query" query_key_value.

    Args:
        model: Any module.
        words: Parts of the last name of a path, split at underscores and where case changes.

    Returns:
        Paths, in the order of the model.
    """
    inside = members(attention_modules(model))
    return [
        path
        for path, module in linear_layers(model).items()
        if inside & {id(p) for p in module.parameters()} and words & _words(path)
    ]


def stacked_experts(model: nn.Module) -> list[str]:
    """List parameters that hold one matrix per expert of a mixture; their modules' class is called experts."""
    return [
        f"{path}.{name}"
        for path, module in model.named_modules()
        if "experts" in type(module).__name__.lower()
        for name, p in module.named_parameters(recurse=False)
        if p.ndim == 3
    ]


def members(modules: Iterable[nn.Module]) -> set[int]:
    """Return the identities of all parameters of some modules."""
    return {id(p) for module in modules for p in module.parameters()}


def _words(path: str) -> set[str]:
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", path.rpartition(".")[2])
    return set(name.lower().split("_"))
