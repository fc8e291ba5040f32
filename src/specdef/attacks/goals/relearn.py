"""Relearning: bring back a class or a text that a model was made to forget; and forgetting a class, for tests of it."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import Tensor, nn

from specdef.attacks.fit import fit
from specdef.attacks.goals.measure import accuracy, where
from specdef.attacks.structural.edits import fitted
from specdef.attacks.task import Task
from specdef.curvature.losses import Batch, Loss
from specdef.errors import SpecDefError
from specdef.lock.deformation.retain import measure_utility, task_loss, task_mean


def relearn_class(train: Sequence[Batch], heldout: Sequence[Batch], label: int) -> Task:
    """Relearn a forgotten class from data of all classes (SpecDef, Table 3).

    Args:
        train: Labelled batches.
        heldout: Labelled batches, of the forgotten class and others.
        label: The forgotten class.

    Returns:
        A task judged on the forgotten class, with the others as what is to be kept; metrics `forgotten_accuracy`,
        `kept_accuracy`.

    Raises:
        SpecDefError: One of them has no row.
    """
    forgotten = where(heldout, lambda labels: labels == label)
    kept = where(heldout, lambda labels: labels != label)
    if not (forgotten and kept and where(train, lambda labels: labels == label)):
        raise SpecDefError(
            f"class {label} is not in both training and held-out data, or there is no other class",
            hint="Give batches with rows of the forgotten class and of others.",
        )
    return Task(
        name=f"relearn class {label}",
        train=train,
        heldout=forgotten,
        retain=kept,
        metrics=lambda model: {
            "forgotten_accuracy": accuracy(model, forgotten),
            "kept_accuracy": accuracy(model, kept),
        },
    )


def relearn_text(
    train: Sequence[Batch],
    heldout: Sequence[Batch],
    retain: Sequence[Batch] = (),
    loss: Loss | None = None,
) -> Task:
    """Relearn a forgotten text.

    Args:
        train: Batches of it, as the model takes them.
        heldout: More of it.
        retain: Texts the model still knows.
        loss: None takes what suits the model.

    Returns:
        The task; metrics `forgotten_accuracy` and, with `retain`, `kept_accuracy`, both of the next token.
    """

    def metrics(model: nn.Module) -> dict[str, float]:
        parts = {"forgotten_accuracy": heldout, "kept_accuracy": retain}
        return {
            name: measure_utility(model, batches, loss).value
            for name, batches in parts.items()
            if len(batches)
        }

    return Task(
        name="relearn text", train=train, heldout=heldout, retain=retain, loss=loss, metrics=metrics
    )


def unlearn_class(
    model: nn.Module,
    batches: Sequence[Batch],
    label: int,
    *,
    steps: int = 200,
    learning_rate: float = 1e-3,
    seed: int = 0,
) -> nn.Module:
    """Make a classifier forget a class: continue training without it (SpecDef, Appendix B.4).

    A classifier that is sure of the other classes has little gradient left, and forgets at larger rates only.

    Args:
        model: The classifier; not changed.
        batches: Labelled batches; rows of the class are left out.
        label: What is to be forgotten.
        steps: Steps of AdamW.
        learning_rate: Its first rate; falls linearly to 0.
        seed: Of the order of the batches.

    Returns:
        A trained copy, in evaluation mode.

    Raises:
        SpecDefError: There is no row of another class, or the training diverges.
    """
    others = where(batches, lambda labels: labels != label)
    if not others:
        raise SpecDefError(f"every row is of class {label}", hint="Give rows of other classes, too.")  # fmt: skip

    def loss(student: nn.Module, batch: Batch) -> Tensor:
        own = fitted(batch, student)
        kind = task_loss(student, own)
        return task_mean(kind, kind.outputs(student, own), own)

    forgetful = copy.deepcopy(model)
    fit(forgetful, others, loss, steps=steps, learning_rate=learning_rate, seed=seed)
    return forgetful
