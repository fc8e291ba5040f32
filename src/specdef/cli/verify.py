"""`specdef verify`: is this folder what its certificate says?"""

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
    parse_list,
    print_json,
    progress_bar,
    say,
)

COMPARABLE = ("float64", "float32", "bfloat16", "float16")
"""Dtypes a model can be loaded in."""


def verify(
    locked: Annotated[str, typer.Argument(help="Locked folder or hub id.")],
    original: Annotated[
        str | None, typer.Option(help="The unlocked model: compare hashes and outputs with it.")
    ] = None,
    key: Annotated[
        Path | None, typer.Option(help="The key: check that it unlocks to the original.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Dtypes outputs are compared in, comma-separated.")
    ] = "float32,bfloat16",
    public_key: Annotated[
        Path | None, typer.Option(help="Check the folder's signature with this key, PEM.")
    ] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    json: Json = False,
    config: Config = None,
) -> None:
    """Verify a locked model: certificate, hashes, and outputs against the original's. Exit 1 if anything fails."""
    dtypes = parse_list(dtype) or ()
    if not dtypes or not set(dtypes) <= set(COMPARABLE):
        raise ValueError(f"--dtype takes some of {', '.join(COMPARABLE)}, got {dtype!r}.")
    from specdef.lock.verify import verify_checkpoint

    folder = find_model(locked, quiet=json)
    source = find_model(original, quiet=json) if original else None
    if public_key:
        from specdef.lock.signing import verify_signature

        verify_signature(folder, public_key)
        say("the signature holds")
    with progress_bar("verify") as (progress, status):
        result = verify_checkpoint(
            folder,
            source,
            key,
            dtypes=dtypes,
            seed=seed,
            device=device,
            progress=progress,
            status=None if json else status,
        )
    if json:
        print_json(result.to_dict())
    say(
        f"{'valid' if result.valid else 'NOT VALID'}: {result.tensors_checked} tensors checked, method {result.method}"
    )
    for item in result.outputs:
        verdict = (
            "bit-identical"
            if item.bit_identical
            else f"differ by up to {item.max_abs_logit_difference:.3g}"
        )
        say(f"outputs in {item.dtype}: {verdict} (largest output {item.max_abs_logit:.3g})")
    if result.source_matches is not None:
        say(
            f"the original given {'is' if result.source_matches else 'is NOT'} the model that was locked"
        )
    if result.key_matches is not None:
        say(
            f"the key {'unlocks' if result.key_matches else 'does NOT unlock'} it to the recorded original"
        )
    for problem in result.problems[:20]:
        say(f"  problem: {problem}")
    if len(result.problems) > 20:
        say(f"  … and {len(result.problems) - 20} more")
    if not result.valid:
        raise typer.Exit(1)
