"""The tables a transformers model turns tokens into vectors with, and vectors into tokens: asked for, never guessed."""

from __future__ import annotations

from torch import nn


def input_embeddings(model: nn.Module) -> nn.Module | None:
    """Return what a model turns its input into vectors with; None where it does not say."""
    return _asked(model, "get_input_embeddings")


def output_embeddings(model: nn.Module) -> nn.Module | None:
    """Return the layer a language model predicts tokens with; None for other models."""
    return _asked(model, "get_output_embeddings")


def _asked(model: nn.Module, method: str) -> nn.Module | None:
    try:
        found: nn.Module | None = getattr(model, method, lambda: None)()
    except (AttributeError, NotImplementedError):  # transformers models without such a table
        return None
    return found
