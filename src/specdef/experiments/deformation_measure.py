"""One seed of the deformation experiment: train the original, lock it, measure both."""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor, nn

from specdef.data.batches import load_batches
from specdef.data.cache import cache_dir
from specdef.data.digits import digits
from specdef.experiments.record import Progress
from specdef.lock.certificate import LockCertificate
from specdef.lock.deformation.config import DeformationConfig
from specdef.lock.deformation.records import Progress as Step
from specdef.lock.deformation.retain import measure_utility
from specdef.lock.in_memory import lock_model
from specdef.lock.load import load_model
from specdef.models.mnist_resnet import BATCH_SIZE, train_mnist_resnet
from specdef.weights.atomic import atomic_file

GROWTH = 10.0
"""Factor by which singular values are asked to rise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How much is run.

    Args:
        data: "mnist", or "digits" of scikit-learn.
        rows: Pictures the original is trained on.
        epochs: Passes over them.
        retain_rows: Pictures the lock is trained on.
        lock_epochs: Passes over them.
        heldout_rows: Pictures that choose the state that is kept; unseen by the lock.
        test_rows: Pictures of the test split, all of them.
        max_utility_loss: Held-out accuracy a state may lose to be kept.
        hidden_sizes: Channels of each stage.
        depths: Blocks of each stage.
    """

    data: Literal["mnist", "digits"] = "mnist"
    rows: int
    epochs: int
    retain_rows: int
    lock_epochs: int
    heldout_rows: int = 2000
    test_rows: int = 10_000
    max_utility_loss: float = 0.005
    hidden_sizes: tuple[int, ...] = (64, 128, 256, 512)
    depths: tuple[int, ...] = (2, 2, 2, 2)

    def config(self, seed: int) -> DeformationConfig:
        """Return the paper's recipe; patience outlasts the dips at the full learning rate."""
        return DeformationConfig(epochs=self.lock_epochs, max_utility_loss=self.max_utility_loss, patience=1000, seed=seed)  # fmt: skip


def trained(
    data: Path | str, models: Path, settings: Settings, seed: int, say: Progress
) -> tuple[Path, dict[str, Any]]:
    """Train the original, unless it was trained before.

    Args:
        data: "mnist" or a folder of IDX files.
        models: Folder of trained models.
        settings: Rows, epochs and the shape of the net.
        seed: Of weights and rows.
        say: Told how it goes.

    Returns:
        (its folder, the record of its training).
    """
    folder = models / f"{settings.data}-resnet-{settings.rows}x{settings.epochs}-seed{seed}"
    record = folder / "training.json"
    if record.exists():
        return folder, json.loads(record.read_text(encoding="utf-8"))
    shutil.rmtree(folder, ignore_errors=True)  # without its record it is of an interrupted run
    training = train_mnist_resnet(
        folder, data=data, rows=settings.rows, epochs=settings.epochs, seed=seed, hidden_sizes=settings.hidden_sizes,
        depths=settings.depths, progress=lambda line: say(f"seed {seed}: {line}"),
    )  # fmt: skip
    training["data"] = settings.data
    with atomic_file(record) as path:
        path.write_text(json.dumps(training, indent=1), encoding="utf-8")
    return folder, training


def lock_seed(
    data: Path | str,
    folder: Path,
    training: dict[str, Any],
    settings: Settings,
    seed: int,
    state: Path,
    say: Progress,
) -> dict[str, Any]:
    """Lock one model and measure it before and after.

    Args:
        data: "mnist" or a folder of IDX files.
        folder: The original.
        training: The record of its training.
        settings: Rows and epochs.
        seed: Of the order of the rows.
        state: File for an unfinished lock; gone on from, if it is there.
        say: Told about every evaluation.

    Returns:
        One row of the record.
    """
    began = time.perf_counter()
    model = load_model(folder, dtype="float32")
    # The draw of the original's training: rows after the first settings.rows are new to it.
    drawn = batches(data, model, "train", BATCH_SIZE, settings.retain_rows + settings.heldout_rows, seed)  # fmt: skip
    cut = settings.retain_rows // BATCH_SIZE
    test = batches(data, model, "test", min(settings.test_rows, 250), settings.test_rows, 0)
    before = measure_utility(model, test)

    def told(step: Step) -> None:
        if found := step.snapshot:
            say(
                f"seed {seed}: step {step.step} of {step.steps}, held-out accuracy {found.utility:.2%}, "
                f"sigma_max {found.sigma_max:.1f}, median growth {found.median_growth:.1f}"
            )

    locked = lock_model(
        model, settings.config(seed), retain=drawn[:cut], heldout=drawn[cut:], checkpoint=state, resume=state.exists(),
        training_progress=told,
    )  # fmt: skip
    after = measure_utility(model, test)
    say(f"seed {seed}: test accuracy {before.value:.2%} before, {after.value:.2%} after")
    return {
        "seed": seed,
        "training": training,
        "test": {
            "rows": after.rows, "accuracy_before": before.value, "accuracy_after": after.value,
            "loss_before": before.loss, "loss_after": after.loss,
        },
        "recipe": settings.config(seed).to_dict(),
        **_growth(locked.certificate),
        **_cost(locked.certificate),
        "heldout": locked.certificate.utility,
        "history": locked.certificate.training["history"],
        "seconds": time.perf_counter() - began + training["seconds"],
    }  # fmt: skip


def batches(
    data: Path | str, model: nn.Module, split: str, size: int, rows: int, seed: int
) -> list[dict[str, Tensor]]:
    """Draw batches of `size` pictures, `rows` in all, as the model takes them."""
    return load_batches(
        data, model.config, None, task="image-classification", batch_size=size, num_batches=rows // size, seed=seed, split=split
    )  # fmt: skip


def _growth(certificate: LockCertificate) -> dict[str, Any]:
    """Return what became of the singular values."""
    assert isinstance(certificate.sites, list)  # so it is before it is written
    matrices = [
        {"name": s["name"], "before": s["sigma_max_before"], "after": s["sigma_max_after"], "growth": s["scale"]}
        for s in certificate.sites
    ]  # fmt: skip
    growth = [matrix["growth"] for matrix in matrices]
    largest = [max(matrix[when] for matrix in matrices) for when in ("before", "after")]
    return {
        "sigma_max": {"before": largest[0], "after": largest[1], "growth": largest[1] / largest[0]},
        "growth": {
            "min": min(growth), "median": statistics.median(growth), "max": max(growth),
            "largest_in": max(matrices, key=lambda matrix: matrix["growth"])["name"],
            "matrices": len(growth), "tenfold": sum(value >= GROWTH for value in growth),
        },
        "matrices": matrices,
    }  # fmt: skip


def _cost(certificate: LockCertificate) -> dict[str, Any]:
    """Return what the lock cost: seconds, and those of a step beside what it takes without the spectral term."""
    names = ("steps", "kept_step", "stopped", "reason", "step_seconds", "spectral_seconds")
    found = {name: certificate.training[name] for name in names}
    step, term = found["step_seconds"], found["spectral_seconds"]
    return {"lock": {**found, "seconds": certificate.training["seconds"], "cost_ratio": step / (step - term)}}  # fmt: skip


@contextmanager
def places(settings: Settings) -> Iterator[tuple[Path | str, Path]]:
    """Give the data and the folder of trained models; both are temporary for the digits.

    Args:
        settings: Its `data` is used.

    Yields:
        ("mnist" or a folder of IDX files, folder of models).
    """
    if settings.data == "mnist":
        yield "mnist", cache_dir()
        return
    with tempfile.TemporaryDirectory() as place:
        data = Path(place) / "digits"
        data.mkdir()
        _write_digits(data, settings.test_rows)
        yield data, Path(place)


def _write_digits(folder: Path, test_rows: int) -> None:
    """Write scikit-learn's digits as IDX files, the last rows as the split test."""
    images, labels = digits()
    arrays = {"images-idx3": images * 15, "labels-idx1": labels}  # images in 0..16
    for kind, array in arrays.items():
        for split, part in (("train", array[:-test_rows]), ("t10k", array[-test_rows:])):
            header = np.array([0x800 + part.ndim, *part.shape], ">u4").tobytes()
            (folder / f"{split}-{kind}-ubyte").write_bytes(header + part.astype(np.uint8).tobytes())
