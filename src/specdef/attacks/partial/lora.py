"""LoRA and DoRA through `peft`: low-rank updates beside the layers of the model, whose own weights stay."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from specdef.attacks.attack import Attack, Prepared
from specdef.attacks.partial.adapters import exactly, insert_adapters, task_head
from specdef.attacks.partial.cost import relative_cost, step_work
from specdef.attacks.partial.parts import (
    head_path,
    linear_layers,
    projections,
    stacked_experts,
)
from specdef.attacks.task import Task

QUERY_VALUE = frozenset(
    {"q", "query", "v", "value", "qv", "kv", "qkv", "wq", "wv", "wqkv", "attn", "xqkv"}
)
"""Words in the names of query and value projections, fused ones too."""


class LoRA(Attack):
    """W x + (2 B A) x with A and B of rank r, for some layers of the model.

    Beside an inserted layer C the update stands beside the pair: C W~ x + 2 B A x does not pass through C.

    Args:
        r: Rank.
        targets: "attention": the query and value projections, as the paper has it; "all": every linear layer and
            convolution but the output layer, as QLoRA (arXiv 2305.14314) has it, and stacked experts.
        dora: Train the norms of the columns apart from their directions; stacked experts stay as they are.
    """

    tier = 3
    cost = "r (inputs + outputs) numbers per layer; a forward and a backward pass without gradients of the large matrices"

    def __init__(
        self, r: int = 8, targets: Literal["attention", "all"] = "attention", dora: bool = False
    ) -> None:
        self.name = ("dora" if dora else "lora") + ("-all" if targets == "all" else "")
        self.source = (
            "Liu et al. 2024, arXiv 2402.09353" if dora else "Hu et al. 2022, arXiv 2106.09685"
        )
        where = "query and value projections" if targets == "attention" else "all linear layers and convolutions"  # fmt: skip
        self.summary = f"{'DoRA' if dora else 'LoRA'} of rank {r} on {where}"
        self.r, self.targets, self.dora = r, targets, dora

    def applies(self, model: nn.Module) -> str:
        """Return that there is no layer to adapt, where there is none."""
        if self.adapted(model):
            return ""
        if self.targets == "attention":
            return "no linear layer of attention is named after queries or values"
        return "no linear layer or convolution besides the output layer"

    def adapted(self, model: nn.Module) -> list[str]:
        """List the layers that get an update.

        Args:
            model: Any module.

        Returns:
            Paths, in the order of the model.
        """
        if self.targets == "attention":
            return projections(model, QUERY_VALUE)
        head = head_path(model)
        # peft splits the rank among the groups of a convolution
        return [
            path
            for path, module in linear_layers(model).items()
            if path != head and self.r % getattr(module, "groups", 1) == 0
        ]

    def prepare(
        self, model: nn.Module, task: Task, *, original: nn.Module | None, generator: torch.Generator
    ) -> Prepared:  # fmt: skip
        """Insert the updates, which begin at 0; a classifier's output layer trains with them."""
        from peft import LoraConfig

        full = step_work(model)
        head = task_head(model)
        stacked = self.targets == "all" and not self.dora
        config = LoraConfig(
            r=self.r, lora_alpha=2 * self.r, target_modules=exactly(self.adapted(model)), use_dora=self.dora,
            target_parameters=stacked_experts(model) if stacked else None,
        )  # fmt: skip
        trained = [*insert_adapters(model, config), *head]
        return Prepared(
            model=model,
            groups=[{"params": trained}],
            relative_cost=relative_cost(model, trained, full),
        )
