"""What `specdef fragility` runs: the model with adapters and batches, a learning rate where none is given, a diagnosis per task."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from specdef.attacks.partial.adapters import exactly, insert_adapters
from specdef.attacks.partial.lora import LoRA
from specdef.cli.analysis import DataOptions, draw_batches, load_workload
from specdef.curvature.losses import Loss
from specdef.curvature.parameters import select_parameters
from specdef.errors import SpecDefError
from specdef.fragility.diagnose import fragility
from specdef.fragility.memory import plan_memory
from specdef.fragility.path import QuadraticPath
from specdef.fragility.ranking import rank_tasks
from specdef.fragility.report import FragilityReport
from specdef.fragility.subspace import PROBES, PRODUCTS, FisherSubspace
from specdef.fragility.task import BatchMode, TaskLoss
from specdef.rates.optimizers import resolve

BUILTIN = {"builtin": "declines+formats"}
"""What names of the command line stand for among packaged data."""

KRYLOV_STEPS = 8
SHARE = 0.1  # of the stable rate: gradient flow is left above a quarter of it


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What a diagnosis is made of.

    Args:
        model: With adapters, where these are asked for.
        aligned: Batches of aligned behaviour.
        tasks: Name to batches of each task.
        loss: Cross-entropy of the next token, or of the class.
        params: Parameters that move; None for all that require a gradient.
    """

    model: nn.Module
    aligned: list[dict[str, Tensor]]
    tasks: dict[str, list[dict[str, Tensor]]]
    loss: Loss
    params: tuple[str, ...] | None


def prepare(
    folder: Path,
    aligned: DataOptions,
    tasks: Sequence[DataOptions],
    *,
    params: tuple[str, ...] | None,
    lora: int | None,
    dtype: str,
    device: str,
    quiet: bool,
) -> Prepared:
    """Load the model, insert adapters and draw all batches.

    Args:
        folder: Model folder.
        aligned: Data of the behaviour to keep.
        tasks: Data of each task.
        params: Parameters that move; None for all.
        lora: Rank of adapters beside every linear layer, which then move alone; None for none.
        dtype: Type of the weights.
        device: Where the model runs.
        quiet: Say nothing about how the data was read.

    Returns:
        What a diagnosis needs.

    Raises:
        SpecDefError: The model or data cannot be used, or there is no layer to adapt.
    """
    standing = replace(aligned, data=BUILTIN.get(aligned.data, aligned.data))
    work = load_workload(folder, standing, dtype=dtype, device=device, quiet=quiet)
    drawn = {
        name: draw_batches(work.loaded, options, quiet=quiet)
        for name, options in zip(task_names([t.data for t in tasks]), tasks, strict=True)
    }
    model = work.loaded.model
    if lora is not None:
        insert_lora(model, lora, seed=aligned.seed)
    select_parameters(model, params)  # a wrong name should not wait for the curvature
    return Prepared(model=model, aligned=work.batches, tasks=drawn, loss=work.loss, params=params)


def task_names(data: Sequence[str]) -> list[str]:
    """Name tasks by the last part of their paths, or by the whole where these are equal.

    Args:
        data: Names, files or folders.

    Returns:
        A name for each.

    Raises:
        ValueError: Data is named twice.
    """
    if len(set(data)) < len(data):
        raise ValueError("--task names the same data twice.")
    short = [Path(name).name for name in data]
    return [name if short.count(name) == 1 else whole for name, whole in zip(short, data, strict=True)]  # fmt: skip


def insert_lora(model: nn.Module, rank: int, *, seed: int) -> None:
    """Put low-rank adapters beside every linear layer but the output layer; all else is frozen.

    Args:
        model: Changed in place.
        rank: Their rank.
        seed: Of the A matrices; the B matrices begin at 0. The global random state is left as it was.

    Raises:
        SpecDefError: The model has no such layer.
    """
    from peft import LoraConfig

    paths = LoRA(r=rank, targets="all").adapted(model)
    if not paths:
        raise SpecDefError(
            "the model has no linear layer to put adapters beside", hint="Leave --lora out."
        )
    with torch.random.fork_rng(
        devices=range(torch.cuda.device_count())
    ):  # peft draws from the global state
        torch.manual_seed(seed)
        insert_adapters(
            model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=exactly(paths))
        )


def stable_rate(work: Prepared, *, optimizer: str, batches: BatchMode, seed: int) -> float:
    """Return the smallest 2 / lambda_max over the tasks, in the optimiser's metric.

    Cost: 12 products with the Hessian of each task.

    Args:
        work: Model and batches.
        optimizer: Name of the optimiser.
        batches: full or cycled.
        seed: Of the random start.

    Returns:
        The learning rate at which gradient descent in that metric would no longer be stable.

    Raises:
        SpecDefError: The curvature is nowhere positive.
    """
    method, found = resolve(optimizer), []
    for rows in work.tasks.values():
        task = TaskLoss(work.model, rows, work.loss, work.params, mode=batches, dtype=_dtype(work), memory_limit=None)  # fmt: skip
        gradient, metric = task.gradient_and_metric(method)
        path = QuadraticPath(metric.operator(task), metric.scale(gradient), 2, seed=seed)
        found.append(path.lambda_max)
        task.release()
    if not max(found) > 0:
        raise SpecDefError("the task's curvature is nowhere positive, so no learning rate follows from it", hint="Give --learning-rate.")  # fmt: skip
    return 2 / max(found)


def diagnose(
    work: Prepared,
    *,
    learning_rate: float | None,
    optimizer: str,
    batches: BatchMode,
    seed: int,
    progress: Callable[[str], None],
    **options: Any,
) -> tuple[list[FragilityReport], float]:
    """Diagnose every task.

    Args:
        work: Model and batches.
        learning_rate: Rate of the fine-tune; None takes a tenth of `stable_rate`, the same for every task.
        optimizer: Name of the optimiser.
        batches: full or cycled.
        seed: Of everything random.
        progress: Told what is being done.
        options: Further ones of `specdef.fragility`.

    Returns:
        A report for each task, and the rate.
    """
    if learning_rate is None:
        progress("stable learning rate")
        learning_rate = SHARE * stable_rate(work, optimizer=optimizer, batches=batches, seed=seed)
    reports: list[FragilityReport] = []
    for name in work.tasks:
        say = partial(_say_of, progress, f"{name}: " if len(work.tasks) > 1 else "")
        reports.append(diagnose_task(
            work, name, known=reports[0].subspace if reports else None, learning_rate=learning_rate, optimizer=optimizer,
            batches=batches, seed=seed, progress=say, **options,
        ))  # fmt: skip
    return reports, learning_rate


def diagnose_task(
    work: Prepared, name: str, *, known: FisherSubspace | None, **options: Any
) -> FragilityReport:
    """Diagnose one of the tasks.

    Args:
        work: Model and batches.
        name: Of the task.
        known: The subspace found for another task of the same work; taken where it is in the Euclidean metric, which is the
            aligned data's alone.
        options: Further ones of `specdef.fragility`.

    Returns:
        The report.
    """
    shared = known if known is not None and known.metric is None else None
    report = fragility(
        work.model, work.aligned, work.tasks[name], loss=work.loss, params=work.params, krylov_steps=KRYLOV_STEPS,
        task_name=name, subspace=shared, **options,
    )  # fmt: skip
    gc.collect()  # kept graphs hang in cycles, and the next task plans with what is free
    return report


def contract(reports: Sequence[FragilityReport]) -> tuple[list[dict[str, Any]], dict[str, Any] | None, dict[str, Any]]:  # fmt: skip
    """Put reports into JSON values.

    Args:
        reports: One for each task.

    Returns:
        Every report; the ranking, None for one task; and one object: the report of the task that is forecast to do most harm,
        with `ranking`, and for several tasks `reports`.
    """
    values = [report.to_dict() for report in reports]
    if len(reports) == 1:
        return values, None, values[0] | {"ranking": None}
    ranking = rank_tasks(reports).to_dict()
    worst = next(v for v in values if v["task"] == ranking["tasks"][0]["task"])
    return values, ranking, worst | {"ranking": ranking, "reports": values}


def plan(work: Prepared, *, max_rank: int, observe: bool, steps: int, batches: str) -> dict[str, Any]:  # fmt: skip
    """Count what a diagnosis would take, without running it.

    Args:
        work: Model and batches.
        max_rank: Largest rank of the subspace.
        observe: Whether the fine-tune is run too.
        steps: Its steps.
        batches: full or cycled.

    Returns:
        `dry_run, parameters, tasks, terms, memory_bytes, hessian_products, fisher_products, training_gradients`.
    """
    chosen = select_parameters(work.model, work.params)
    n = sum(p.numel() for p in chosen.values())
    device = next(iter(chosen.values())).device
    memory = plan_memory(n, _dtype(work), device, max_rank=max_rank, krylov_steps=KRYLOV_STEPS, memory_limit=None)  # fmt: skip
    count = len(work.tasks)
    every = sum(len(rows) for rows in work.tasks.values())
    return {
        "dry_run": True,
        "parameters": {"count": n, "tensors": len(chosen)},
        "tasks": list(work.tasks),
        "terms": {
            "aligned": _terms(work.aligned, work.loss),
            **{name: _terms(rows, work.loss) for name, rows in work.tasks.items()},
        },
        "memory_bytes": memory.vector_bytes,
        "hessian_products": count * (KRYLOV_STEPS + 10),
        "fisher_products": count * (max(PRODUCTS, 3 * max_rank) + PROBES + KRYLOV_STEPS + 1),
        "training_gradients": (every if batches == "full" else count) * steps if observe else 0,
    }


def _say_of(progress: Callable[[str], None], what: str, text: str) -> None:
    progress(what + text)


def _terms(rows: Sequence[Mapping[str, Tensor]], loss: Loss) -> int:
    return sum(loss.count(loss.targets(batch)) for batch in rows)


def _dtype(work: Prepared) -> torch.dtype:
    return next(iter(select_parameters(work.model, work.params).values())).dtype
