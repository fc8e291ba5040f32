"""The net, the task and the locks of the toy table: an MLP that reads digits, locked along the symmetries of its own ReLUs."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from specdef.attacks.structural.sites import rescale, symmetric_sites
from specdef.attacks.task import Task
from specdef.data.digits import digits
from specdef.lock.config import LockConfig
from specdef.lock.in_memory import unique_tensors
from specdef.lock.schedule import exponents
from specdef.spectral.topk import topk_svd
from specdef.symmetries import Site

HELD_OUT = 397
"""Of the 1797 digits of scikit-learn, of either task."""

TRAINED_STEPS, TRAINED_RATE = 150, 3e-3
"""Full-batch Adam steps in which the net learns to read digits before it is locked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Net:
    """Sizes of the net and its data.

    Args:
        hidden: Width of the hidden layers, all the same.
        depth: Their number: each is a site of the lock.
        batch_size: Rows of a batch of the attack.
        epochs: Of the attack.
        rows: Rows it trains on.
    """

    hidden: int = 64
    depth: int = 3
    batch_size: int = 64
    epochs: int = 5
    rows: int = 1400


@dataclass(frozen=True, slots=True, kw_only=True)
class ToyLock:
    """A lock of the net.

    Args:
        low: Lowest exponent of two.
        high: Highest.
        channel: Which channel of every hidden layer is scaled; every: all of them alike.
        compensated: Instead scale the largest singular values by `scale`, and insert a layer that takes it back.
        k: How many singular values.
        scale: By how much.
    """

    low: int = 0
    high: int = 0
    channel: Literal["most active", "least active", "every"] = "least active"
    compensated: bool = False
    k: int = 4
    scale: float = 1e4


LOCKS: dict[str, ToyLock] = {
    "uniform 2^10, most active": ToyLock(low=10, high=10, channel="most active"),
    "staggered 2^4..2^20, least active": ToyLock(low=4, high=20),
    "staggered 2^8..2^40, least active": ToyLock(low=8, high=40),
    "every channel 2^10": ToyLock(low=10, high=10, channel="every"),
    "compensated 1e4, k 4": ToyLock(compensated=True),
}
"""The columns of the table after the unlocked one."""


def problem(net: Net, seed: int) -> tuple[nn.Sequential, Task]:
    """Train the net on digits, and make the task of reading them with permuted pixels.

    Args:
        net: Sizes.
        seed: Of the weights, the rows held out, and the permutation.

    Returns:
        The net in evaluation mode and the task; its retain data are digits as they are.

    Raises:
        SpecDefError: scikit-learn is not installed.
    """
    generator = torch.Generator().manual_seed(seed)
    x, y = shuffled_digits(generator)
    permuted = x[:, torch.randperm(64, generator=generator)]
    train, test = slice(0, net.rows), slice(len(x) - HELD_OUT, None)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = nn.Sequential(*_layers(net))
        optimizer = torch.optim.Adam(model.parameters(), lr=TRAINED_RATE)
        for _ in range(TRAINED_STEPS):
            optimizer.zero_grad()
            torch.autograd.backward(nn.functional.cross_entropy(model(x[train]), y[train]))
            optimizer.step()
    batches = zip(torch.split(permuted[train], net.batch_size), torch.split(y[train], net.batch_size), strict=True)  # fmt: skip
    task = Task(
        name="permuted digits", train=[list(batch) for batch in batches], heldout=[[permuted[test], y[test]]],
        retain=[[x[test], y[test]]],
    )  # fmt: skip
    return model.eval(), task


def shuffled_digits(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the digits in random order, (rows, 64) in 0..1, and their labels; the last `HELD_OUT` rows are held out."""
    images, labels = digits()
    order = torch.randperm(len(labels), generator=generator)
    x = torch.tensor(images, dtype=torch.float32)[order].flatten(1) / 16
    return x, torch.tensor(labels)[order]


def locked(model: nn.Sequential, task: Task, lock: ToyLock) -> nn.Sequential:
    """Lock a copy of a net.

    Args:
        model: The net; not changed.
        task: Its retain data show how active channels are.
        lock: The lock.

    Returns:
        The copy: the same function, to the bit where scales are powers of two.
    """
    if lock.compensated:
        return compensated(model, lock.k, lock.scale).eval()
    copied = copy.deepcopy(model)
    tensors = unique_tensors(copied)
    active = _activity(copied, symmetric_sites(copied), task.retain[0][0])  # type: ignore[index]
    sign = -1 if lock.channel == "most active" else 1
    # As everywhere, the first site gets the highest exponent; a channel that never was active would be no lock.
    chosen = {
        site: int(torch.where(rms > 0, sign * rms, torch.inf).argmin()) for site, rms in active.items()
    }  # fmt: skip
    ordered = sorted(active, key=lambda site: sign * float(active[site][chosen[site]]))
    config = LockConfig(scale=2.0**lock.high, min_scale=2.0**lock.low, schedule="staggered")
    for site, exponent in zip(ordered, exponents(len(ordered), config), strict=True):
        factors = torch.ones(site.size, dtype=torch.float64)
        factors[slice(None) if lock.channel == "every" else chosen[site]] = 2.0**exponent
        rescale(tensors, site, factors)
    return copied


def compensated(model: nn.Sequential, k: int, scale: float) -> nn.Sequential:
    """Raise the largest singular values of every hidden layer of a copy of a net, and insert a layer behind it that takes it back.

    Args:
        model: Its layers are used one after another; convolutions and linear layers but the last one are hidden. Not changed.
        k: Singular values raised of each; of a convolution those of its matrix with a row for every output channel.
        scale: What they are multiplied by.

    Returns:
        The copy, each hidden layer as W~ and C: two plain layers, so that every optimiser sees both.
    """
    *hidden, last = copy.deepcopy(list(model))
    pairs = ((layer,) if not isinstance(layer, nn.Linear | nn.Conv2d) else _pair(layer, k, scale) for layer in hidden)  # fmt: skip
    return nn.Sequential(*(layer for pair in pairs for layer in pair), last)


def output_difference(first: nn.Module, second: nn.Module, task: Task) -> float:
    """Return the largest difference of two nets' outputs on the retain data, over the largest output of the first."""
    inputs: Any = task.retain[0][0]  # type: ignore[index]
    with torch.no_grad():
        a, b = first(inputs), second(inputs)
    return float((a - b).abs().max() / a.abs().max())


def _layers(net: Net) -> Iterator[nn.Module]:
    width = 64
    for _ in range(net.depth):
        yield from (nn.Linear(width, net.hidden), nn.ReLU())
        width = net.hidden
    yield nn.Linear(width, 10)


def _activity(model: nn.Sequential, sites: Sequence[Site], x: Tensor) -> Mapping[Site, Tensor]:
    """Return the root mean square of every channel of every site where it is read."""
    read = {}
    with torch.no_grad():
        for name, module in model.named_children():
            read[f"{name}.weight"] = x.square().mean(0).sqrt()
            x = module(x)
    return {site: read[site.consumers[0].tensor] for site in sites}


@torch.no_grad()
def _pair(layer: nn.Linear | nn.Conv2d, k: int, scale: float) -> tuple[nn.Module, nn.Module]:
    weight = layer.weight.flatten(1)
    U, S, Vh, _ = topk_svd(weight, k)
    C = torch.eye(len(U)).to(weight) - (1 - 1 / scale) * U @ U.T
    inserted: nn.Linear | nn.Conv2d
    if isinstance(layer, nn.Linear):
        inserted = skip_init(nn.Linear, len(U), len(U)).to(weight)  # type: ignore[no-untyped-call]
    else:
        inserted = skip_init(nn.Conv2d, len(U), len(U), 1).to(weight)  # type: ignore[no-untyped-call]
    inserted.weight.copy_(C.view_as(inserted.weight))
    assert inserted.bias is not None and layer.bias is not None
    inserted.bias.copy_(layer.bias)
    layer.weight.copy_((weight + (scale - 1) * (U * S) @ Vh).view_as(layer.weight))
    layer.bias = None
    return layer, inserted
