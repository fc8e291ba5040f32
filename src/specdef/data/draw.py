"""Which rows of a data set a batch is made of."""

from __future__ import annotations

import torch

from specdef.data.records import Records
from specdef.errors import SpecDefError


def draw_rows(records: Records, batch_size: int, num_batches: int, seed: int) -> list[int]:
    """Draw rows without replacement.

    Args:
        records: The data.
        batch_size: Rows per batch.
        num_batches: Batches.
        seed: Decides which rows; the global random state is left as it was.

    Returns:
        `batch_size * num_batches` row numbers in random order.

    Raises:
        SpecDefError: There are fewer rows.
    """
    needed = batch_size * num_batches
    if len(records) < needed:
        raise SpecDefError(
            f"{records.source}: {len(records)} examples, {needed} were asked for ({num_batches} batches of {batch_size}).",
            hint=f"Ask for at most {len(records) // batch_size} batches, or give more data."
            if len(records) >= batch_size
            else f"Ask for batches of at most {len(records)}, or give more data.",
        )
    generator = torch.Generator().manual_seed(seed)
    rows: list[int] = torch.randperm(len(records), generator=generator)[:needed].tolist()
    return rows
