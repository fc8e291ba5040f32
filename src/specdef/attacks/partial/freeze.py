"""Train one part of the model and freeze the rest."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil

import torch
from torch import nn

from specdef.attacks.attack import Attack, Prepared
from specdef.attacks.partial.cost import relative_cost, step_work
from specdef.attacks.partial.parts import (
    attention_modules,
    blocks,
    embedding_modules,
    head_path,
    is_norm,
    members,
    output_embeddings,
)
from specdef.attacks.task import Task


def _head(model: nn.Module) -> set[int]:
    path = head_path(model)
    return set() if path is None else members([model.get_submodule(path)])


def _norms(model: nn.Module) -> set[int]:
    return members(m for m in model.modules() if is_norm(m))


def _biases(model: nn.Module) -> set[int]:
    return {id(p) for name, p in model.named_parameters() if name.endswith("bias")}


def _attention(model: nn.Module) -> set[int]:
    return members(attention_modules(model))


def _mlp(model: nn.Module) -> set[int]:
    attention = _attention(model)
    return members(blocks(model)) - attention - _norms(model) if attention else set()


def _last_quarter(model: nn.Module) -> set[int]:
    found = blocks(model)
    return members(found[len(found) - ceil(len(found) / 4) :])


def _last_four(model: nn.Module) -> set[int]:
    found = blocks(model)
    return members(found[-4:]) if len(found) > 4 else set()


def _first_quarter(model: nn.Module) -> set[int]:
    found = blocks(model)
    return members(found[: ceil(len(found) / 4)])


def _embeddings(model: nn.Module) -> set[int]:
    return members(embedding_modules(model))


PATTERNS: dict[str, tuple[str, Callable[[nn.Module], set[int]], str]] = {
    "head": ("the output layer", _head, "linear probing"),
    "norms": ("the normalisations", _norms, "Frankle, Schwab & Morcos 2021, arXiv 2003.00152"),
    "biases": ("the biases", _biases, "BitFit: Ben Zaken, Ravfogel & Goldberg 2022, arXiv 2106.10199"),
    "attention": ("the attention layers", _attention, "Touvron et al. 2022, arXiv 2203.09795"),
    "mlp": ("the blocks without attention and normalisations", _mlp, "Touvron et al. 2022, arXiv 2203.09795"),
    "last-quarter": ("the last quarter of the blocks", _last_quarter, "Lee et al. 2019, arXiv 1911.03090"),
    "last-four": ("the last four of more than four blocks", _last_four, "Lee et al. 2019, arXiv 1911.03090"),
    "first-quarter": ("the first quarter of the blocks", _first_quarter, "Lee et al. 2023, arXiv 2210.11466"),
    "embeddings": ("the embeddings", _embeddings, "Artetxe, Ruder & Yogatama 2020, arXiv 1910.11856"),
}  # fmt: skip
"""Pattern -> what trains, how it is found, and who trained it alone."""


class TrainOnly(Attack):
    """Train one part of the model.

    Args:
        part: A key of `PATTERNS`.

    Raises:
        ValueError: There is no such pattern.
    """

    tier = 3
    cost = (
        "less than full training: the whole forward pass, and backward as far as the part reaches"
    )

    def __init__(self, part: str) -> None:
        if part not in PATTERNS:
            raise ValueError(f"part must be one of {', '.join(PATTERNS)}, got {part!r}.")
        what, _, self.source = PATTERNS[part]
        self.name = f"only-{part}"
        self.summary = f"train {what}, freeze the rest"
        self.part = part

    def applies(self, model: nn.Module) -> str:
        """Return that the model has no such part, where it has none."""
        return "" if self.trained(model) else f"the model has none of {PATTERNS[self.part][0]}"

    def trained(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Return what trains, by name.

        Args:
            model: Any module.

        Returns:
            Parameters of the part; a tied one counts to every part it is used in.
        """
        chosen = PATTERNS[self.part][1](model)
        return {
            name: p
            for name, p in model.named_parameters()
            if id(p) in chosen and p.is_floating_point()
        }

    def prepare(
        self, model: nn.Module, task: Task, *, original: nn.Module | None, generator: torch.Generator
    ) -> Prepared:  # fmt: skip
        """Take the part's parameters."""
        trained = list(self.trained(model).values())
        return Prepared(
            model=model, groups=[{"params": trained}],
            relative_cost=relative_cost(model, trained, step_work(model)), notes=tuple(self._notes(model)),
        )  # fmt: skip

    def _notes(self, model: nn.Module) -> list[str]:
        head = output_embeddings(model)
        tied = head is not None and bool(members([head]) & _embeddings(model))
        if tied and self.part in ("head", "embeddings"):
            return ["the output layer shares its weight with the embeddings: both train"]
        return []
