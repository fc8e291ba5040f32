"""`specdef reproduce`: an experiment of the papers, again, with a verdict on each claim.

Experiments stand above the command line and may use it, so this verb knows them by name only and finds them when asked.
"""

from __future__ import annotations

import importlib
import inspect
import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from specdef.cli.analysis import progress_text
from specdef.cli.common import Config, Device, Json, Seed, print_json, say
from specdef.errors import CheckpointError, SpecDefError


class Experiment(StrEnum):
    """Experiments, each a module `specdef.experiments.NAME`, hyphens as underscores, with a function `run`.

    A module may say in `SEEDS` how many seeds a size takes unless told otherwise.
    """

    collapse = "collapse"
    figure1 = "figure1"
    figure2 = "figure2"
    calibration = "calibration"
    deformation = "deformation"
    toy_locks = "toy-locks"
    smollm2_locks = "smollm2-locks"
    composition = "composition"
    max_lock_mlp = "max-lock-mlp"
    max_lock_resnet = "max-lock-resnet"
    max_lock_smollm2 = "max-lock-smollm2"
    fragility_guard = "fragility-guard"
    figure3 = "figure3"
    figure4 = "figure4"
    table1_vision = "table1-vision"
    table1_text = "table1-text"
    table2 = "table2"
    table3 = "table3"
    limits = "limits"


class Size(StrEnum):
    """How much is run."""

    cpu = "cpu"
    smoke = "smoke"
    full = "full"


FULL = (
    "figure1", "figure2", "calibration", "deformation", "smollm2-locks", "composition", "max-lock-resnet", "max-lock-smollm2",
    "collapse", "figure3", "figure4", "table1-vision", "table1-text", "table2", "table3", "limits",
)  # fmt: skip
"""Experiments that take size full; figures 1 and 2 are whole at size cpu already."""


def reproduce(
    experiment: Annotated[
        Experiment,
        typer.Argument(
            help="figure1: steps against condition number. figure2: Adam and bounds while a singular value grows. "
            "calibration: predicted against measured. deformation: the paper's MNIST lock. toy-locks: a small net under five locks, "
            "sixteen optimisers. smollm2-locks: SmolLM2-135M under three locks, full training and LoRA. "
            "composition: an absorbed lock on top of a deformation. "
            "max-lock-mlp, max-lock-resnet, max-lock-smollm2: designs of the absorbed lock, attacked in every usual way. "
            "collapse: the quartic law planted, and forecast and observed on SmolLM2-135M. fragility-guard: what projections and EWC keep of aligned behaviour in a fine-tune, at equal task loss. "
            "figure3: a lock over learning rates. figure4: over preconditioners. table1-vision, table1-text: unauthorised tasks. table2: backdoors in a guard. table3: relearning a class. "
            "limits: the compensated lock, and what undoes it."
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="Folder for NAME.json, NAME.png and NAME.md; made if absent.")
    ] = Path("results"),
    size: Annotated[
        Size,
        typer.Option(
            help="cpu takes minutes (toy-locks: a quarter of an hour; deformation, smollm2-locks: half an hour); smoke takes seconds and shows "
            "that it runs; full, for calibration, takes SmolLM2; for deformation, the paper's 60,000 rows and 10 epochs; "
            "for smollm2-locks, 200 steps, on a GPU; for composition, a ResNet-18 too."
        ),
    ] = Size.cpu,
    seeds: Annotated[
        int | None,
        typer.Option(
            help="How many seeds: --seed, --seed + 1, … [default: 3; 1 for calibration and smollm2-locks, 2 for fragility-guard, 5 for toy-locks]."
        ),
    ] = None,
    seed: Seed = 0,
    attacks: Annotated[
        str | None,
        typer.Option(
            help="Only these rows of a max-lock table, separated by commas: processes that run different rows share their state, "
            "and a run without this option then puts the table together."
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder with the public data sets that no package carries, as docs/reproduce.md names them: cifar10.npz, kmnist_test.npz, mrpc.jsonl, rte.jsonl."
        ),
    ] = None,
    device: Device = "cpu",
    json: Json = False,
    config: Config = None,
) -> None:
    """Run an experiment of the papers again and say which of its claims hold. A claim that does not is no error."""
    if seeds is not None and seeds < 1:
        raise ValueError(f"--seeds must be at least 1, got {seeds}.")
    name = experiment.value
    if size is Size.full and name not in FULL:
        raise ValueError(
            f"--size full is for {', '.join(FULL)}, not for {name}: cpu is its own size."
        )
    from specdef.weights.atomic import refuse_existing

    files = [out / f"{name}.{suffix}" for suffix in ("json", "png", "md")]
    ancestor = next(path for path in (out, *out.absolute().parents) if os.path.lexists(path))
    if not ancestor.is_dir():  # known before the work, not after it
        raise CheckpointError("is no folder", path=ancestor, hint="Name another folder with --out.")
    for path in files:
        refuse_existing(path)
    module: Any = importlib.import_module(f"specdef.experiments.{name.replace('-', '_')}")
    run = module.run
    known = inspect.signature(run).parameters
    options: dict[str, Any] = {"size": size.value}
    if "seeds" in known:
        count = seeds or getattr(module, "SEEDS", {}).get(size.value, 3)
        options["seeds"] = used = tuple(range(seed, seed + count))
    elif seeds in (None, 1):
        options["seed"], used = seed, (seed,)
    else:
        raise SpecDefError(
            f"{name} takes one seed.", hint="Leave --seeds out, and repeat with another --seed."
        )
    if "attacks" in known:
        options["attacks"] = (
            None if attacks is None else tuple(a.strip() for a in attacks.split(","))
        )
    elif attacks is not None:
        raise SpecDefError(f"{name} has no rows to choose from.", hint="Leave --attacks out.")
    if "data" in known:
        options["data"] = data
    elif data is not None:
        raise SpecDefError(f"{name} reads no data sets of yours.", hint="Leave --data out.")
    if "device" in known:
        options["device"] = device
    elif device != "cpu":
        raise SpecDefError(f"{name} runs on the CPU only.", hint="Leave --device out.")
    with progress_text("reproduce") as progress:
        record = run(out, **options, progress=progress.phase)
    seconds = round(record["seconds"], 2)
    lines = [
        f"{'held' if claim['held'] else 'NOT held'}: {claim['claim']}" for claim in record["claims"]
    ]
    lines.append(f"{name}, size {size.value}, seeds {list(used)}: {seconds} s")
    lines += record.get("table", [])
    if json:
        print_json(
            {
                "experiment": name, "size": size.value, "seeds": list(used), "seconds": seconds,
                "held": sum(claim["held"] for claim in record["claims"]), "claims": record["claims"],
                "files": [str(path) for path in files],
            }
        )  # fmt: skip
    for line in lines:
        say(line)
    for path in files:
        say(f"wrote {path}")
