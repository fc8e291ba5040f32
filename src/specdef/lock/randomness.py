"""The caller's random state is left as it was, on every device a model lies on."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import nn


def forked_rng(model: nn.Module) -> AbstractContextManager[None]:
    """Return a block after which the random state of the CPU, and of a model's GPUs, is what it was before."""
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
    return torch.random.fork_rng(devices)
