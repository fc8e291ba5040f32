"""Say what does not fit between a model and its retain data where torch would say how."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from specdef.curvature.losses import Batch
from specdef.errors import SpecDefError
from specdef.lock.deformation.memory import explained_memory


@contextmanager
def explained_fit(model: nn.Module, batch: Batch) -> Iterator[None]:
    """Explain what is raised while a model is run on a batch.

    Args:
        model: The model.
        batch: The batch.

    Raises:
        SpecDefError: In place of torch's own error.
    """
    try:
        with explained_memory():
            yield
    except (RuntimeError, ValueError, IndexError, TypeError, KeyError, AssertionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise SpecDefError(
            f"the retain data does not fit the model: {reason[:300]}",
            hint=f"Batches are what {type(model).__name__} takes: {_shapes(batch)} was given.",
        ) from error


def _shapes(batch: Batch) -> str:
    items = batch.items() if isinstance(batch, Mapping) else enumerate(batch)
    return ", ".join(f"{n} {list(x.shape)}" for n, x in items if isinstance(x, Tensor))
