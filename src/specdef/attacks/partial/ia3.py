"""IA3 through `peft`: one factor per channel of keys, values and the hidden layer of each MLP."""

from __future__ import annotations

import torch
from torch import nn

from specdef.attacks.attack import Attack, Prepared
from specdef.attacks.partial.adapters import exactly, insert_adapters, task_head
from specdef.attacks.partial.cost import relative_cost, step_work
from specdef.attacks.partial.parts import (
    attention_modules,
    blocks,
    linear_layers,
    members,
    projections,
)
from specdef.attacks.task import Task

KEY_VALUE = frozenset({"k", "key", "v", "value", "kv", "qkv", "wk", "wv", "wqkv", "attn", "xqkv"})
"""Words in the names of key and value projections, fused ones too."""


class IA3(Attack):
    """Scale the outputs of key and value projections and the inputs of each block's last linear layer."""

    name = "ia3"
    tier = 3
    cost = "one number per channel; a forward and most of a backward pass"
    source = "Liu et al. 2022, arXiv 2205.05638"
    summary = "train one factor per key, value and hidden channel"

    def applies(self, model: nn.Module) -> str:
        """Return that there is no attention with such projections, where there is none."""
        found = projections(model, KEY_VALUE)
        return "" if found else "no linear layer of attention is named after keys or values"

    def prepare(
        self, model: nn.Module, task: Task, *, original: nn.Module | None, generator: torch.Generator
    ) -> Prepared:  # fmt: skip
        """Insert the factors, which begin at 1; a classifier's output layer trains with them."""
        from peft import IA3Config

        full = step_work(model)
        head = task_head(model)
        hidden = _last_of_each_mlp(model)
        config = IA3Config(
            target_modules=exactly([*projections(model, KEY_VALUE), *hidden]),
            feedforward_modules=exactly(hidden),
        )
        trained = [*insert_adapters(model, config), *head]
        return Prepared(
            model=model,
            groups=[{"params": trained}],
            relative_cost=relative_cost(model, trained, full),
        )


def _last_of_each_mlp(model: nn.Module) -> list[str]:
    """List the last linear layer of every block that is in no attention: what the hidden channels go into."""
    attention = members(attention_modules(model))
    layers = linear_layers(model)
    paths = []
    for block in blocks(model):
        inside = members([block]) - attention
        own = [path for path, m in layers.items() if members([m]) & inside]
        paths += own[-1:]
    return paths
