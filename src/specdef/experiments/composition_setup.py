"""The nets of the composition experiment: each unlocked, deformed, absorbed, and absorbed on top of the deformation."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import specdef
from specdef.attacks.structural.rebalance import rebalance
from specdef.attacks.structural.sites import slices, symmetric_sites
from specdef.attacks.task import Task
from specdef.experiments.deformation_measure import Settings, batches, trained
from specdef.experiments.record import Progress
from specdef.experiments.toy_locks_setup import (
    HELD_OUT,
    Net,
    problem,
    shuffled_digits,
)
from specdef.lock.config import LockConfig
from specdef.lock.deformation.checkpoint import STATE_SUFFIX
from specdef.lock.deformation.config import DeformationConfig
from specdef.lock.deformation.matrices import find_matrices, largest_singular_values
from specdef.lock.in_memory import unique_tensors
from specdef.models.mnist_resnet import BATCH_SIZE

DEFORMATION, ABSORBED, BOTH = "deformation", "absorbed", "absorbed on deformation"
LOCKS = (DEFORMATION, ABSORBED, BOTH)

UPPER = LockConfig()
"""The absorbed lock, as it is by default."""

GROWTH = 10.0
"""By how much the deformation of the small net raises the singular value that grows most; then it ends."""

_CALIBRATION = 8
"""Batches of the net's own task that the absorbed lock is calibrated on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One net of one seed under every lock.

    Args:
        original: Unlocked.
        locked: By each of `LOCKS`.
        task: What attackers want: the pictures in another arrangement.
        probe: Pictures that outputs are compared on.
    """

    original: nn.Module
    locked: Mapping[str, nn.Module]
    task: Task
    probe: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Vision:
    """The ResNet and the attacks on it.

    Args:
        lock: How it is trained and deformed.
        steps: Of an attack.
        heldout: Pictures it is judged on.
    """

    lock: Settings
    steps: int
    heldout: int = 500


def toy(net: Net, epochs: int, seed: int) -> Case:
    """Make the small net that reads scikit-learn's digits.

    Args:
        net: Its sizes.
        epochs: Of the deformation at most: AdaDelta with a constant rate, until a matrix has grown tenfold.
        seed: Of weights and rows.

    Returns:
        The net under every lock.
    """
    original, task = problem(net, seed)
    x, y = shuffled_digits(torch.Generator().manual_seed(seed))
    pictures, labels = torch.split(x[: net.rows], 32), torch.split(y[: net.rows], 32)
    rows = list(zip(pictures, labels, strict=True))
    recipe = DeformationConfig(
        epochs=epochs, lr_schedule="constant", target_growth=GROWTH, patience=1000, max_utility_loss=0.1, seed=seed
    )  # fmt: skip
    heldout = [(x[-HELD_OUT:], y[-HELD_OUT:])]
    deformed = specdef.lock_model(copy.deepcopy(original), recipe, retain=rows, heldout=heldout)
    model = deformed.model.eval()
    nets = {DEFORMATION: model, ABSORBED: copy.deepcopy(original), BOTH: copy.deepcopy(model)}
    for name in (ABSORBED, BOTH):
        specdef.lock_model(nets[name], UPPER, calibration=rows[:_CALIBRATION])
    return Case(original=original, locked=nets, task=task, probe=heldout[0][0])


def resnet(vision: Vision, data: Path | str, models: Path, place: Path, seed: int, say: Progress) -> Case:  # fmt: skip
    """Make the ResNet that reads MNIST, deformed by the paper's recipe.

    The deformation takes minutes: its state, and what comes out, are kept at `place` and gone on from.

    Args:
        vision: Settings.
        data: "mnist" or a folder of IDX files.
        models: Folder of trained models.
        place: Folder for the deformed model; made if absent.
        seed: Of weights and rows.
        say: Told how it goes.

    Returns:
        The net under every lock.
    """
    settings = vision.lock
    folder, _ = trained(data, models, settings, seed, say)
    original = specdef.load_model(folder, dtype="float32")
    drawn = batches(data, original, "train", BATCH_SIZE, settings.retain_rows + settings.heldout_rows, seed)  # fmt: skip
    if not place.exists():
        say(f"seed {seed}: deforming the ResNet")
        cut = settings.retain_rows // BATCH_SIZE
        state = place.with_name(place.name + STATE_SUFFIX)
        specdef.lock_checkpoint(
            folder, place, settings.config(seed), key_path=key_of(place), retain=drawn[:cut], heldout=drawn[cut:], resume=state.exists()
        )  # fmt: skip
    models_of = {DEFORMATION: place, ABSORBED: folder, BOTH: place}
    nets = {name: specdef.load_model(path, dtype="float32") for name, path in models_of.items()}
    for name in (ABSORBED, BOTH):
        specdef.lock_model(nets[name], UPPER, calibration=drawn[:_CALIBRATION])
    test = batches(data, original, "test", min(vision.heldout, 250), vision.heldout, 0)
    task = Task(
        name="rotated digits", train=[_rotated(batch) for batch in drawn[: vision.steps]],
        heldout=[_rotated(batch) for batch in test], retain=test,
    )  # fmt: skip
    return Case(original=original, locked=nets, task=task, probe=test[0]["pixel_values"])


def key_of(place: Path) -> Path:
    """Return where the key of a deformed folder goes."""
    return place.with_name(f"{place.name}.key.safetensors")


def facts(case: Case) -> dict[str, Any]:
    """Measure that neither lock undoes the other.

    Args:
        case: A net under every lock.

    Returns:
        `bit_identical`: outputs of each absorbed lock are those of what it was put on; `growth`: median and smallest growth of
        the largest singular values over all matrices, by the deformation, and once every symmetric pair is balanced, under it
        and under both locks; `sites`: of how many the lock on top scales a channel.
    """
    beneath = {ABSORBED: case.original, BOTH: case.locked[DEFORMATION]}
    with torch.no_grad():
        exact = {
            name: bool(torch.equal(_outputs(case.locked[name], case.probe), _outputs(model, case.probe)))
            for name, model in beneath.items()
        }  # fmt: skip
    sites = symmetric_sites(case.original)
    before, after = (unique_tensors(m) for m in (case.locked[DEFORMATION], case.locked[BOTH]))
    scaled = 0
    for site in sites:
        leg = site.consumers[0]
        scaled += not torch.equal(slices(before[leg.tensor], leg), slices(after[leg.tensor], leg))
    return {
        "bit_identical": exact,
        "growth": {
            DEFORMATION: _growth(case.original, case.locked[DEFORMATION]),
            **{
                f"{name}, balanced": _growth(_balanced(case.original), _balanced(case.locked[name]))
                for name in (DEFORMATION, BOTH)
            },
        },
        "sites": {"scaled": scaled, "all": len(sites)},
    }


def _growth(original: nn.Module, model: nn.Module) -> dict[str, float]:
    sigma = [largest_singular_values(find_matrices(m, DeformationConfig())) for m in (original, model)]  # fmt: skip
    ratios = [sigma[1][name] / value for name, value in sigma[0].items()]
    return {"median": float(np.median(ratios)), "min": min(ratios), "max": max(ratios)}


def _balanced(model: nn.Module) -> nn.Module:
    copied = copy.deepcopy(model)
    rebalance(copied)
    return copied


def _outputs(model: nn.Module, inputs: Tensor) -> Tensor:
    output: Any = model.eval()(inputs)
    found: Tensor = getattr(output, "logits", output)
    return found


def _rotated(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turn pictures by a quarter."""
    return {**batch, "pixel_values": torch.rot90(batch["pixel_values"], 1, (2, 3))}
