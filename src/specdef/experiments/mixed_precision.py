"""A loss whose model runs in mixed precision: weights and steps in float32, matrix products in bfloat16."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from specdef.curvature.losses import Batch, Loss


@final
class MixedPrecision(Loss):
    """Another loss, with the model under `torch.autocast` in bfloat16; its outputs are float32 again.

    Args:
        inner: The other loss.
    """

    def __init__(self, inner: Loss) -> None:
        self.inner = inner

    def targets(self, batch: Batch) -> Tensor:
        """Return the other loss's targets."""
        return self.inner.targets(batch)

    def count(self, targets: Tensor) -> int:
        """Return the number of its terms."""
        return self.inner.count(targets)

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """Run the model in mixed precision.

        Args:
            model: In float32.
            batch: On the model's device.

        Returns:
            Its outputs, float32.
        """
        device = next(model.parameters()).device.type
        with torch.autocast(device, torch.bfloat16):
            return self.inner.outputs(model, batch).float()

    def terms(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the other loss's terms."""
        return self.inner.terms(outputs, targets)

    def output_gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the other loss's gradient."""
        return self.inner.output_gradient(outputs, targets)

    def output_hessian_product(
        self, outputs: Tensor, targets: Tensor, u: Tensor, out: Tensor | None = None
    ) -> Tensor:
        """Return the other loss's product."""
        return self.inner.output_hessian_product(outputs, targets, u, out)
