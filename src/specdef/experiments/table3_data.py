"""The pictures of Table 3: CIFAR-10, or coarse patterns made here, in batches for everything that is trained and measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from specdef.attacks.goals.measure import where
from specdef.curvature.losses import Batch
from specdef.data.pictures import picture_batches, read_pictures
from specdef.experiments.paper.data_files import data_file

CLASSES = ("plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
"""CIFAR-10's, in the order of its labels and under the paper's names."""

CAR = CLASSES.index("car")
FILE = "cifar10.npz"

_EVALUATED = 250


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The net, its training, its unlearning, and how many pictures everything has.

    Args:
        data: "cifar10", or "made": noisy pictures of ten random patterns.
        side: Height and width of the pictures.
        hidden_sizes: Channels of each stage; the default with `depths` is ResNet-18.
        depths: Blocks of each stage.
        rows: Pictures the original is trained on, cars among them.
        training_batch_size: Of the original's training.
        batch_size: Of everything else.
        epochs: Passes over them, by AdamW at a rate that falls linearly to 0.
        learning_rate: The first rate.
        unlearning_steps: Steps without cars after which it is seen whether the net still knows one.
        unlearning_rate: First rate of each such part.
        unlearning_parts: Parts at most.
        retain_rows: Of `rows`, those the deformation goes through, without their cars.
        utility_rows: Of `heldout_rows`, pictures of other classes the deformation's utility is followed on.
        attack_rows: Of `rows`, those the attacker has, cars among them.
        test_rows: Pictures of the test split all accuracies are measured on.
        heldout_rows: Others of the test split, of which all cars and as many other pictures choose the best rate of a sweep.
    """

    data: Literal["cifar10", "made"] = "cifar10"
    side: int = 32
    hidden_sizes: tuple[int, ...] = (64, 128, 256, 512)
    depths: tuple[int, ...] = (2, 2, 2, 2)
    rows: int
    training_batch_size: int = 64
    batch_size: int = 32
    epochs: int
    learning_rate: float = 1e-3
    unlearning_steps: int
    unlearning_rate: float = 1e-3
    unlearning_parts: int = 5
    retain_rows: int
    utility_rows: int = 500
    attack_rows: int
    test_rows: int
    heldout_rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Pictures:
    """The pictures of one seed.

    Args:
        original: Batches the original is trained on.
        train: The same pictures in batches for everything else.
        test: Batches accuracies are measured on.
        heldout: Further ones of the test split.
    """

    original: list[dict[str, Tensor]]
    train: list[dict[str, Tensor]]
    test: list[dict[str, Tensor]]
    heldout: list[dict[str, Tensor]]


def require_data(settings: Settings, data: Path | None) -> None:
    """Refuse to begin without the pictures.

    Args:
        settings: Of the experiment.
        data: Folder of public data sets.

    Raises:
        SpecDefError: CIFAR-10 is wanted and not there.
    """
    if settings.data == "cifar10":
        data_file(data, FILE, "CIFAR-10")


def pictures(settings: Settings, data: Path | None, seed: int) -> Pictures:
    """Draw the pictures of a seed.

    Args:
        settings: How many.
        data: Folder with cifar10.npz; not looked at for made pictures.
        seed: Decides which. Those of the test split and their parts are the same for all seeds.

    Returns:
        Batches.

    Raises:
        SpecDefError: The file is missing, damaged, or has too few pictures.
    """
    require_data(settings, data)
    wanted = {"train": settings.rows, "test": settings.test_rows + settings.heldout_rows}
    seeds = {"train": seed, "test": 0}
    drawn = {
        split: made_pictures(split, rows, settings.side, seeds[split])
        if settings.data == "made" or data is None
        else read_pictures(data / FILE, split, rows, seed=seeds[split], side=settings.side, channels=3)
        for split, rows in wanted.items()
    }  # fmt: skip
    (x, y), cut = drawn["test"], settings.test_rows
    return Pictures(
        original=picture_batches(*drawn["train"], settings.training_batch_size),
        train=picture_batches(*drawn["train"], settings.batch_size),
        test=picture_batches(x[:cut], y[:cut], _EVALUATED),
        heldout=picture_batches(x[cut:], y[cut:], _EVALUATED),
    )


def made_pictures(split: str, rows: int, side: int, seed: int) -> tuple[Tensor, Tensor]:
    """Make noisy pictures of ten coarse patterns, the same patterns for every split and seed.

    Args:
        split: train or test: other noise.
        rows: How many; classes take turns.
        side: Height and width, a multiple of 4.
        seed: Of the noise.

    Returns:
        (float32 [rows, 3, side, side] in [0, 1], int64 [rows]).
    """
    coarse = torch.rand(len(CLASSES), 3, 4, 4, generator=torch.Generator().manual_seed(1))
    patterns = functional.interpolate(coarse, size=(side, side))
    generator = torch.Generator().manual_seed(2 * seed + (split == "test"))
    labels = torch.arange(rows) % len(CLASSES)
    noise = torch.randn(rows, 3, side, side, generator=generator)
    return (patterns[labels] + 0.15 * noise).clamp(0, 1), labels


def cars_of(batches: Sequence[Batch]) -> list[Batch]:
    """Return the rows that are cars."""
    return where(batches, lambda labels: labels == CAR)


def others_of(batches: Sequence[Batch]) -> list[Batch]:
    """Return the rows that are none."""
    return where(batches, lambda labels: labels != CAR)


def first_rows(batches: Sequence[Batch], count: int) -> list[Batch]:
    """Return the first rows of batches, so many in all or as many as there are."""
    kept: list[Batch] = []
    for batch in batches:
        own: dict[str, Any] = dict(batch)
        rows = {name: value[:count] for name, value in own.items()}
        kept += [rows] if count else []
        count -= len(rows["labels"])
    return kept
