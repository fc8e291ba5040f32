"""Classifiers of text pairs for the papers' text experiments: models, tasks, fine-tuning and locks."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from specdef.attacks.fit import batch_loss, fit
from specdef.attacks.task import Task
from specdef.audit.baseline import constant_guess
from specdef.curvature.losses import Batch, ClassificationLoss
from specdef.data.pairs import pair_batches
from specdef.experiments.kept import Kept
from specdef.experiments.lock_table import UNLOCKED, Rows
from specdef.experiments.pair_tasks import OWN, Pairs
from specdef.experiments.paper.locks import Recipes, lock_all
from specdef.experiments.record import Progress
from specdef.lock.deformation.config import DeformationConfig
from specdef.lock.deformation.retain import evaluating, to_device
from specdef.lock.randomness import forked_rng
from specdef.models.classifier import pretrained_classifier
from specdef.models.minilm import minilm, minilm_classifier
from specdef.models.smollm2 import smollm2
from specdef.models.tiny import tiny_model
from specdef.models.tiny_tokenizer import tiny_tokenizer

ENCODER, DECODER = "encoder", "decoder"

WEIGHT_DECAY = 0.01
RATE = 5e-5
EPOCHS = 3
EVALUATED = 32
"""Rows of a held-out batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model and how it comes to its own task.

    Args:
        name: In tables.
        kind: encoder or decoder.
        layers: Blocks that are kept, from the first; None keeps all.
        tiny: A tiny one with random weights in its place.
        steps: Of fine-tuning on MRPC.
        rate: Of AdamW's first step there; it falls linearly to 0.
        retain: Batches of MRPC that the deformation trains on.
        length: Tokens of a pair at most.
    """

    name: str
    kind: str
    layers: int | None = None
    tiny: bool = False
    steps: int
    rate: float = RATE
    retain: int
    length: int = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Amounts:
    """How many rows are used.

    Args:
        batch_size: Of training.
        train: Rows of a task to learn from at most.
        heldout: Rows it is judged on.
        test: Rows of MRPC the model's own use is measured on.
    """

    batch_size: int = 8
    train: int = 5000
    heldout: int
    test: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A fine-tuned model, its locks and the tasks that attackers want.

    Args:
        model: Unlocked.
        locks: Locked models by name.
        tasks: By name.
        guesses: Held-out loss of the best answer that does not look at its input, by task.
        own: F1 and accuracy on MRPC by lock, the unlocked model among them.
        facts: Of `lock_all`.
        trained: Facts of the fine-tuning.
    """

    model: nn.Module
    locks: Mapping[str, nn.Module]
    tasks: Mapping[str, Task]
    guesses: Mapping[str, float]
    own: Mapping[str, Mapping[str, float]]
    facts: Rows
    trained: Mapping[str, Any]


def build(model: Model, seed: int) -> tuple[nn.Module, Any]:
    """Build a model with a fresh last layer.

    Args:
        model: Which.
        seed: Of the last layer, or of all of a tiny one.

    Returns:
        (the classifier, its tokenizer).

    Raises:
        SpecDefError: Its package is not installed.
    """
    if model.tiny:
        return _tiny(model.kind, seed)
    if model.kind == ENCODER:
        return minilm_classifier(2, seed)
    from transformers import AutoTokenizer

    folder = smollm2()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    fewer = {} if model.layers is None else {"num_hidden_layers": model.layers}
    built = pretrained_classifier(folder, seed=seed, pad_token_id=tokenizer.pad_token_id, **fewer)
    return built, tokenizer


def require_models(models: Sequence[Model]) -> None:
    """Refuse to begin where a model's package is missing.

    Args:
        models: Those of the experiment.

    Raises:
        SpecDefError: A package is not installed.
    """
    for model in models:
        if not model.tiny:
            (minilm if model.kind == ENCODER else smollm2)()


def _tiny(kind: str, seed: int) -> tuple[nn.Module, Any]:
    if kind == ENCODER:
        return tiny_model("bert", seed=seed, num_labels=2), tiny_tokenizer(pair_separator=True)
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, num_labels=2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.LlamaForSequenceClassification(config)
    return model.eval(), tiny_tokenizer()


def prepare(
    model: Model, amounts: Amounts, recipes: Recipes, pairs: Pairs, *, seed: int, device: str, kept: Kept, say: Progress
) -> Prepared:  # fmt: skip
    """Fine-tune a model on MRPC and lock it; what was made before is taken from what is kept.

    Args:
        model: Which, and how.
        amounts: How many rows.
        recipes: The locks.
        pairs: The tasks.
        seed: Of the last layer, of the rows and of their order.
        device: Where everything trains.
        kept: The state of the experiment.
        say: Told how it goes.

    Returns:
        The models and tasks.
    """
    original, tokenizer = build(model, seed)
    original.to(device)
    joint = "\n" if model.kind == DECODER else ""  # its tokenizer puts nothing between two texts

    def batches(task: str, split: str, size: int, rows: int) -> list[dict[str, Tensor]]:
        known = [{**row, "text_pair": joint + row["text_pair"]} for row in pairs.rows[task][split]]
        count = max(1, min(rows, len(known)) // size)
        return pair_batches(known, original.config, tokenizer, batch_size=size, batches=count, length=model.length, seed=seed, source=task)  # fmt: skip

    train = batches(OWN, "train", amounts.batch_size, amounts.train)
    test = batches(OWN, "test", EVALUATED, amounts.test)

    def learn(own: nn.Module) -> dict[str, Any]:
        say(f"{model.name}: {OWN}, {model.steps} steps of AdamW at {model.rate:g}")
        began = time.perf_counter()
        with forked_rng(own):
            torch.manual_seed(seed)  # of dropout
            last = fit(own, train, classification_loss, steps=model.steps, learning_rate=model.rate, weight_decay=WEIGHT_DECAY, seed=seed)  # fmt: skip
        return {"model": model.name, "last_loss": last, "seconds": round(time.perf_counter() - began, 2)}  # fmt: skip

    trained = kept.trained(f"{model.name}, {OWN}", original, learn)
    locks, facts = lock_all(
        original, recipes, retain=train[: model.retain], heldout=test[: max(1, len(test) // 2)], test=test, kept=kept,
        name=model.name, say=say,
    )  # fmt: skip
    own: dict[str, Mapping[str, float]] = {}
    for lock, victim in {UNLOCKED: original, **locks}.items():
        own[lock] = kept.once(f"{model.name}, {lock}: {OWN}", partial(scores, victim, test))
    tasks = {
        name: Task(
            name=name, train=batches(name, "train", amounts.batch_size, amounts.train),
            heldout=batches(name, "test", EVALUATED, amounts.heldout),
        )
        for name in pairs.rows if name != OWN
    }  # fmt: skip
    return Prepared(
        model=original, locks=locks, tasks={name: with_scores(task) for name, task in tasks.items()},
        guesses={name: constant_guess(original, task) for name, task in tasks.items()}, own=own, facts=facts, trained=trained,
    )  # fmt: skip


def with_scores(task: Task) -> Task:
    """Return a task that measures F1 and accuracy after an attack."""

    def metrics(model: nn.Module) -> dict[str, float]:
        return scores(model, task.heldout)

    return replace(task, metrics=metrics)


def deformation(**options: Any) -> DeformationConfig:
    """Return Algorithm 1 as Appendix B.2 has it for text, trained as the model's fine-tuning was.

    Args:
        options: Fields that differ.

    Returns:
        The recipe.
    """
    usual: dict[str, Any] = {
        "retain_weight": 0.99, "k": 2, "retain_loss": "task+kl", "optimizer": "adamw", "learning_rate": RATE,
        "weight_decay": WEIGHT_DECAY, "lr_schedule": "linear",
    }  # fmt: skip
    return DeformationConfig(**{**usual, **options})


MARGIN = 0.01
"""Nats below the guess that the best of a dozen runs reaches by chance, on held-out rows as few as size cpu's."""


def counted_from(rows: Rows, guess: float) -> Rows:
    """Count gains in loss from just below the constant guess where a model begins above it.

    A model sure of wrong answers that only becomes less sure has learned nothing of the task.

    Args:
        rows: Of `attack_case`.
        guess: Held-out loss of the best answer that does not look at its input.

    Returns:
        The rows, with `began_at`, the loss before the attack, and `guess`.
    """
    return [
        {**row, "began_at": row["start_loss"], "guess": guess, "start_loss": min(guess - MARGIN, row["start_loss"])}
        for row in rows
    ]  # fmt: skip


def classification_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean cross-entropy of a batch, which is moved to the model's device."""
    return batch_loss(model, batch, ClassificationLoss())


def scores(model: nn.Module, batches: Sequence[Batch]) -> dict[str, float]:
    """Return F1 of class 1 and accuracy, each a fraction.

    Args:
        model: A classifier of two classes.
        batches: Labelled.

    Returns:
        `f1`, 0 where class 1 is neither meant nor said, and `accuracy`.
    """
    kind = ClassificationLoss()
    said: list[Tensor] = []
    meant: list[Tensor] = []
    with evaluating(model), torch.no_grad():
        for batch in batches:
            own = to_device(batch, model)
            said.append(kind.outputs(model, own).argmax(-1).cpu())
            meant.append(kind.targets(own).cpu())
    a, b = torch.cat(said), torch.cat(meant)
    both = int((a & b).sum())
    return {"f1": 2 * both / max(1, int(a.sum() + b.sum())), "accuracy": float((a == b).double().mean())}  # fmt: skip
