"""What Table 1 of papers/001 is about, its vision half: a ResNet-18 that reads digits, and the tasks it is not meant to learn.

CIFAR-10 is made grey and 28 x 28 pixels small, as the net takes one channel. Of KMNIST there is the test half: its first 8,000 pictures
are for training. Size smoke takes scikit-learn's digits, turned into other tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor, nn

from specdef.attacks.task import Budget, Setting, Task
from specdef.data.idx import is_idx_folder
from specdef.data.pictures import picture_batches, read_pictures
from specdef.errors import SpecDefError
from specdef.experiments.deformation_measure import Settings as Original
from specdef.experiments.deformation_measure import batches
from specdef.experiments.max_lock_resnet import FASHION
from specdef.experiments.paper.data_files import data_file
from specdef.experiments.paper.runs import Plan, Recipe
from specdef.lock.deformation.retain import to_device

Batches = list[dict[str, Tensor]]
Split = Literal["train", "test"]

FILES = {"CIFAR-10": "cifar10.npz", "KMNIST": "kmnist_test.npz"}
"""Tasks whose pictures lie in one file of the data folder."""

CLOTHES = "Fashion-MNIST"
CLOTHES_FOLDER = "fashion-mnist"
"""Folder of the data folder with IDX files, instead of `FASHION`."""

EDITS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {"negatives": lambda x: 1 - x, "rotations": lambda x: torch.rot90(x, 1, (2, 3))}
)
"""Tasks made of digits."""

_EVALUATED = 500
"""Pictures of a batch that judges."""

MAIN = "full-adamw"
"""Swept on every task: the paper's attack at all rates."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A task the net is not meant to learn.

    Args:
        name: Key of `FILES` or `EDITS`, or `CLOTHES`.
        paper: Accuracy of the paper's unlocked net, a fraction.
        rows: Pictures to learn from.
        steps: Of the paper's attack.
        sweep: What a run of a sweep may cost.
        sweeps: Attacks whose learning rates are swept on every lock.
        further: More of them, on the deformation alone.
    """

    name: str
    paper: float
    rows: int
    steps: int
    sweep: Budget
    sweeps: tuple[str, ...] = (MAIN,)
    further: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The original, the new tasks, and what attacks may cost.

    Args:
        original: How the net is trained; its rows for the lock, too.
        targets: The new tasks.
        batch_size: Pictures of a batch of the paper's attacks.
        evaluations: Of a run of the paper's attack.
        further_steps: Of the paper's other optimisers; None takes those of its attack.
        sweep_batch_size: Pictures of a batch of the sweeps.
        heldout_rows: Pictures of each task all are judged on.
    """

    original: Original
    targets: tuple[Target, ...]
    batch_size: int = 32
    evaluations: int = 2
    further_steps: int | None = None
    sweep_batch_size: int = 32
    heldout_rows: int


def plan_of(settings: Settings, target: Target) -> Plan:
    """Return the attacks on one task: AdamW at 0.1, which the paper reports, AdaDelta and SGD with momentum, which it names, and sweeps.

    The rate of AdaDelta is that of the paper's own training, SGD's that of AdamW; weight decay is torch's default.

    Args:
        settings: What they may cost.
        target: The task.

    Returns:
        The plan.
    """
    further = settings.further_steps or target.steps
    attacks = (
        (Setting(optimizer="adamw", learning_rate=0.1, weight_decay=0.01), target.steps, settings.evaluations),
        (Setting(optimizer="adadelta", learning_rate=1.0), further, 1 if settings.further_steps else settings.evaluations),
        (Setting(optimizer="momentum", learning_rate=0.1), further, 1 if settings.further_steps else settings.evaluations),
    )  # fmt: skip
    recipes = [Recipe(setting=s, budget=Budget(steps=n, evaluations=e)) for s, n, e in attacks]
    return Plan(recipes=recipes, sweeps=target.sweeps, budget=target.sweep)


def require_data(settings: Settings, data: Path | None) -> None:
    """Refuse to begin without the pictures.

    Args:
        settings: Names the tasks.
        data: The folder with the public data sets.

    Raises:
        SpecDefError: A file is missing.
    """
    names = [target.name for target in settings.targets]
    for task in names:
        if task in FILES:
            data_file(data, FILES[task], task)
    if CLOTHES in names:
        clothes_folder(data)


def clothes_folder(data: Path | None) -> Path:
    """Return where Fashion-MNIST lies: a folder of the data folder, or where Debian's package puts it.

    Args:
        data: The folder with the public data sets.

    Returns:
        A folder of IDX files.

    Raises:
        SpecDefError: It is in neither.
    """
    own = [] if data is None else [data / CLOTHES_FOLDER]
    for folder in (*own, FASHION):
        if is_idx_folder(folder):
            return folder
    raise SpecDefError(
        f"{CLOTHES} is not in {' or '.join(map(str, (*own, FASHION)))}.",
        hint=f"apt-get install dataset-fashion-mnist, or put its four files into DIR/{CLOTHES_FOLDER} and give --data DIR.",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Own:
    """The net's own task.

    Args:
        retain: What it was trained on, for the locks.
        heldout: Pictures that choose the state of the deformation, new to it and to the lock.
        test: Pictures its utility is measured on.
    """

    retain: Batches
    heldout: Batches
    test: Batches


def own_task(settings: Settings, digits: Path | str, model: nn.Module, seed: int) -> Own:
    """Draw the net's own pictures.

    Args:
        settings: Its `original` is used.
        digits: "mnist" or a folder of IDX files.
        model: The net; batches lie on its device.
        seed: That of the original, which saw the first of the pictures drawn.

    Returns:
        The batches.
    """
    lock = settings.original
    size = settings.batch_size
    drawn = batches(digits, model, "train", size, lock.retain_rows + lock.heldout_rows, seed)
    cut = lock.retain_rows // size
    tests = min(lock.test_rows, _EVALUATED)
    test = batches(digits, model, "test", tests, lock.test_rows, 0)
    retain, heldout, test = (_placed(part, model) for part in (drawn[:cut], drawn[cut:], test))
    return Own(retain=retain, heldout=heldout, test=test)


def new_task(
    settings: Settings, target: Target, digits: Path | str, data: Path | None, model: nn.Module, seed: int, *, sweep: bool = False
) -> Task:  # fmt: skip
    """Draw the pictures of a task the net is not meant to learn.

    Args:
        settings: How many judge, and the batches.
        target: The task.
        digits: "mnist" or a folder of IDX files.
        data: The folder with the public data sets.
        model: The net; batches lie on its device.
        seed: Decides which pictures are learned from; those that judge are the same for all seeds.
        sweep: As sweeps take them: no more than one run sees.

    Returns:
        The task.

    Raises:
        SpecDefError: The pictures cannot be read, or there are fewer.
    """
    name, rows, size = target.name, target.rows, settings.batch_size
    if sweep:
        size = settings.sweep_batch_size
        rows = min(rows, target.sweep.steps * size)

    def drawn(split: Split, rows: int, size: int, seed: int) -> Batches:
        if name in FILES:
            assert data is not None  # as `require_data` has seen
            return picture_batches(*read_pictures(data / FILES[name], split, rows, seed=seed), size)
        folder = digits if name in EDITS else clothes_folder(data)
        found = batches(folder, model, split, size, rows, seed)
        if edit := EDITS.get(name):
            return [{**batch, "pixel_values": edit(batch["pixel_values"])} for batch in found]
        return found

    train = drawn("train", rows, size, seed)
    heldout = drawn("test", settings.heldout_rows, min(settings.heldout_rows, _EVALUATED), 0)
    return Task(name=name, train=_placed(train, model), heldout=_placed(heldout, model))


def _placed(parts: Batches, model: nn.Module) -> Batches:
    """Move batches to where the model is, once: every attack reads them again."""
    return [dict(to_device(batch, model)) for batch in parts]
