"""What the verbs share: options, progress, JSON, errors, and finding a model."""

from __future__ import annotations

import json
import math
import os
import re
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specdef.errors import CheckpointError, SpecDefError

if TYPE_CHECKING:
    from specdef.lock.plan import LockPlan

HUB_IGNORED = [
    "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.gguf", "*.ot",
]  # fmt: skip
"""Other copies of the weights. All else is fetched: a certificate vouches for every file of its folder."""


def load_defaults(ctx: Any, value: Path | None) -> Path | None:
    """Take option values from a TOML file; what stands on the command line wins.

    Args:
        ctx: The verb's context: click's own, although typer asks for `typer.Context`, a class it does not pass.
        value: The file; its table [verb] (or, without one, its top level) names options with underscores or hyphens.
            A list is what commas are on the command line.

    Returns:
        The file.

    Raises:
        SpecDefError: The file cannot be read or names an option the verb lacks.
    """
    if value is None:
        return None
    try:
        table = tomllib.loads(value.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot be read ({error.strerror})", path=value) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"is not valid TOML ({error})", path=value) from error
    name = ctx.info_name or ""
    values = table.get(name, {k: v for k, v in table.items() if not isinstance(v, dict)})
    if not isinstance(values, dict):
        raise CheckpointError(
            f"`{name}` is no table", path=value, hint=f"Write options below a line [{name}]."
        )
    known = {found.name: found for found in ctx.command.params if found.name != "config"}
    defaults: dict[str, Any] = {}
    for key, item in values.items():
        if key.replace("-", "_") not in known or isinstance(item, dict):
            raise SpecDefError(
                f"{value}: `{name}` has no option {key!r}",
                hint=f"`specdef {name} --help` lists the options.",
            )
        option = key.replace("-", "_")
        if getattr(known[option], "multiple", False):  # an option that may be given several times
            defaults[option] = item if isinstance(item, list) else [item]
        else:
            defaults[option] = ",".join(map(str, item)) if isinstance(item, list) else item
    ctx.default_map = {**(ctx.default_map or {}), **defaults}
    return value


def check_device(value: str) -> str:
    """Refuse a device that torch cannot use here, before any work is done.

    Args:
        value: Name of the device.

    Returns:
        The name.

    Raises:
        SpecDefError: There is no such device.
    """
    if value == "cpu":  # the rule, and no reason to wait for torch
        return value
    import torch

    try:
        torch.zeros(1, device=value).item()  # "meta" holds no numbers
    except (RuntimeError, AssertionError) as error:
        raise SpecDefError(
            f"--device {value} cannot be used here ({str(error).splitlines()[0]:.80})",
            hint="Use cpu, or a device that this build of torch knows.",
        ) from error
    return value


Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout; human text goes to stderr.")
]
Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        callback=load_defaults,
        is_eager=True,
        help="TOML file with option values for the verb.",
    ),
]
Seed = Annotated[int, typer.Option("--seed", help="Seeds whatever is drawn.")]
Device = Annotated[
    str,
    typer.Option("--device", callback=check_device, help="Where models run: cpu, cuda, cuda:1, …"),
]


def say(text: str) -> None:
    """Print human text to stderr."""
    typer.echo(text, err=True)


def print_json(values: dict[str, Any]) -> None:
    """Print one JSON object to stdout; NaN and infinity become null."""
    typer.echo(json.dumps(_finite(values), indent=1, default=str, allow_nan=False))


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a report as `print_json` prints it."""
    text = json.dumps(_finite(values), indent=1, default=str, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def report_error(error: BaseException, *, as_json: bool, hint: str = "") -> None:
    """Print an error: what was found, where, and what to do next (`hint` where the error does not say)."""
    hint = getattr(error, "hint", "") or hint
    if not hint and isinstance(error, CheckpointError):
        hint = "Check the path; if the file is damaged, fetch it again."
    text = str(error) or type(error).__name__
    typer.echo(f"error: {text}", err=True)
    if hint:
        typer.echo(f"  -> {hint}", err=True)
    if as_json:
        print_json({"error": text, "type": type(error).__name__, "hint": hint})


def find_model(name: str, *, quiet: bool = False) -> Path:
    """Return the folder of a model, fetching it from the hub if it is a hub id.

    Args:
        name: Local folder or hub id ("org/name").
        quiet: Say nothing.

    Returns:
        A local folder.

    Raises:
        CheckpointError: There is no such folder or hub model, or the hub cannot be reached.
    """
    path = Path(name)
    if os.path.exists(path):  # Path.exists raises where a name is too long
        return path
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise CheckpointError(
            "does not exist", path=name, hint="Name a model folder, or a hub id like org/name."
        )
    from huggingface_hub import snapshot_download

    if not quiet:
        say(f"{name} is no local folder; asking the Hugging Face hub")
    try:
        return Path(snapshot_download(name, ignore_patterns=HUB_IGNORED))
    except (
        Exception
    ) as error:  # the hub client raises many kinds, and all of them mean the same here
        raise CheckpointError(
            f"is no local folder, and the hub did not give it ({type(error).__name__})", path=name,
            hint="Check the name and the network, or download the model first.",
        ) from error  # fmt: skip


def parse_layers(text: str | None) -> tuple[int, ...] | None:
    """Read "0,3,8-11".

    Args:
        text: Comma-separated indices and ranges; None stays None.

    Returns:
        The indices.

    Raises:
        ValueError: It is something else.
    """
    if text is None:
        return None
    out: list[int] = []
    for part in str(text).split(","):
        match = re.fullmatch(r"([0-9]{1,6})(?:-([0-9]{1,6}))?", part.strip())
        span = range(int(match[1]), int(match[2] or match[1]) + 1) if match else range(0)
        if not span:
            raise ValueError(f"--layers takes indices and ranges like 0,3,8-11, got {text!r}.")
        out += span
    return tuple(dict.fromkeys(out))


def parse_list(text: str | None) -> tuple[str, ...] | None:
    """Read a comma-separated list; None stays None."""
    return tuple(part.strip() for part in text.split(",") if part.strip()) if text else None


def parse_modules(text: str | None) -> tuple[str, ...] | str | None:
    """Read a comma-separated list of names; anything else is one regular expression, as in PEFT."""
    names = parse_list(text)
    plain = names is None or all(re.fullmatch(r"[\w.]+", name) for name in names)
    return names if plain else text


@contextmanager
def progress_bar(label: str) -> Iterator[tuple[Callable[[int, int], None], Callable[[str], None]]]:
    """Show progress on stderr: a bar on a terminal, a line every few seconds elsewhere.

    Args:
        label: What is being done.

    Yields:
        (progress, status): callbacks for (done, total) in bytes, and for what is being worked on.
    """
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        with Progress(
            TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn(),
            console=Console(stderr=True), transient=True,
        ) as bar:  # fmt: skip
            task = bar.add_task(label, total=None)
            yield (
                lambda done, total: bar.update(task, completed=done, total=total),
                lambda text: bar.update(task, description=f"{label}: {text}"),
            )
        return
    last = time.monotonic()

    def line(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > 5:
            last = time.monotonic()
            say(f"{label}: {done / max(total, 1):.0%}")

    yield line, lambda text: say(f"{label}: {text}")


def output_bytes(source_bytes: int, plan: LockPlan) -> int:
    """Estimate the bytes a lock writes: the weights, and the inserted layers of a compensated lock."""
    inserted = (
        sum(p.basis.shape[0] ** 2 * 4 for p in plan.projections.values())
        if plan.method == "compensated"
        else 0
    )
    return source_bytes + inserted


def human_bytes(n: float) -> str:
    """Write a size in MB or GB."""
    return f"{n / 1e9:.2f} GB" if n >= 1e9 else f"{n / 1e6:.1f} MB"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
