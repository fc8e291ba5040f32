"""Draw the output layer anew, then train it alone or everything."""

from __future__ import annotations

import copy
import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from specdef.attacks.attack import Attack, Prepared
from specdef.attacks.partial.cost import relative_cost, step_work
from specdef.attacks.partial.parts import CONVOLUTIONS, head_path
from specdef.attacks.task import Task
from specdef.errors import SpecDefError
from specdef.lock.compensated import Compensated

_NO_HEAD = "the model has no linear output layer"


class FreshHead(Attack):
    """Replace the output layer by a fresh one.

    Args:
        train: "head" alone, or "all".
    """

    tier = 3
    cost = "of `head`: a forward pass and the last layer; of `all`: full training"
    source = "transfer by a new classifier: Yosinski et al. 2014, arXiv 1411.1792"

    def __init__(self, train: Literal["head", "all"] = "head") -> None:
        self.name = f"fresh-head-{train}"
        what = "it alone" if train == "head" else "everything"
        self.summary = f"draw the output layer anew, then train {what}"
        self.train = train

    def applies(self, model: nn.Module) -> str:
        """Return that there is no output layer, where there is none."""
        return _NO_HEAD if _layer(model) is None else ""

    def prepare(
        self, model: nn.Module, task: Task, *, original: nn.Module | None, generator: torch.Generator
    ) -> Prepared:  # fmt: skip
        """Replace the layer; one that shares its weight with the embeddings gets its own."""
        full = step_work(model)
        names = {name for name, _ in model.named_parameters()}
        head = replace_head(model, generator)
        trained = [*(head if self.train == "head" else model).parameters()]
        untied = {name for name, _ in model.named_parameters()} - names
        return Prepared(
            model=model, groups=[{"params": trained}], relative_cost=relative_cost(model, trained, full),
            notes=("the output layer no longer shares its weight with the embeddings",) if untied else (),
        )  # fmt: skip


def replace_head(
    model: nn.Module, generator: torch.Generator, classes: int | None = None
) -> nn.Linear:
    """Put a fresh linear layer in the place of the output layer, with or without an inserted layer.

    Args:
        model: Changed in place; what its configuration says about classes is set, too.
        generator: The weights are drawn from it, uniform with variance 1/(3 in) as torch draws them.
        classes: Number of outputs; None keeps it.

    Returns:
        The new layer.

    Raises:
        SpecDefError: The model has no linear output layer.
    """
    path, old = head_path(model), _layer(model)
    if path is None or old is None:
        raise SpecDefError(_NO_HEAD, hint="Use an attack that keeps the output layer.")
    weight = old.get_parameter("weight")
    outputs, inputs = weight.shape if _is_row_major(old) else weight.shape[::-1]
    bound = 1 / math.sqrt(inputs)
    drawn = torch.rand(classes or outputs, inputs, generator=generator) * 2 * bound - bound
    new: nn.Linear = nn.utils.skip_init(  # type: ignore[no-untyped-call]
        nn.Linear, inputs, classes or outputs, bias=isinstance(getattr(old, "bias", None), Tensor),
        device=str(weight.device), dtype=weight.dtype,
    )  # fmt: skip
    with torch.no_grad():
        new.weight.copy_(drawn)
        if new.bias is not None:
            new.bias.zero_()
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, new.train(old.training))
    config: Any = getattr(model, "config", None)
    if classes is not None and hasattr(config, "num_labels"):
        config = copy.deepcopy(config)
        config.num_labels = classes
        model.config = config
    return new


def _layer(model: nn.Module) -> nn.Module | None:
    """Return the output layer where it is linear and not the model itself."""
    path = head_path(model)
    layer = model.get_submodule(path) if path else None
    base = layer._base if isinstance(layer, Compensated) else layer
    return None if isinstance(base, CONVOLUTIONS) else layer


def _is_row_major(layer: nn.Module) -> bool:
    base = layer._base if isinstance(layer, Compensated) else layer
    return isinstance(base, nn.Linear)
