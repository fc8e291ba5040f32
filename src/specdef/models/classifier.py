"""A pretrained model with a fresh linear layer for classification on top."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import torch
from torch import nn

HEADS = ("classifier", "score")
"""Names of the last layer in transformers' classes."""


def pretrained_classifier(
    folder: Path, *, num_labels: int = 2, seed: int = 0, **config: Any
) -> nn.Module:
    """Load a pretrained model with a fresh linear layer for classification on top.

    The global random state is left as it was.

    Args:
        folder: With config and safetensors.
        num_labels: Number of classes.
        seed: Of the linear layer, drawn from N(0, 0.02²), a bias being 0.
        config: Entries of the config that replace those of the folder, such as num_hidden_layers: then the first are kept.

    Returns:
        The model in float32 and evaluation mode.
    """
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # a head that is missing, layers that are left over: as intended
    try:
        with torch.random.fork_rng(devices=[]), contextlib.redirect_stderr(io.StringIO()):
            model: nn.Module = AutoModelForSequenceClassification.from_pretrained(
                folder, num_labels=num_labels, dtype=torch.float32, local_files_only=True, **config
            )
    finally:
        logging.set_verbosity(verbosity)
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, head in model.named_children():
            if name in HEADS and isinstance(head, nn.Linear):
                head.weight.copy_(0.02 * torch.randn(head.weight.shape, generator=draws))
                if head.bias is not None:
                    head.bias.zero_()
    return model.eval()
