"""Small nets of further modalities: a denoiser (what an image generator by diffusion is), a style transfer, a ViT."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from specdef.attacks.fit import batch_loss, fit
from specdef.curvature.losses import Batch
from specdef.data.digits import digits
from specdef.data.idx import is_idx_folder, read_idx_folder
from specdef.data.mnist import mnist
from specdef.errors import SpecDefError
from specdef.experiments.limits_setup import DENOISER, STYLE, VIT, Pictures
from specdef.experiments.max_lock_resnet import FASHION

RATE = 2e-3
"""AdamW's first learning rate when originals are trained."""
BATCH = 32
"""Pictures of a batch there."""

Split = tuple[Tensor, Tensor]
"""Pictures float32 [n, 1, side, side] in [0, 1], and classes [n]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Modality:
    """One kind of model, untrained, and both tasks.

    Args:
        name: Of the modality.
        model: With seeded weights.
        quantity: "accuracy" or "loss": what tables are about.
        own: Batches of its own task, once through.
        own_test: The same of pictures that nothing is trained on.
        new: Batches of what attackers teach.
        new_test: The same, held out.
        locked: Names of the matrices the compensated lock takes; None are all.
    """

    name: str
    model: nn.Module
    quantity: str
    own: list[Batch]
    own_test: list[Batch]
    new: list[Batch]
    new_test: list[Batch]
    locked: tuple[str, ...] | None = None


def require_pictures(settings: Pictures) -> None:
    """Say what is missing, before anything is done.

    Args:
        settings: Says which pictures.

    Raises:
        SpecDefError: Fashion-MNIST is not installed.
    """
    if settings.data == "mnist" and not is_idx_folder(FASHION):
        raise SpecDefError(f"Fashion-MNIST is not in {FASHION}.", hint="apt-get install dataset-fashion-mnist")  # fmt: skip


def read_all(settings: Pictures, seed: int) -> dict[str, Split]:
    """Read the pictures of both tasks.

    Args:
        settings: Which, and how many.
        seed: Decides which are drawn.

    Returns:
        "own", "own test", "new" and "new test": splits.
    """
    attack = settings.steps * settings.batch_size
    sizes = {"own": settings.rows, "own test": settings.tests, "new": attack, "new test": settings.tests}  # fmt: skip
    if settings.data == "digits":
        images, labels = digits()
        pictures = torch.as_tensor(images).float()[:, None] / 16
        classes = torch.as_tensor(labels).long()
        tests = settings.tests
        parts = {"own": slice(0, -2 * tests), "own test": slice(-tests, None), "new": slice(0, -2 * tests), "new test": slice(-2 * tests, -tests)}  # fmt: skip
        found = {n: (pictures[p], classes[p]) for n, p in parts.items()}
        found |= {n: (1 - found[n][0], found[n][1]) for n in ("new", "new test")}
    else:
        found = {n: _idx(folder, split) for n, folder, split in _places(mnist())}
    return {n: _drawn(split, sizes[n], seed) for n, split in found.items()}


def make_modality(name: str, settings: Pictures, splits: Mapping[str, Split], seed: int) -> Modality:  # fmt: skip
    """Build one net and its batches.

    Args:
        name: `DENOISER`, `STYLE` or `VIT`.
        settings: Sizes.
        splits: Of `read_all`.
        seed: Of weights and noise.

    Returns:
        The modality.

    Raises:
        ValueError: There is no such modality.
    """
    if name not in (DENOISER, STYLE, VIT):
        raise ValueError(f"name must be one of {DENOISER}, {STYLE}, {VIT}, got {name!r}.")
    generator = torch.Generator().manual_seed(seed)
    sizes = {"own": BATCH, "own test": settings.tests, "new": settings.batch_size, "new test": settings.tests}  # fmt: skip
    made: dict[str, list[Batch]] = {}
    for part, size in sizes.items():
        pictures, labels = splits[part.replace("new", "own") if name == STYLE else part]
        if name == VIT:
            cut = zip(torch.split(pictures, size), torch.split(labels, size), strict=True)
            made[part] = [{"pixel_values": x, "labels": y} for x, y in cut]
        elif name == DENOISER:
            made[part] = [noisy(x, settings.patch, generator) for x in torch.split(pictures, size)]
        else:
            style = edges if part.startswith("own") else bold
            kept = torch.split(pictures[: len(splits[part][0])], size)
            made[part] = [[_channels(x, settings.patch), _channels(style(x), settings.patch)] for x in kept]  # fmt: skip
    with torch.random.fork_rng(devices=[]):  # modules draw from the global generator
        torch.manual_seed(seed)
        model = _vit(settings) if name == VIT else _convolutions(name, settings)
    return Modality(
        name=name, model=model.eval(), quantity="accuracy" if name == VIT else "loss", own=made["own"], own_test=made["own test"],
        new=made["new"], new_test=made["new test"], locked=None if name == VIT else tuple("02468"),
    )  # fmt: skip


def train_own(modality: Modality, model: nn.Module, epochs: int, seed: int) -> None:
    """Train a net on its own task, in place.

    Args:
        modality: Its batches.
        model: The net.
        epochs: Passes over them.
        seed: Of their order.
    """
    fit(
        model,
        modality.own,
        batch_loss,
        steps=epochs * len(modality.own),
        learning_rate=RATE,
        seed=seed,
    )


def noisy(pictures: Tensor, patch: int, generator: torch.Generator) -> list[Tensor]:
    """Return (noisy pictures with their noise level as one more channel, clean pictures), squares of pixels as channels.

    Args:
        pictures: [n, 1, side, side].
        patch: Side of the squares.
        generator: Draws levels in [0.2, 1] and Gaussian noise.

    Returns:
        Input and target.
    """
    level = 0.2 + 0.8 * torch.rand(len(pictures), 1, 1, 1, generator=generator)
    noise = level * torch.randn(pictures.shape, generator=generator)
    clean = _channels(pictures, patch)
    plane = level.expand(-1, 1, *clean.shape[2:])
    return [torch.cat([_channels(pictures + noise, patch), plane], 1), clean]


def edges(pictures: Tensor) -> Tensor:
    """Return the size of the gradient of every pixel, by Sobel's filters."""
    x = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]]) / 4
    found = functional.conv2d(pictures, torch.stack([x, x.T])[:, None], padding=1)
    return found.square().sum(1, keepdim=True).sqrt()


def bold(pictures: Tensor) -> Tensor:
    """Return the pictures as a broad brush paints them: the largest of 3 x 3 pixels."""
    return functional.max_pool2d(pictures, 3, stride=1, padding=1)


def _channels(pictures: Tensor, patch: int) -> Tensor:
    return functional.pixel_unshuffle(pictures, patch)


def _convolutions(name: str, settings: Pictures) -> nn.Module:
    out, width = settings.patch**2, settings.width
    sizes = [out + (name == DENOISER), *[width] * 5, out]
    layers: list[nn.Module] = []
    for i, size in enumerate(sizes[:-1]):
        layers += [nn.Conv2d(size, sizes[i + 1], 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _vit(settings: Pictures) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    width = settings.width + settings.width // 3  # 64 beside 48 channels
    patch = settings.patch if settings.data == "digits" else 7
    model: nn.Module = ViTForImageClassification(
        ViTConfig(
            hidden_size=width - width % 4, intermediate_size=2 * (width - width % 4), num_hidden_layers=settings.blocks,
            num_attention_heads=4, image_size=settings.side, patch_size=patch, num_channels=1, num_labels=10,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip
    return model


def _places(own: Path) -> list[tuple[str, Path, str]]:
    return [("own", own, "train"), ("own test", own, "test"), ("new", FASHION, "train"), ("new test", FASHION, "test")]  # fmt: skip


def _idx(folder: Path, split: str) -> Split:
    images, labels = read_idx_folder(folder, split)
    pictures: Any = torch.from_numpy(images.copy()).float()[:, None] / 255
    return pictures, torch.from_numpy(labels.copy()).long()


def _drawn(split: Split, rows: int, seed: int) -> Split:
    order = torch.randperm(len(split[0]), generator=torch.Generator().manual_seed(seed))[:rows]
    return split[0][order], split[1][order]
