"""Rebuild: distil the locked model's outputs into a fresh model, which no lock has touched, and train that."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from specdef.attacks.attack import Attack, Prepared
from specdef.attacks.fit import fit
from specdef.attacks.rebuild.twin import fresh_twin, why_no_twin
from specdef.attacks.structural.edits import fitted
from specdef.attacks.task import Task
from specdef.curvature.losses import Batch, MSELoss
from specdef.lock.deformation.retain import Retain, task_loss


class Distil(Attack):
    """Train a fresh twin to give the model's outputs (KL, or squared error in regression), then train it on the task.

    Inputs are the task's retain and training batches; their labels are not used, except to tell which tokens count.

    Args:
        steps: Steps of the distillation, which the budget of the attack does not count.
        learning_rate: Its first rate, of AdamW.
    """

    name = "distil"
    tier = 6
    cost = "training a fresh model on the outputs, outside the budget; its time is reported"
    source = "Hinton, Vinyals & Dean 2015, arXiv 1503.02531"
    summary = "distil the outputs into a fresh model of the same architecture, then train that"

    def __init__(self, steps: int = 200, learning_rate: float = 1e-3) -> None:
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}.")
        self.steps, self.learning_rate = steps, learning_rate

    def applies(self, model: nn.Module) -> str:
        """Return why no fresh twin can be made, where none can."""
        return why_no_twin(model)

    def prepare(
        self, model: nn.Module, task: Task, *, original: nn.Module | None, generator: torch.Generator
    ) -> Prepared:  # fmt: skip
        """Distil."""
        twin = fresh_twin(model, generator)
        loss = None if isinstance(task.loss, MSELoss) else task.loss
        retain = Retain(model, kind="kl", teacher="online", loss=loss)
        batches = [*task.retain, *task.train]

        def divergence(student: nn.Module, batch: Batch) -> Tensor:
            own = fitted(batch, student)
            kind = task_loss(student, own, task.loss)
            if not isinstance(kind, MSELoss):
                return retain(student, own, 0)
            with torch.no_grad():
                wanted = kind.outputs(model, own)
            return functional.mse_loss(kind.outputs(student, own), wanted)

        seed = int(torch.randint(2**31, (), generator=generator))
        last = fit(twin, batches, divergence, steps=self.steps, learning_rate=self.learning_rate, seed=seed)  # fmt: skip
        return Prepared(
            model=twin, groups=[{"params": list(twin.parameters())}],
            notes=(f"{self.steps} steps of distillation came first; their last loss was {last:.3g}",),
        )  # fmt: skip
