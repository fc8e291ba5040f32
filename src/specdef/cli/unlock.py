"""`specdef unlock`: the original back, to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from specdef.cli.common import (
    Config,
    Device,
    Json,
    Seed,
    find_model,
    print_json,
    progress_bar,
    say,
)


def unlock(
    locked: Annotated[str, typer.Argument(help="Locked folder or hub id.")],
    restored: Annotated[Path, typer.Argument(help="Folder to create.")],
    key: Annotated[Path, typer.Option(help="The key that `specdef lock` wrote.")],
    seed: Seed = 0,
    device: Device = "cpu",
    json: Json = False,
    config: Config = None,
) -> None:
    """Undo a lock with its key, or refuse. Nothing is drawn and no model runs: --seed and --device change nothing."""
    from specdef.lock.unlock import unlock_checkpoint

    with progress_bar("unlock") as (progress, status):
        result = unlock_checkpoint(
            find_model(locked, quiet=json),
            restored,
            key,
            progress=progress,
            status=None if json else status,
        )
    if json:
        print_json(result.to_dict())
    say(
        f"restored {result.tensors} tensors to {result.restored}; every SHA-256 equals the one recorded at lock time"
    )
    if result.still_locked:
        say(f"it is still locked, by {result.still_locked}: the key of that lock undoes it")
