"""What the verbs that measure curvature share: options about data and parameters, the model with its batches, progress."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specdef.cli.common import parse_list, say

if TYPE_CHECKING:
    from torch import Tensor

    from specdef.cli.task_model import TaskModel
    from specdef.curvature.linear import SymmetricOperator
    from specdef.curvature.losses import Loss


_LINE_SECONDS = 5.0


class Precision(StrEnum):
    """Types curvature is computed in."""

    float32 = "float32"
    float64 = "float64"


Data = Annotated[
    str,
    typer.Option(
        "--data",
        help="sotu, moby-dick, python, arithmetic, mnist, or a data file or folder (docs/data.md).",
    ),
]
BatchSize = Annotated[int, typer.Option("--batch-size", help="Rows per batch.")]
NumBatches = Annotated[int, typer.Option("--num-batches", help="Batches.")]
Length = Annotated[int, typer.Option("--length", help="Tokens per row of text, at most.")]
Split = Annotated[
    str | None, typer.Option("--split", help="Part of a data folder [default: train, if any].")
]
Columns = Annotated[
    str | None,
    typer.Option("--columns", help="Columns with other names, like text=body,label=gold."),
]
TaskName = Annotated[
    str | None,
    typer.Option(
        "--task",
        help="causal-lm, sequence-classification or image-classification, where config.json names no architecture.",
    ),
]
Parameters = Annotated[
    str | None,
    typer.Option(
        "--parameters",
        help="Parameters that move: names, modules or patterns like '*.mlp.*', comma-separated [default: all].",
    ),
]
Dtype = Annotated[
    Precision,
    typer.Option("--dtype", help="float64 tells smaller eigenvalues from zero, and is slower."),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class DataOptions:
    """The options above that say which batches are drawn.

    Args:
        data: Name, file or folder.
        batch_size: Rows per batch.
        num_batches: Batches.
        length: Tokens per row, at most.
        split: Part of a folder.
        columns: As on the command line.
        task: As on the command line.
        seed: Of the draw.
        chat: Whether prompts go through the chat template; None: those of packaged data do.
    """

    data: str
    batch_size: int
    num_batches: int
    length: int
    split: str | None
    columns: str | None
    task: str | None
    seed: int
    chat: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A model, the batches its loss is taken on, and the loss.

    Args:
        loaded: The model with its tokenizer or image processor.
        batches: As `curvature` takes them.
        loss: Cross-entropy of the next token, or of the class.
    """

    loaded: TaskModel
    batches: list[dict[str, Tensor]]
    loss: Loss


def load_workload(
    folder: Path,
    options: DataOptions,
    *,
    dtype: str,
    device: str,
    original: Path | None = None,
    quiet: bool = False,
) -> Workload:
    """Load a model and draw its batches.

    Args:
        folder: Model folder, locked or not.
        options: What the command line says about data.
        dtype: Type of the weights.
        device: Where the model runs.
        original: Folder whose tokenizer is used where `folder` has none.
        quiet: Say nothing about how the data was read.

    Returns:
        The workload.

    Raises:
        SpecDefError: The model or data cannot be used.
    """
    from specdef.cli.task_model import load_task_model
    from specdef.curvature.losses import ClassificationLoss, LMLoss

    parse_columns(options.columns)  # a mistake in it should not wait for the model
    loaded = load_task_model(
        folder, original=original, task=options.task, dtype=dtype, device=device
    )
    batches = draw_batches(loaded, options, quiet=quiet)
    loss = LMLoss() if loaded.task == "causal-lm" else ClassificationLoss()
    return Workload(loaded=loaded, batches=batches, loss=loss)


def draw_batches(
    loaded: TaskModel, options: DataOptions, *, quiet: bool = False
) -> list[dict[str, Tensor]]:
    """Draw batches for a model that is loaded.

    Args:
        loaded: The model with its tokenizer or image processor.
        options: What the command line says about data.
        quiet: Say nothing about how the data was read.

    Returns:
        The batches.

    Raises:
        SpecDefError: The data cannot be used.
    """
    from specdef.data.batches import load_batches

    config: Any = loaded.model.config
    return load_batches(
        options.data, config, loaded.processor, task=loaded.task, batch_size=options.batch_size,
        num_batches=options.num_batches, length=options.length, seed=options.seed, split=options.split,
        columns=parse_columns(options.columns), chat=options.chat, note=None if quiet else lambda text: say(f"note: {text}"),
    )  # fmt: skip


def parse_columns(text: str | None) -> dict[str, str]:
    """Read "text=body,label=gold".

    Args:
        text: As on the command line; None is empty.

    Returns:
        Role -> column.

    Raises:
        ValueError: An entry has no equals sign.
    """
    out = {}
    for part in parse_list(text) or ():
        role, equals, column = part.partition("=")
        if not (role and equals and column):
            raise ValueError(f"--columns takes pairs like text=body,label=gold, got {part!r}.")
        out[role.strip()] = column.strip()
    return out


@contextmanager
def progress_text(label: str) -> Iterator[Progress]:
    """Show on stderr what is being done: in place on a terminal, a line every few seconds elsewhere.

    Args:
        label: Name of the verb.

    Yields:
        Its `phase` and `watch` say what is being done.
    """
    progress = Progress(label)
    if sys.stderr.isatty():
        from rich.console import Console

        with Console(stderr=True).status(progress):  # drawn again and again, by a thread of its own
            yield progress
        return
    done = threading.Event()

    def lines() -> None:
        while not done.wait(_LINE_SECONDS):
            say(str(progress))

    thread = threading.Thread(target=lines, daemon=True)
    thread.start()
    try:
        yield progress
    finally:
        done.set()
        thread.join()


class Progress:
    """What is being done, for how long, and how many products with a matrix it has taken.

    Args:
        label: Name of the verb.
    """

    def __init__(self, label: str) -> None:
        self.label, self.part, self.products = label, "", 0
        self.operator: SymmetricOperator | None = None
        self._before = 0  # products the operator had made already
        self.began = time.monotonic()

    def phase(self, text: str) -> None:
        """Say what begins now."""
        self.part = text

    def watch(self, operator: SymmetricOperator) -> None:
        """Count the products of this matrix from now on, on top of those counted."""
        self._settle()
        self.operator, self._before = operator, operator.num_matvecs

    def __str__(self) -> str:
        """Return one line."""
        count = self.products
        if self.operator is not None:
            count += self.operator.num_matvecs - self._before
        where = f"{self.label}: {self.part}" if self.part else self.label
        products = f", {count} products" if count else ""
        return f"{where}{products}, {time.monotonic() - self.began:.0f} s"

    __rich__ = __str__

    def _settle(self) -> None:
        if self.operator is not None:
            self.products += self.operator.num_matvecs - self._before
