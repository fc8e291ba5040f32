"""Prompt tuning through `peft`: a few vectors in front of every text, and nothing of the model itself, train."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from specdef.attacks.attack import Attack, Prepared
from specdef.attacks.partial.cost import step_work
from specdef.attacks.task import Task


class PromptTuning(Attack):
    """Learn the vectors of a prompt, drawn from the vocabulary's at first.

    Args:
        tokens: Length of the prompt.
    """

    name = "prompt-tuning"
    tier = 3
    cost = "a few vectors; a forward and a backward pass without gradients of weights"
    source = "Lester, Al-Rfou & Constant 2021, arXiv 2104.08691"

    def __init__(self, tokens: int = 8) -> None:
        self.summary = f"learn {tokens} vectors in front of every text"
        self.tokens = tokens

    def applies(self, model: nn.Module) -> str:
        """Return that the model is no causal language model of transformers, where it is none."""
        causal = type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))
        return "" if causal and hasattr(model, "config") else "no causal language model"

    def prepare(
        self, model: nn.Module, task: Task, *, original: nn.Module | None, generator: torch.Generator
    ) -> Prepared:  # fmt: skip
        """Wrap the model."""
        from peft import PromptTuningConfig, get_peft_model

        full, work = step_work(model), step_work(model, [], inputs=True)
        config = PromptTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=self.tokens,
            prompt_tuning_init="SAMPLE_VOCAB",
        )
        with warnings.catch_warnings():
            # peft looks at every attribute of the model, also at those transformers is about to rename
            warnings.filterwarnings("ignore", category=FutureWarning)
            prompted: Any = get_peft_model(model, config)
        trained = list(prompted.prompt_encoder.parameters())
        first: Any = task.train[0]
        length = first["input_ids"].shape[1]
        return Prepared(
            model=PromptedForCausalLM(prompted, self.tokens),
            groups=[{"params": trained}],
            relative_cost=work / full * (1 + self.tokens / length),
        )


class PromptedForCausalLM(nn.Module):
    """A prompted model whose logits are those of the text alone; its class's name says what it predicts.

    Args:
        prompted: The model as `peft` wraps it.
        tokens: Length of the prompt.
    """

    def __init__(self, prompted: nn.Module, tokens: int) -> None:
        super().__init__()
        self.prompted = prompted
        self.config = prompted.config
        self._tokens = tokens

    def forward(self, **inputs: Any) -> Tensor:
        """Return the logits (batch, length, vocabulary) of a batch's texts."""
        logits: Tensor = self.prompted(**inputs).logits
        return logits[:, self._tokens :]
