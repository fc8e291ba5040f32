"""The net of papers/001, Appendix C: two convolutions and a four-layer MLP, taught MNIST, locked, and then taught CIFAR-10."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from specdef.attacks.optimizers import OPTIMIZERS
from specdef.attacks.task import Budget, Setting, Task
from specdef.errors import SpecDefError
from specdef.experiments.figure4_data import (
    CLASSES,
    FILE,
    Pictures,
    balanced,
    batches_of,
    mnist_and_cifar,
    turned_digits,
)
from specdef.experiments.kept import Kept
from specdef.experiments.paper.data_files import data_file
from specdef.experiments.paper.locks import COMPENSATED, LOCKS, Recipes, lock_all
from specdef.experiments.paper.runs import Recipe
from specdef.experiments.record import Progress
from specdef.experiments.toy_locks_setup import compensated
from specdef.lock.deformation.config import DeformationConfig
from specdef.lock.deformation.retain import measure_utility

MODEL = "CNN"

BATCH_SIZE = 32
"""The paper's."""

PAPERS: dict[str, Setting] = {
    "sgd": Setting(optimizer="sgd", learning_rate=0.1),
    "adamw": Setting(optimizer="adamw", learning_rate=0.1, weight_decay=0.01),
    "kron": Setting(optimizer="kron", learning_rate=0.001),
    "xmat": Setting(optimizer="xmat", learning_rate=0.01),
}
"""Appendix C's preconditioners at its one rate each; the weight decay is torch's, as the paper names none."""

TITLES = {
    "sgd": "SGD", "adamw": "AdamW", "kron": "Kron", "xmat": "XMat", "lbfgs": "L-BFGS",
    "natural-gradient": "natural gradient", "kfac-1e-3": "K-FAC", "kfac-relative": "K-FAC, relative",
}  # fmt: skip
"""How people call the optimisers."""

SCALE, RAISED = 1e4, 4
"""Of the compensated lock: the scale of arXiv 2602.18868, and how many singular values of every layer it raises."""

_EVALUATED = 500  # pictures at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Attacks with the same budget.

    Args:
        steps: Of a run.
        batch_size: Pictures of a step; the paper's unless it says otherwise.
        papers: Optimisers run at the paper's rate, keys of `PAPERS`.
        sweeps: Optimisers whose rates are swept, on the first seeds.
        few: Optimisers too dear for that, with the only rates tried, on the first seeds.
        evaluations: Of a run at the paper's rate; a sweep has half as many.
        each: Held-out pictures of every class of CIFAR-10.
    """

    steps: int
    batch_size: int = BATCH_SIZE
    papers: tuple[str, ...] = ()
    sweeps: tuple[str, ...] = ()
    few: tuple[tuple[str, tuple[float, ...]], ...] = ()
    evaluations: int = 8
    each: int = 200

    @property
    def cost(self) -> str:
        """What a run costs, for people."""
        return f"{self.steps} steps of {self.batch_size}"

    @property
    def optimizers(self) -> tuple[str, ...]:
        """All that are run."""
        return tuple(dict.fromkeys((*self.papers, *self.sweeps, *(name for name, _ in self.few))))

    def recipes(self, *, swept: bool) -> tuple[Recipe, ...]:
        """Return attacks at given rates: the paper's, and on a swept seed those of few rates."""
        budget = Budget(steps=self.steps, evaluations=self.evaluations)
        tried = [Setting(optimizer=name, learning_rate=rate) for name, rates in self.few for rate in rates]  # fmt: skip
        settings = [*(PAPERS[name] for name in self.papers), *(tried if swept else ())]
        return tuple(Recipe(setting=setting, budget=budget) for setting in settings)

    @property
    def budget(self) -> Budget:
        """Of a run of a sweep."""
        return Budget(steps=self.steps, evaluations=max(1, self.evaluations // 2))


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The net, its training and its locks, and what attacks have.

    Args:
        data: "pictures": MNIST, then CIFAR-10; "digits": scikit-learn's, then the same on their sides, each with the next label.
        channels: Of both convolutions, which halve the sides.
        kernel: Their width.
        widths: Of the MLP's hidden layers.
        rows: Pictures of MNIST the net is trained on.
        epochs: Passes over them.
        lock_rows: Of these, those the deformation goes through.
        lock_epochs: Passes over them.
        heldout_rows: Others of these, which choose the state of the deformation that is kept.
        test_rows: Of MNIST, for accuracy before and after; of digits all that are left.
        groups: Attacks.
        swept: The first so many seeds are swept.
    """

    data: Literal["pictures", "digits"] = "pictures"
    channels: tuple[int, int] = (8, 16)
    kernel: int = 5
    widths: tuple[int, int, int] = (64, 64, 64)
    rows: int
    epochs: int
    lock_rows: int
    lock_epochs: int
    heldout_rows: int
    test_rows: int
    groups: tuple[Group, ...]
    swept: int = 1

    @property
    def goal(self) -> str:
        """What attackers teach the net."""
        return "CIFAR-10" if self.data == "pictures" else "turned digits"

    def deformation(self, seed: int) -> DeformationConfig:
        """Return the paper's recipe: it goes to the end, whatever it costs."""
        return DeformationConfig(epochs=self.lock_epochs, max_utility_loss=None, seed=seed)  # fmt: skip


def require(settings: Settings, data: Path | None) -> None:
    """Make sure, before any work, that nothing is missing.

    Args:
        settings: Its data and optimisers.
        data: Folder with CIFAR-10.

    Raises:
        SpecDefError: The file is missing, or a library of an optimiser is.
    """
    if settings.data == "pictures":
        data_file(data, FILE, "CIFAR-10")
    size = sum(p.numel() for p in fresh(settings, 0).parameters())
    for name in dict.fromkeys(o for group in settings.groups for o in group.optimizers):
        if reason := OPTIMIZERS[name].unusable(size):
            raise SpecDefError(f"{name} cannot be run.", hint=f"{reason}.")


def fresh(settings: Settings, seed: int) -> nn.Sequential:
    """Return the net with new weights: its layers stand in the order they are used, each hidden one before a ReLU.

    Args:
        settings: Its sizes.
        seed: Of the weights.

    Returns:
        The net; the global random state is as it was.
    """
    side = 8 if settings.data == "digits" else 28
    layers: list[nn.Module] = []
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        before = 1
        for channels in settings.channels:
            layers += [nn.Conv2d(before, channels, settings.kernel, stride=2), nn.ReLU()]
            before, side = channels, (side - settings.kernel) // 2 + 1
        layers.append(nn.Flatten())
        before *= side * side
        for width in settings.widths:
            layers += [nn.Linear(before, width), nn.ReLU()]
            before = width
        return nn.Sequential(*layers, nn.Linear(before, CLASSES))


def pictures(settings: Settings, data: Path | None, seed: int, say: Progress) -> Pictures:
    """Draw the pictures of a seed.

    Args:
        settings: How many of which set.
        data: Folder with CIFAR-10.
        seed: Decides which, and their order.
        say: Told when MNIST is fetched.

    Returns:
        The pictures.

    Raises:
        SpecDefError: A set is missing, cannot be read, or has too few pictures.
    """
    if settings.data == "digits":
        return turned_digits(seed, rows=settings.rows)
    assert data is not None  # `require` saw to it
    return mnist_and_cifar(
        data, seed, rows=settings.rows, test_rows=settings.test_rows, say=say,
        new_rows=max(group.steps * group.batch_size for group in settings.groups), each=max(g.each for g in settings.groups),
    )  # fmt: skip


def locked(
    original: nn.Sequential, drawn: Pictures, settings: Settings, seed: int, kept: Kept, say: Progress
) -> tuple[dict[str, nn.Module], list[dict[str, Any]]]:  # fmt: skip
    """Lock copies of the net by every recipe.

    Args:
        original: The net.
        drawn: Pictures.
        settings: How far the deformation goes.
        seed: Of the deformation.
        kept: The state of the experiment.
        say: Told how it goes.

    Returns:
        (locked nets by name, facts of each).
    """
    test = batches_of(drawn.own_test, _EVALUATED)
    cut, end = settings.lock_rows, settings.lock_rows + settings.heldout_rows
    retain, heldout = (
        batches_of((drawn.own[0][part], drawn.own[1][part]), size)
        for part, size in ((slice(cut), BATCH_SIZE), (slice(cut, end), _EVALUATED))
    )
    name = f"{MODEL}, seed {seed}"
    recipes = Recipes(deformation=settings.deformation(seed), compensated=None)
    nets, facts = lock_all(
        original, recipes, retain=retain, heldout=heldout, test=test, kept=kept, name=name, say=say
    )  # fmt: skip
    began = time.perf_counter()
    nets[COMPENSATED] = compensated(original, RAISED, SCALE).eval()
    before, after = (measure_utility(net, test) for net in (original, nets[COMPENSATED]))
    say(f"{name}, {COMPENSATED}: {before.metric} {before.value:.4f} before, {after.value:.4f} locked")  # fmt: skip
    facts.append(
        {
            "model": name, "lock": COMPENSATED, "utility_before": before.value, "utility_after": after.value,
            "metric": before.metric, "loss_before": before.loss, "loss_after": after.loss,
            "seconds": round(time.perf_counter() - began, 2), "scale": SCALE,
        }
    )  # fmt: skip
    order = {lock: place for place, lock in enumerate(LOCKS)}
    return dict(sorted(nets.items(), key=lambda item: order[item[0]])), sorted(facts, key=lambda fact: order[fact["lock"]])  # fmt: skip


def task(settings: Settings, drawn: Pictures, group: Group) -> Task:
    """Return what attackers want.

    Args:
        settings: They name it.
        drawn: Pictures.
        group: Its steps and their size, which the name tells.

    Returns:
        The task.
    """
    rows = group.steps * group.batch_size
    train = tuple(part[:rows] for part in drawn.new)
    return Task(name=f"{settings.goal}, {group.cost}", train=batches_of(train, group.batch_size), heldout=batches_of(balanced(*drawn.new_test, group.each), _EVALUATED))  # type: ignore[arg-type]  # fmt: skip
