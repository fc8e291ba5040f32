"""Models and data for the calibration: pretrained on one task, locked or not, and asked how training on another would go.

Digits classifiers are pretrained on the ten digits (label smoothing 0.2 keeps them from saturating) and fine-tuned to data in
which the labels 0 to 3 have changed places; language models are pretrained on one text and fine-tuned to another, byte
by byte. Everything is float64, since locked models span more digits than float32 has, but for SmolLM2, which would not fit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

import specdef
from specdef.curvature.losses import ClassificationLoss, LMLoss
from specdef.curvature.operators import HessianOperator
from specdef.data.digits import digits
from specdef.data.texts import load_text, token_batches
from specdef.lock.config import LockConfig
from specdef.models.smollm2 import smollm2
from specdef.models.tiny import tiny_model

Batch = dict[str, Tensor]

LOCKS: dict[str, LockConfig] = {
    "uniform 2^4": LockConfig(schedule="uniform", scale=2.0**4),
    "uniform 2^10": LockConfig(schedule="uniform", scale=2.0**10),
    "convex 2^8..2^30": LockConfig.preset("convex"),
    "compensated 16": LockConfig(method="compensated", scale=16.0, k=2, num_layers=2),
    "scaled 16": LockConfig(method="scaled", scale=16.0, k=2, num_layers=2),
}
"""What the transformers and the residual network are locked with; compensated and scaled where the family has linear layers."""

CHANNEL_SCALES = {"channel 2^4": 2.0**4, "channel 2^10": 2.0**10}
"""What the plain networks are locked with: in every hidden layer the most active channel, a power of two."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One model with its lock and its data.

    Args:
        family: mlp, cnn, resnet, gpt2, llama, smollm2.
        lock: "none" or the lock's name.
        operator: The Hessian of the new task.
    """

    family: str
    lock: str
    operator: HessianOperator


def cases(families: tuple[str, ...], *, locks: int = 5, seed: int = 0) -> Iterator[Case]:
    """Make the models one after another.

    Args:
        families: Which.
        locks: How many locks of each, the unlocked model not counted.
        seed: Of weights and data.

    Yields:
        The cases, the unlocked model of a family first.
    """
    for family in families:
        if family in ("mlp", "cnn"):
            yield from _plain(family, locks, seed)
        elif family == "resnet":
            yield from _resnet(locks, seed)
        elif family == "smollm2":
            yield from _smollm2(locks, seed)
        else:
            yield from _language(family, locks, seed)


def _plain(family: str, locks: int, seed: int) -> Iterator[Case]:
    images, labels = drawn_digits(256, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = _mlp() if family == "mlp" else _cnn()
    x = images.flatten(1) if family == "mlp" else images
    net = net.double()
    _pretrain(net, lambda: nn.functional.cross_entropy(net(x), labels, label_smoothing=0.2), 100, 1e-2)  # fmt: skip
    scales = {"none": 1.0} | dict(list(CHANNEL_SCALES.items())[:locks])
    for name, scale in scales.items():
        locked = net if scale == 1.0 else rescaled(net, x, scale)
        data = [(x, _swapped(labels))]
        yield Case(family=family, lock=name, operator=HessianOperator(locked, data, ClassificationLoss()))  # fmt: skip


def _resnet(locks: int, seed: int) -> Iterator[Case]:
    images, labels = drawn_digits(48, seed)
    pixels = nn.functional.interpolate(images, scale_factor=4).expand(-1, 3, -1, -1).contiguous()
    net = tiny_model("resnet", seed=seed, num_labels=10).double()

    def loss() -> Tensor:
        return nn.functional.cross_entropy(net(pixel_values=pixels).logits, labels, label_smoothing=0.2)  # fmt: skip

    _pretrain(net, loss, 60, 3e-3)
    batch = {"pixel_values": pixels, "labels": _swapped(labels)}
    for name, model in _locked(net, [n for n in LOCKS if "2^" in n][:locks]):
        yield Case(family="resnet", lock=name, operator=HessianOperator(model, [batch], ClassificationLoss()))  # fmt: skip


def _language(family: str, locks: int, seed: int) -> Iterator[Case]:
    # Biases of attention and MLP, which only Llama's config can switch off, are not in the real models.
    extra: dict[str, Any] = (
        {"attention_bias": False, "mlp_bias": False} if family == "llama" else {}
    )
    net = tiny_model(family, seed=seed, **extra).double()
    old, new = _bytes("sotu"), _bytes("moby-dick")
    _pretrain(net, lambda: net(**old).loss, 60, 3e-3)
    for name, model in _locked(net, list(LOCKS)[:locks]):
        yield Case(family=family, lock=name, operator=HessianOperator(model, [new], LMLoss()))


def _smollm2(locks: int, seed: int) -> Iterator[Case]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = smollm2()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    data = token_batches(load_text("moby-dick"), tokenizer, batch_size=2, length=32, num_batches=1, seed=seed)  # fmt: skip
    # The last two blocks: all 135M parameters take an hour where these take minutes.
    trained = ["model.layers.28", "model.layers.29"]
    names = ["none", "uniform 2^10", "convex 2^8..2^30"]
    for name in names[: locks + 1]:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        if name != "none":
            model = specdef.lock_model(model, LOCKS[name]).model
        yield Case(
            family="smollm2", lock=name, operator=HessianOperator(model, data, LMLoss(), trained)
        )


def _locked(net: nn.Module, names: list[str]) -> Iterator[tuple[str, nn.Module]]:
    """Give the model and its locked copies, all with the weights of its float32 rounding: what locks are made for."""
    net = net.float()
    yield "none", copy.deepcopy(net).double()
    for name in names:
        yield name, specdef.lock_model(copy.deepcopy(net), LOCKS[name]).model.double()


def rescaled(net: nn.Sequential, x: Tensor, scale: float) -> nn.Sequential:
    """Lock the most active channel of every hidden layer: what makes it is divided by the scale, what reads it multiplied.

    Args:
        net: Linear or convolutional layers with ReLU between, and what keeps channels apart.
        x: Inputs, to see which channel is the most active.
        scale: A power of two, so that the function stays the same bit for bit.

    Returns:
        A locked copy.
    """
    net = copy.deepcopy(net)
    layers = [i for i, module in enumerate(net) if isinstance(module, nn.Linear | nn.Conv2d)]
    with torch.no_grad():
        for here, after in pairwise(layers):
            maker: Any = net[here]
            reader: Any = net[after]
            active = net[: here + 2](x).transpose(0, 1).flatten(1).norm(dim=1)
            c = int(active.argmax())
            maker.weight[c] /= scale
            maker.bias[c] /= scale
            per_channel = reader.weight.shape[1] // maker.weight.shape[0]  # after a flattening
            reader.weight[:, c * per_channel : (c + 1) * per_channel] *= scale
    return net


def drawn_digits(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return scikit-learn's 8 x 8 digits.

    Args:
        count: How many, drawn at random.
        seed: Of the draw.

    Returns:
        Images `[count, 1, 8, 8]` float64 with mean 0 and variance 1, labels `[count]`.

    Raises:
        SpecDefError: scikit-learn is not installed.
    """
    pixels, labels = digits()
    drawn = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[:count]
    images = torch.tensor(pixels, dtype=torch.float64)[drawn][:, None]
    return (images - images.mean()) / images.std(), torch.tensor(labels)[drawn].long()


def _mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))  # fmt: skip


def _cnn() -> nn.Sequential:
    first = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    second = [nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(64, 10))


def _swapped(labels: Tensor) -> Tensor:
    return torch.where(labels < 4, (labels + 1) % 4, labels)


def _bytes(name: str, rows: int = 8, length: int = 24) -> Batch:
    """Return a piece of a text as tokens 3..95, which is what the tiny vocabularies have room for."""
    raw = load_text(name).encode()[2000 : 2000 + rows * length]
    tokens = torch.tensor([byte % 93 + 3 for byte in raw]).view(rows, length)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens.clone()}  # fmt: skip


def _pretrain(net: nn.Module, loss: Callable[[], Tensor], steps: int, rate: float) -> None:
    method = torch.optim.Adam(net.parameters(), lr=rate)
    for _ in range(steps):
        method.zero_grad()
        torch.autograd.backward(loss())
        method.step()
    net.zero_grad()
    net.eval()
