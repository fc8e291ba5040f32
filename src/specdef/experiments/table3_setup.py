"""What Table 3 of papers/001 is about: a ResNet-18 that has unlearned a class of CIFAR-10, and what it is asked."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from specdef.attacks.fit import fit
from specdef.attacks.goals.measure import accuracy, labels_of, predicted
from specdef.attacks.goals.relearn import relearn_class, unlearn_class
from specdef.attacks.structural.edits import fitted
from specdef.attacks.task import Metrics, Task
from specdef.curvature.losses import Batch, model_outputs
from specdef.experiments.record import Progress
from specdef.experiments.table3_data import (
    CAR,
    CLASSES,
    Pictures,
    Settings,
    cars_of,
    first_rows,
    others_of,
)

CALLED, TOLD_APART = "others_called_car", "told_apart"
"""Names of metrics: the share of other pictures called cars, and the cars recognised less that share."""

_SECONDS = 10.0  # between two reports


def fresh(settings: Settings, seed: int) -> nn.Module:
    """Return a net with new weights, with the stem of ImageNet's ResNet-18; the caller's random state stays as it was."""
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        num_channels=3, embedding_size=settings.hidden_sizes[0], hidden_sizes=list(settings.hidden_sizes),
        depths=list(settings.depths), layer_type="basic", num_labels=len(CLASSES), image_size=settings.side,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = ResNetForImageClassification(config)
    return model


def train(
    model: nn.Module, drawn: Pictures, settings: Settings, seed: int, say: Progress
) -> dict[str, Any]:
    """Train the original in place.

    Args:
        model: A fresh net.
        drawn: Pictures of all classes.
        settings: Epochs and rate.
        seed: Of the order of the batches.
        say: Told how it goes.

    Returns:
        Seconds, steps, and the loss of the last batch.
    """
    began = said = time.perf_counter()
    steps, step = settings.epochs * len(drawn.original), 0

    def loss(net: nn.Module, batch: Batch) -> Tensor:
        nonlocal said, step
        step += 1
        own = fitted(batch, net)
        value = functional.cross_entropy(model_outputs(net, own), labels_of(own))
        if time.perf_counter() - said > _SECONDS:
            said = time.perf_counter()
            say(f"training the original: step {step} of {steps}, loss {float(value.detach()):.3f}")
        return value

    last = fit(
        model, drawn.original, loss, steps=steps, learning_rate=settings.learning_rate, seed=seed
    )
    return {"seconds": time.perf_counter() - began, "steps": steps, "loss": last}


def unlearn(
    model: nn.Module, drawn: Pictures, settings: Settings, seed: int, say: Progress
) -> dict[str, Any]:
    """Continue training in place without cars, until the net calls no car of the training data one.

    Args:
        model: The original.
        drawn: Pictures of all classes.
        settings: Steps and rate of each part.
        seed: Of the order of the batches.
        say: Told how it goes.

    Returns:
        Seconds, steps, and the accuracy on the training data's cars.
    """
    began = time.perf_counter()
    cars, others = cars_of(drawn.train), others_of(drawn.train)
    student, part, known = model, 0, accuracy(model, cars)
    while known and part < settings.unlearning_parts:
        student = unlearn_class(
            student, others, CAR, steps=settings.unlearning_steps, learning_rate=settings.unlearning_rate, seed=seed + part
        )  # fmt: skip
        part, known = part + 1, accuracy(student, cars)
        say(f"unlearning: {part * settings.unlearning_steps} steps without cars, {known:.2%} of them recognised")  # fmt: skip
    model.load_state_dict(student.state_dict())
    return {"seconds": time.perf_counter() - began, "steps": part * settings.unlearning_steps, "cars_of_the_training_data": known}  # fmt: skip


def relearning(drawn: Pictures, settings: Settings) -> Task:
    """Return what the attacker wants: cars back, from data of all classes.

    Held-out data has as many other pictures as cars: of cars alone, a wrecked net that calls everything a car would have the
    lowest loss of all.

    Args:
        drawn: Pictures of a seed.
        settings: How many rows the attacker has.

    Returns:
        The task, with the metrics of `measures`.
    """
    bought = drawn.train[: settings.attack_rows // settings.batch_size]
    task = relearn_class(bought, drawn.heldout, CAR)
    count = sum(len(labels_of(b)) for b in task.heldout)
    half = [*task.heldout, *first_rows(task.retain, count)]
    return replace(task, heldout=half, retain=(), metrics=measures(drawn.test))


def measures(batches: Sequence[Batch]) -> Metrics:
    """Return what measures a net on pictures of all classes.

    Args:
        batches: Labelled batches.

    Returns:
        A function of a model: accuracy by name of class, `others` (mean of the other classes), `others_called_car`, and
        `told_apart`, the accuracy on cars less that share: 0 for a net that calls everything a car, or nothing.
    """

    def measured(model: nn.Module) -> dict[str, float]:
        return of_guesses(*predicted(model, batches))

    return measured


def of_guesses(guesses: Tensor, labels: Tensor) -> dict[str, float]:
    """Return the numbers of `measures` for guesses.

    Args:
        guesses: (rows,) classes.
        labels: (rows,) classes, each at least once.

    Returns:
        The numbers, fractions.
    """
    right = {name: _share(guesses[labels == i] == i) for i, name in enumerate(CLASSES)}
    others = [value for name, value in right.items() if name != "car"]
    called = _share(guesses[labels != CAR] == CAR)
    return {**right, "others": sum(others) / len(others), CALLED: called, TOLD_APART: right["car"] - called}  # fmt: skip


def _share(hits: Tensor) -> float:
    return float(hits.double().mean())
