"""Quantise and dequantise the weights, then train: rounding to a grid swallows what a lock makes small."""

from __future__ import annotations

import torch
from torch import nn

from specdef.attacks.attack import Attack, Prepared
from specdef.attacks.structural.edits import everything, matrices, without_matrices
from specdef.attacks.task import Task
from specdef.lock.quantization import round_to_grid


class Quantise(Attack):
    """Round every weight matrix to a symmetric grid, with one step per output channel or per group of its inputs.

    Args:
        bits: Width of the integers.
        group: Inputs that share a step; None for all of an output channel.

    Raises:
        ValueError: A number is too small.
    """

    tier = 5
    cost = "a pass over the weights, once, and what rounding costs in utility"
    source = "round to nearest: LLM.int8() (Dettmers et al. 2022) per channel, GPTQ's baseline (Frantar et al. 2023) per group"

    summary = (
        "round weights to integers, one step per output channel or group of inputs, then train all"
    )

    def __init__(self, bits: int = 8, group: int | None = None) -> None:
        if bits < 2 or (group is not None and group < 1):
            raise ValueError(f"bits must be at least 2 and group at least 1, got {bits}, {group}.")
        self.name = f"quantise-int{bits}" + (f"-group{group}" if group else "")
        self.bits = bits
        self.group = group

    def applies(self, model: nn.Module) -> str:
        """Return why there is nothing to round."""
        return without_matrices(model)

    def prepare(
        self, model: nn.Module, task: Task, *, original: nn.Module | None, generator: torch.Generator
    ) -> Prepared:  # fmt: skip
        """Round, then train everything; what it costs is in the utility."""
        for _, matrix in matrices(model):
            matrix.copy_(round_to_grid(matrix, self.bits, self.group))
        return Prepared(model=model, groups=everything(model))
