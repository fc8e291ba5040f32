"""Processes that work on one audit together: each takes the rates that the others leave."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specdef.cli.common import say
from specdef.errors import SpecDefError

if TYPE_CHECKING:
    from torch import nn

    from specdef.attacks.task import Task
    from specdef.cli.retain_data import RetainData


def load_audited(
    folder: Path, source: Path, drawn: RetainData, retain: str | None, device: str
) -> tuple[nn.Module, nn.Module, Task]:
    """Load what an audit is about.

    Args:
        folder: Of the locked model.
        source: Of the original.
        drawn: The attacker's data.
        retain: Data of the model's own task; None measures no utility.
        device: Where models are put.

    Returns:
        The locked model, the original, and the attacker's task.

    Raises:
        SpecDefError: The models are of different kinds, or the data does not fit them.
    """
    from specdef.attacks.task import Task
    from specdef.cli.task_model import load_task_model
    from specdef.data.batches import load_batches

    twin = load_task_model(source, task=drawn.task, device=device)
    train, held = drawn.training(twin)
    kept = []
    if retain is not None:
        kept = load_batches(
            retain, twin.model.config, twin.processor, task=twin.task, batch_size=drawn.batch_size,
            num_batches=drawn.eval_batches, length=drawn.length, seed=drawn.seed,
        )  # fmt: skip
    victim = load_task_model(folder, original=source, task=drawn.task, device=device)
    if victim.task != twin.task:
        raise SpecDefError(
            f"the locked model is for {victim.task}, the original for {twin.task}", hint="Give the model that was locked."
        )  # fmt: skip
    name = f"{Path(drawn.retain).name} ({twin.task})"
    return victim.model, twin.model, Task(name=name, train=train, heldout=held, retain=kept)


@contextmanager
def further_workers(
    workers: int, models: tuple[Any, ...], options: dict[str, Any]
) -> Iterator[None]:
    """Let further processes work on an audit until the block ends.

    A process that dies loses at most its running trial, which the others run again.

    Args:
        workers: Processes in all, this one included; each gets its share of the cores.
        models: Arguments of `load_audited`: every process loads its own.
        options: Of `specdef.audit.audit.audit`; its storage must be one that processes can share.

    Yields:
        Nothing.
    """
    if workers == 1:
        yield
        return
    import torch

    threads = max(1, _cores() // workers)
    torch.set_num_threads(threads)
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=_work, args=(models, options, threads), daemon=True)
        for _ in range(workers - 1)
    ]
    for process in processes:
        process.start()
    try:
        yield
    finally:
        failed = sum(process.exitcode not in (None, 0) for process in processes)
        for process in processes:
            process.terminate()
            process.join()
        if failed:
            say(f"note: {failed} of {workers} worker processes ended early; the others ran what was theirs")  # fmt: skip


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _work(models: tuple[Any, ...], options: dict[str, Any], threads: int) -> None:
    """Do what the first process does, but say nothing and write no pages."""
    import torch

    from specdef.audit.audit import audit

    threading.Thread(target=_leave_with_parent, daemon=True).start()
    sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    torch.set_num_threads(threads)
    victim, twin, task = load_audited(*models)
    audit(victim, twin, task, **options)


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
