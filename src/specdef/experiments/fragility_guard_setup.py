"""The models, behaviours and tasks of the guard's table: an MLP that reads digits, and the last blocks of a language model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, final

import torch
from torch import Tensor, nn

from specdef.curvature.cross_entropy import IGNORE
from specdef.curvature.losses import Batch, ClassificationLoss, LMLoss, Loss
from specdef.data.batches import load_batches
from specdef.experiments.toy_locks_setup import shuffled_digits
from specdef.models.smollm2 import smollm2
from specdef.models.tiny import tiny_model
from specdef.models.tiny_tokenizer import tiny_tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A model with a behaviour to keep and a task to learn.

    Args:
        model: At its aligned weights, in evaluation mode; only what is to be trained requires a gradient.
        loss: Of both.
        aligned: Batches of the behaviour that guards are made from.
        kept: Others of the same behaviour, on which its loss is measured.
        task: Batches to learn from.
        heldout: Others, on which that is measured.
    """

    model: nn.Module
    loss: Loss
    aligned: list[Batch]
    kept: list[Batch]
    task: list[Batch]
    heldout: list[Batch]


@dataclass(frozen=True, slots=True, kw_only=True)
class Digits:
    """An MLP taught digits with smoothed labels; the task is digits moved two pixels to the right.

    Args:
        hidden: Width of its two hidden layers.
        pretraining: Full-batch Adam steps.
        aligned: Rows that guards are made from.
        kept: Rows for measuring.
        rows: Rows of the task.
        batch_size: Rows of a batch of it.
    """

    hidden: int = 64
    pretraining: int = 150
    aligned: int = 200
    kept: int = 197
    rows: int = 1000
    batch_size: int = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Language:
    """The last blocks of a language model; what comes before them is computed once.

    Args:
        behaviour: Packaged stand-in for aligned behaviour.
        task: Packaged data to learn.
        aligned: Batches that guards are made from.
        kept: Batches for measuring.
        train: Batches of the task.
        heldout: Others of it.
        batch_size: Rows of a batch.
        length: Tokens of a row at most.
        blocks: How many blocks are trained.
        tiny: A random two-layer llama in place of SmolLM2.
    """

    behaviour: str = "declines+formats"
    task: str = "arithmetic"
    aligned: int = 2
    kept: int = 3
    train: int = 20
    heldout: int = 2
    batch_size: int = 8
    length: int = 64
    blocks: int = 2
    tiny: bool = False


def digits_case(settings: Digits, seed: int) -> Case:
    """Teach the MLP, and cut its data.

    Args:
        settings: Sizes.
        seed: Of the weights and the order of rows.

    Returns:
        The case.
    """
    x, y = shuffled_digits(torch.Generator().manual_seed(seed))
    ends = torch.tensor([settings.rows, settings.aligned, settings.kept]).cumsum(0).tolist()
    new, aligned, kept, rest = (slice(a, b) for a, b in zip([0, *ends], [*ends, len(x)], strict=True))  # fmt: skip
    moved = x.view(-1, 8, 8).roll(2, 2).flatten(1)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        widths = (64, settings.hidden, settings.hidden)
        body = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())]  # fmt: skip
        model = nn.Sequential(*body, nn.Linear(settings.hidden, 10))
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(settings.pretraining):
            optimizer.zero_grad()
            # smoothed: an overconfident net begins another task with a loss of 30 nats
            nn.functional.cross_entropy(model(x[new]), y[new], label_smoothing=0.1).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        optimizer.zero_grad()
    batches = zip(torch.split(moved[new], settings.batch_size), torch.split(y[new], settings.batch_size), strict=True)  # fmt: skip
    return Case(
        model=model.eval(), loss=ClassificationLoss(), aligned=[(x[aligned], y[aligned])], kept=[(x[kept], y[kept])],
        task=list(batches), heldout=[(moved[rest], y[rest])],
    )  # fmt: skip


def language_case(settings: Language, seed: int) -> Case:
    """Load the model, draw its data, and cut off what is not trained.

    Args:
        settings: Sizes.
        seed: Which rows are drawn.

    Returns:
        The case; its batches begin behind the blocks that are frozen.
    """
    model: Any
    if settings.tiny:
        model, tokenizer = tiny_model("llama", seed=seed), tiny_tokenizer()
    else:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder = smollm2()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def draw(data: str, count: int) -> list[Batch]:
        batches = load_batches(
            data, model.config, tokenizer, task="causal-lm", batch_size=settings.batch_size, num_batches=count,
            length=settings.length, seed=seed,
        )  # fmt: skip
        return [behind(model, settings.blocks, batch) for batch in batches]

    behaviour = draw(settings.behaviour, settings.aligned + settings.kept)
    task = draw(settings.task, settings.train + settings.heldout)
    return Case(
        model=LastBlocks(model, settings.blocks).eval(), loss=ClassificationLoss(), aligned=behaviour[: settings.aligned], kept=behaviour[settings.aligned :],
        task=task[: settings.train], heldout=task[settings.train :],
    )  # fmt: skip


@final
class LastBlocks(nn.Module):
    """The last blocks of a llama with its head, on the states before them and for the tokens alone that count.

    Args:
        model: Causal language model; it is copied.
        count: Number of blocks.
    """

    def __init__(self, model: Any, count: int) -> None:
        super().__init__()
        self.model = copy.deepcopy(model.model).requires_grad_(False)
        self.model.layers = self.model.layers[-count:].requires_grad_(True)
        self.model.embed_tokens = nn.Identity()
        self.head = copy.deepcopy(model.lm_head).requires_grad_(False)

    def forward(self, states: Tensor, attention_mask: Tensor, counted: Tensor) -> Tensor:
        """Return logits `[batch, k, vocabulary]` of the counted tokens.

        Args:
            states: `[batch, length, width]`, what the first of the blocks reads.
            attention_mask: `[batch, length]`.
            counted: `[batch, k]`, places in each row.
        """
        out = self.model(inputs_embeds=states, attention_mask=attention_mask, use_cache=False)
        hidden = out.last_hidden_state
        kept = hidden.gather(1, counted[:, :, None].expand(-1, -1, hidden.shape[-1]))
        logits: Tensor = self.head(kept)
        return logits


@torch.no_grad()
def behind(model: Any, count: int, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what `LastBlocks` takes in the place of a batch of a causal language model.

    Args:
        model: The whole model.
        count: Number of its last blocks.
        batch: With `input_ids`, `attention_mask`, `labels`.

    Returns:
        `states`, `attention_mask`, `counted`, and as `labels` `[batch, k]` the tokens to predict, -100 where a row has fewer.
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    states = model.model(**inputs, output_hidden_states=True, use_cache=False).hidden_states
    targets = LMLoss().targets(batch)
    counts = (targets != IGNORE).sum(1)
    # stable: the places that count first, in their order
    places = (targets == IGNORE).int().argsort(dim=1, stable=True)[:, : int(counts.max())]
    return {
        "states": states[-1 - count], "attention_mask": batch["attention_mask"], "counted": places, "labels": targets.gather(1, places),
    }  # fmt: skip
