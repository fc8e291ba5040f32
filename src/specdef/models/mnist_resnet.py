"""A ResNet-18 that reads handwritten digits, trained here as the paper trains its own, saved as an ordinary folder.

AdaDelta with learning rate 1, times 0.7 after each epoch, batches of 32 ("Locking Open Weight Models with Spectral
Deformation", appendix B.2). The pictures keep their 28 x 28 pixels and one channel, scaled to [0, 1] as `load_batches`
does for a model without an image processor.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specdef.data.idx import read_idx_folder
from specdef.data.mnist import NAME, find_idx
from specdef.errors import SpecDefError
from specdef.weights.atomic import atomic_folder, refuse_existing

BATCH_SIZE = 32
LEARNING_RATE = 1.0
GAMMA = 0.7  # factor of the learning rate after each epoch
_TEST_BATCH = 250
_SECONDS = 10.0  # between two reports


def train_mnist_resnet(
    out: str | Path,
    *,
    data: str | Path = NAME,
    rows: int = 20_000,
    epochs: int = 5,
    seed: int = 0,
    hidden_sizes: Sequence[int] = (64, 128, 256, 512),
    depths: Sequence[int] = (2, 2, 2, 2),
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Train a ResNet classifier on pictures in IDX files and save it.

    The rows are drawn from the split train and reshuffled every epoch; accuracy is measured on all of the split test.
    The global random state is left as it was.

    Args:
        out: Folder to save the model in; must not exist, or be empty.
        data: "mnist" (fetched once), or a folder of IDX files with the splits train and test.
        rows: Pictures to train on, drawn without replacement.
        epochs: Passes over them.
        seed: Decides the rows, their order and the initial weights.
        hidden_sizes: Channels of each stage; the default with `depths` is ResNet-18.
        depths: Blocks of each stage.
        progress: Called with one line of text from time to time.

    Returns:
        The record: settings, `accuracy` (fraction of the test pictures), `test_rows`, `history` (an entry per epoch) and
        `seconds`.

    Raises:
        ValueError: A number is too small, or `hidden_sizes` and `depths` differ in length.
        CheckpointError: `out` exists or cannot be written.
        SpecDefError: The data cannot be read or fetched, or has fewer rows.
    """
    for name, value, least in (("rows", rows, BATCH_SIZE), ("epochs", epochs, 1)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}.")
    if not hidden_sizes or len(hidden_sizes) != len(depths) or min(*hidden_sizes, *depths) < 1:
        raise ValueError(
            "hidden_sizes and depths must be as many positive integers, one per stage."
        )
    report = progress or _silent
    target = Path(out)
    refuse_existing(target)
    train, test = _read(data, rows, report)

    start = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _new_model(train[0].shape[1:], _classes(train, test), hidden_sizes, depths)
    history = _train(model, train, test, rows, epochs, seed, report)
    # The writer draws a progress bar on stderr.
    with atomic_folder(target) as made, contextlib.redirect_stderr(io.StringIO()):
        model.save_pretrained(made)
    return {
        "data": str(data),
        "rows": rows,
        "epochs": epochs,
        "batch_size": BATCH_SIZE,
        "optimizer": "adadelta",
        "learning_rate": LEARNING_RATE,
        "gamma": GAMMA,
        "seed": seed,
        "hidden_sizes": list(hidden_sizes),
        "depths": list(depths),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "accuracy": history[-1]["accuracy"],
        "test_rows": len(test[0]),
        "history": history,
        "seconds": time.perf_counter() - start,
    }


_Split = tuple[NDArray[np.uint8], NDArray[np.uint8]]


def _read(data: str | Path, rows: int, report: Callable[[str], None]) -> tuple[_Split, _Split]:
    """Read both splits."""
    folder = find_idx(data, progress=report)
    if folder is None:
        raise SpecDefError(
            f"{data}: no folder of IDX files.",
            hint="Name mnist, or a folder with train-images-idx3-ubyte and the like.",
        )
    train, test = read_idx_folder(folder, "train"), read_idx_folder(folder, "test")
    if len(train[0]) < rows:
        raise SpecDefError(
            f"{folder}: {len(train[0])} pictures to train on; {rows} were asked for.",
            hint=f"Ask for at most {len(train[0])} rows.",
        )
    if train[0].shape[1:] != test[0].shape[1:]:
        raise SpecDefError(
            f"{folder}: pictures of {train[0].shape[1:]} pixels to train on, of {test[0].shape[1:]} to test with.",
            hint="Name a folder whose files belong together.",
        )
    return train, test


def _classes(train: _Split, test: _Split) -> int:
    return int(max(train[1].max(), test[1].max())) + 1


def _new_model(
    size: tuple[int, ...], classes: int, hidden_sizes: Sequence[int], depths: Sequence[int]
) -> Any:
    """Return a fresh model of basic blocks for grey pictures."""
    from transformers import ResNetConfig, ResNetForImageClassification

    height, width = size
    config = ResNetConfig(
        num_channels=1,
        embedding_size=hidden_sizes[0],
        hidden_sizes=list(hidden_sizes),
        depths=list(depths),
        layer_type="basic",
        num_labels=classes,
        # A ResNet takes any size; load_batches keeps to this one.
        image_size=height if height == width else [height, width],
    )
    return ResNetForImageClassification(config)


def _train(
    model: Any, train: _Split, test: _Split, rows: int, epochs: int, seed: int, report: Callable[[str], None]
) -> list[dict[str, Any]]:  # fmt: skip
    """Train in place and return an entry per epoch."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(len(train[0]), generator=generator)[:rows]
    optimizer = torch.optim.Adadelta(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=GAMMA)
    batches = rows // BATCH_SIZE  # what is left over is another part each time
    history = []
    said = time.perf_counter()
    for epoch in range(1, epochs + 1):
        model.train()
        order = drawn[torch.randperm(rows, generator=generator)]
        total = 0.0
        for i in range(batches):
            images, labels = _batch(train, order[i * BATCH_SIZE : (i + 1) * BATCH_SIZE].numpy())
            loss = torch.nn.functional.cross_entropy(model(images).logits, labels)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total += loss.item()
            if time.perf_counter() - said > _SECONDS:
                said = time.perf_counter()
                report(f"epoch {epoch} of {epochs}, batch {i + 1} of {batches}, loss {total / (i + 1):.4f}")  # fmt: skip
        schedule.step()
        accuracy = _accuracy(model, test)
        history.append({"epoch": epoch, "loss": total / batches, "accuracy": accuracy})
        report(f"epoch {epoch} of {epochs}: loss {total / batches:.4f}, test accuracy {accuracy:.2%}")  # fmt: skip
        if not math.isfinite(total):
            raise SpecDefError("The loss is not finite.", hint="Try another seed, or fewer layers.")
    return history


def _batch(split: _Split, rows: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    """Return pictures `[n, 1, height, width]` in [0, 1], the same numbers that load_batches gives, and classes."""
    images, labels = (part[rows] for part in split)
    scaled = images[:, None].astype(np.float32) / 255.0
    return torch.from_numpy(scaled), torch.from_numpy(labels.astype(np.int64))


def _accuracy(model: Any, split: _Split) -> float:
    """Return the fraction of pictures put into their class; leaves the model in eval mode."""
    model.eval()
    right = 0
    with torch.no_grad():
        for start in range(0, len(split[0]), _TEST_BATCH):
            images, labels = _batch(
                split, np.arange(start, min(start + _TEST_BATCH, len(split[0])))
            )
            right += int((model(images).logits.argmax(dim=1) == labels).sum())
    return right / len(split[0])


def _silent(_: str) -> None:
    """Report nothing."""


def _integers(text: str) -> list[int]:
    """Read `64,128,256`."""
    return [int(part) for part in text.split(",")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and save a model: `python -m specdef.models.mnist_resnet OUT`.

    Args:
        arguments: Command-line arguments; default `sys.argv[1:]`.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(
        prog="python -m specdef.models.mnist_resnet", description=__doc__
    )
    parser.add_argument("out", type=Path, help="folder to save the model in")
    parser.add_argument("--data", default=NAME, help="mnist, or a folder of IDX files")
    parser.add_argument("--rows", type=int, default=20_000, help="pictures to train on")
    parser.add_argument("--epochs", type=int, default=5, help="passes over them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--hidden-sizes", type=_integers, default=[64, 128, 256, 512], metavar="N,N", help="channels of each stage"
    )  # fmt: skip
    parser.add_argument(
        "--depths", type=_integers, default=[2, 2, 2, 2], metavar="N,N", help="blocks of each stage"
    )
    parser.add_argument("--json", action="store_true", help="print the record, not the folder")
    options = vars(parser.parse_args(arguments))
    as_json = options.pop("json")
    try:
        record = train_mnist_resnet(**options, progress=lambda line: print(line, file=sys.stderr))
    except SpecDefError as error:
        print(f"{error} {error.hint}".strip(), file=sys.stderr)
        return error.exit_code
    except ValueError as error:
        print(error, file=sys.stderr)
        return SpecDefError.exit_code
    print(json.dumps(record, indent=2) if as_json else options["out"])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
