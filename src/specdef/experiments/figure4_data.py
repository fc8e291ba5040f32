"""MNIST, which the net of papers/001, Appendix C, is trained on, and CIFAR-10 in grey, which attackers teach it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from specdef.data.digits import digits
from specdef.data.idx import read_idx_folder
from specdef.data.mnist import find_idx
from specdef.data.pictures import read_pictures
from specdef.errors import SpecDefError
from specdef.experiments.record import Progress

FILE = "cifar10.npz"

CLASSES = 10
CHANCE = 1 / CLASSES

Set = tuple[Tensor, Tensor]
"""Pictures [rows, 1, side, side] and labels."""

Pairs = list[list[Tensor]]
"""Batches of pictures [rows, 1, side, side] and labels, as `nn.Sequential` takes them."""

_TRAINED = 50_000  # pictures of CIFAR-10 are for training
_TESTED = 10_000
_DRAWN = 1.3  # times what is kept, so that every class has enough


@dataclass(frozen=True, slots=True, kw_only=True)
class Pictures:
    """Pictures of one seed, each set less its training pictures' mean, over their standard deviation.

    Args:
        own: What the net is trained on.
        own_test: What its accuracy is measured on.
        new: What attackers train on.
        new_test: What attacks are judged on, once it is `balanced`.
    """

    own: Set
    own_test: Set
    new: Set
    new_test: Set


def mnist_and_cifar(
    data: Path, seed: int, *, rows: int, test_rows: int, new_rows: int, each: int, say: Progress
) -> Pictures:
    """Draw digits of MNIST, and pictures of CIFAR-10 in grey and of the same size.

    Args:
        data: Folder with CIFAR-10.
        seed: Decides which, and their order.
        rows: Of MNIST to train on.
        test_rows: Of MNIST to measure accuracy on.
        new_rows: Of CIFAR-10 for attackers; all there are, where that is less.
        each: Of every class of CIFAR-10 to judge attacks on: enough others are drawn that hardly a class has fewer.
        say: Told when MNIST is fetched.

    Returns:
        The pictures.

    Raises:
        SpecDefError: A set is missing, cannot be read, or has too few pictures.
    """
    folder = find_idx("mnist", progress=say)
    assert folder is not None
    own, own_test = (
        _mnist(folder, split, count, seed) for split, count in (("train", rows), ("test", test_rows))
    )  # fmt: skip
    new = read_pictures(data / FILE, "train", min(new_rows, _TRAINED), seed=seed)
    tests = min(_TESTED, round(_DRAWN * CLASSES * each))
    return _together(own, own_test, new, read_pictures(data / FILE, "test", tests, seed=seed))


def turned_digits(seed: int, *, rows: int) -> Pictures:
    """Draw scikit-learn's digits, and the same on their sides, each with the label of the next digit.

    Args:
        seed: Decides which are held out, and their order.
        rows: To train on.

    Returns:
        The pictures; all others are for testing.

    Raises:
        SpecDefError: scikit-learn is not installed.
    """
    images, labels = digits()
    x, y = _permuted(torch.tensor(images, dtype=torch.float32)[:, None] / 16, torch.tensor(labels), seed)  # fmt: skip
    turned, next_label = torch.rot90(x, 1, (2, 3)), (y + 1) % CLASSES
    return _together(
        (x[:rows], y[:rows]), (x[rows:], y[rows:]), (turned[:rows], next_label[:rows]), (turned[rows:], next_label[rows:])
    )  # fmt: skip


def balanced(x: Tensor, y: Tensor, each: int) -> Set:
    """Keep as many pictures of every class, so that guessing one class always is worth `CHANCE`.

    Args:
        x: Pictures.
        y: Their labels.
        each: How many of a class; the size of the smallest, where that is less.

    Returns:
        The first of every class, in the order they were in, and their labels.
    """
    count = min(each, int(torch.bincount(y, minlength=CLASSES).min()))
    rank = one_hot(y, CLASSES).cumsum(0).gather(1, y[:, None])[:, 0]
    return x[rank <= count], y[rank <= count]


def batches_of(pictures: Set, size: int) -> Pairs:
    """Cut pictures and labels into batches.

    Args:
        pictures: Both.
        size: Pictures of a batch; the last may be smaller.

    Returns:
        Lists of pictures and labels.
    """
    return [list(pair) for pair in zip(*(torch.split(part, size) for part in pictures), strict=True)]  # fmt: skip


def _mnist(folder: Path, split: str, count: int, seed: int) -> Set:
    images, labels = read_idx_folder(folder, split)
    if len(images) < count:
        raise SpecDefError(f"{folder}: {len(images)} pictures of the split {split}; {count} are needed.", hint="Fetch MNIST again.")  # fmt: skip
    x, y = _permuted(torch.tensor(images)[:, None], torch.tensor(labels), seed)
    return x[:count].float() / 255, y[:count].long()


def _permuted(x: Tensor, y: Tensor, seed: int) -> Set:
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    return x[order], y[order]


def _together(own: Set, own_test: Set, new: Set, new_test: Set) -> Pictures:
    return Pictures(
        own=_standard(own, own), own_test=_standard(own_test, own), new=_standard(new, new), new_test=_standard(new_test, new)
    )  # fmt: skip


def _standard(pictures: Set, reference: Set) -> Set:
    return (pictures[0] - reference[0].mean()) / reference[0].std(), pictures[1]
