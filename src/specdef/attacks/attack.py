"""The attack: authors say what is edited and what trains; copying, training, judging and metering happen here, once."""

from __future__ import annotations

import copy
import time
from abc import ABC, abstractmethod
from typing import final

import torch
from torch import nn

from specdef.attacks.optimizers import OPTIMIZERS
from specdef.attacks.run import Run
from specdef.attacks.task import Budget, Setting, Task
from specdef.attacks.trial import Prepared as Prepared
from specdef.attacks.trial import Trial, Watch, cast_batches
from specdef.lock.deformation.memory import explained_memory
from specdef.lock.deformation.retain import measure_utility
from specdef.lock.randomness import forked_rng

_NAMING = ("name", "source", "summary")


class Attack(ABC):
    """A way to train a locked model.

    Subclasses set the class attributes and write `prepare`.
    """

    name: str
    """Unique; shown in reports and taken by `--only`."""
    tier: int
    """Threat tier, 1 to 6."""
    source: str
    """Where it comes from."""
    summary: str
    """One line for people."""
    cost: str = "that of full training, times the optimiser's"
    """What it takes, in words; a run reports the numbers."""
    optimizers: tuple[str, ...] = ("adamw",)
    """Whose learning rates are swept."""

    def applies(self, model: nn.Module) -> str:
        """Return why the attack does not apply to a model; empty where it does."""
        return ""

    @abstractmethod
    def prepare(
        self,
        model: nn.Module,
        task: Task,
        *,
        original: nn.Module | None,
        generator: torch.Generator,
    ) -> Prepared:
        """Edit a model and say what trains.

        Args:
            model: A copy that may be changed at will, in evaluation mode.
            task: What is to be learned.
            original: The unlocked model, for attackers who have it; must not be changed.
            generator: For whatever is drawn.

        Returns:
            The model and its parameter groups.
        """

    @final
    def __call__(
        self,
        model: nn.Module,
        task: Task,
        setting: Setting,
        budget: Budget,
        *,
        seed: int = 0,
        original: nn.Module | None = None,
        watch: Watch | None = None,
        idle: bool = False,
    ) -> Run:
        """Attack a copy of a model once.

        Args:
            model: The model; never changed.
            task: What is to be learned, and the data it is judged on.
            setting: One point of the sweep.
            budget: What it may cost.
            seed: Of the order of the batches and of whatever is drawn; the caller's random state is left as it was.
            original: The unlocked model, for attacks that use it.
            watch: Told how it goes; may end it.
            idle: Batches pass through the model, but no step is taken: what a rate of 0 would do.

        Returns:
            The run. A loss that is not finite is data, not an error.
        """
        size = sum(p.numel() for p in model.parameters())
        with forked_rng(model), explained_memory():
            torch.manual_seed(seed)
            began = time.perf_counter()
            victim = copy.deepcopy(model).eval().to(getattr(torch, setting.dtype))
            generator = torch.Generator().manual_seed(seed)
            prepared = self.prepare(victim, task, original=original, generator=generator)
            trial = Trial(prepared, task, setting, budget, seed, idle=idle)
            prepare_seconds = time.perf_counter() - began
            status = trial.run(watch)
            relative_change, swamped = trial.change()
            utility = None
            if len(task.retain) and min(trial.losses) < trial.losses[0]:
                utility = measure_utility(prepared.model, cast_batches(task.retain, setting)).value
            metrics = task.metrics(prepared.model) if task.metrics else {}
        return Run(
            attack=self.name, setting=setting, seed=seed, steps=tuple(trial.steps), losses=tuple(trial.losses),
            accuracies=tuple(trial.accuracies), status=status, utility=utility, seconds=trial.seconds,
            prepare_seconds=prepare_seconds, trained_parameters=sum(p.numel() for p in trial.parameters),
            added_parameters=max(0, sum(p.numel() for p in prepared.model.parameters()) - size),
            relative_cost=prepared.relative_cost * OPTIMIZERS[setting.optimizer].relative_cost,
            relative_change=relative_change, swamped=swamped,
            metrics=metrics, notes=prepared.notes,
        )  # fmt: skip

    def __repr__(self) -> str:
        """Return the name with every hyper-parameter: the identity of the attack in records and tests."""
        own = {n: v for n, v in sorted(vars(self).items()) if n[0] != "_" and n not in _NAMING}
        values = ", ".join(f"{name}={value!r}" for name, value in own.items())
        return f"{self.name}({values})"
