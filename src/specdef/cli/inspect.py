"""`specdef inspect`: what a model is made of, where it can be locked, and what that would cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from specdef.cli.common import (
    Config,
    Device,
    Json,
    Seed,
    find_model,
    human_bytes,
    output_bytes,
    parse_layers,
    parse_modules,
    print_json,
    progress_bar,
    say,
)

if TYPE_CHECKING:
    from specdef.weights.checkpoint import Checkpoint


def inspect(
    model: Annotated[str, typer.Argument(help="Model folder or hub id.")],
    spectra: Annotated[
        bool,
        typer.Option(
            "--spectra/--no-spectra",
            help="Compute singular values; without, only headers and samples are read.",
        ),
    ] = True,
    target_modules: Annotated[
        str | None, typer.Option(help="Restrict spectra to these modules.")
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="Restrict spectra to these blocks, like 0,3,8-11.")
    ] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    json: Json = False,
    config: Config = None,
) -> None:
    """Show tensors, spectra, symmetric sites and what they cover, and the plan of a default lock."""
    from specdef.lock.config import LockConfig
    from specdef.lock.selection import check_selection
    from specdef.weights.checkpoint import Checkpoint

    folder = find_model(model, quiet=json)
    checkpoint = Checkpoint.open(folder)
    modules, blocks = parse_modules(target_modules), parse_layers(layers)
    check_selection(checkpoint.names, LockConfig(target_modules=modules, layers=blocks))
    with progress_bar("inspect") as (progress, _):
        rows = inspect_tensors(
            checkpoint,
            spectra=spectra,
            modules=modules,
            layers=blocks,
            seed=seed,
            device=device,
            progress=progress,
        )
    report = {
        "model": model,
        "model_type": checkpoint.config.get("model_type"),
        "bytes": checkpoint.nbytes,
        "shards": list(checkpoint.headers),
        "tensors": rows,
        **inspect_sites(checkpoint),
    }
    if json:
        print_json(report)
    _show(report)


def inspect_tensors(
    checkpoint: Checkpoint,
    *,
    spectra: bool,
    modules: tuple[str, ...] | str | None = None,
    layers: tuple[int, ...] | None = None,
    seed: int = 0,
    device: str = "cpu",
    progress: Any = None,
) -> list[dict[str, Any]]:
    """Describe every tensor.

    Args:
        checkpoint: The open folder.
        spectra: Compute singular values of matrices and gains.
        modules: Compute them for these modules only.
        layers: Compute them for these blocks only.
        seed: Seeds the iterations.
        device: Where they run.
        progress: Called with (bytes done, bytes in all).

    Returns:
        One record per tensor: name, shape, dtype, role, selected; with spectra also sigma_max, sigma_min, stable_rank, condition,
        residual and method where they exist, or the problem that a matrix or vector holds NaN or Inf. Stacked experts and
        quantised tensors are described without.
    """
    from specdef.spectral.summary import spectral_summary
    from specdef.spectral.views import as_matrix
    from specdef.symmetries import is_transposed, layer_index, matches, role

    rows, done = [], 0
    for name, info in checkpoint.infos.items():
        wanted = (modules is None or matches(name, modules)) and (
            layers is None or layer_index(name) in layers
        )
        row: dict[str, Any] = {
            "name": name, "shape": list(info.shape), "dtype": info.dtype,
            "role": role(name, info.shape, checkpoint.config.get("model_type")), "selected": wanted,
        }  # fmt: skip
        if spectra and wanted and info.is_float and info.nbytes and len(info.shape) in (2, 4):
            matrix = as_matrix(
                checkpoint.read(name), transposed=is_transposed(name, checkpoint.config)
            )
            if bool(matrix.isfinite().all()):
                summary = spectral_summary(matrix.to(device), seed=seed)
                row |= {
                    "sigma_max": summary.sigma_max, "sigma_min": summary.sigma_min, "stable_rank": summary.stable_rank,
                    "condition": summary.condition, "residual": summary.residual, "method": summary.method,
                }  # fmt: skip
            else:
                row["problem"] = "holds NaN or Inf"
        elif spectra and wanted and info.is_float and info.nbytes and len(info.shape) == 1:
            vector = checkpoint.read(name).double().abs()
            if not bool(vector.isfinite().all()):
                row["problem"] = "holds NaN or Inf"
            elif row["role"] == "norm":
                row |= {
                    "sigma_max": float(vector.max()),
                    "method": "exact (diagonal)",
                    "residual": 0.0,
                }
        rows.append(row)
        done += info.nbytes
        if progress:
            progress(done, checkpoint.nbytes)
    return rows


def inspect_sites(checkpoint: Checkpoint) -> dict[str, Any]:
    """Describe the symmetric sites of a checkpoint and plan a default lock.

    Args:
        checkpoint: The open folder.

    Returns:
        sites, uncovered, plan; where there can be none (a family without a table, a locked folder), `sites_error`.
    """
    from specdef.errors import SpecDefError
    from specdef.lock.config import LockConfig
    from specdef.lock.lock import plan_lock
    from specdef.lock.stack import lower_lock
    from specdef.symmetries import find_sites

    try:
        lower_lock(checkpoint, LockConfig().method)
        found = find_sites(checkpoint.config, checkpoint.shapes)
        checkpoint.require_float()
        plan = plan_lock(checkpoint, LockConfig())
    except SpecDefError as error:
        return {
            "sites": [],
            "uncovered": [],
            "plan": None,
            "sites_error": str(error),
            "hint": error.hint,
        }
    largest = max(checkpoint.infos.values(), key=lambda info: info.nbytes)
    return {
        "family": found.family,
        "sites": [
            {"name": s.name, "kind": s.kind, "layer": s.layer, "size": s.size, "covers": [leg.tensor for leg in s.consumers]}
            for s in found.sites
        ],
        "uncovered": [{"tensor": name, "reason": reason} for name, reason in plan.uncovered.items()],
        "plan": {
            "method": plan.method, "sites": plan.num_sites, "tensors_changed": len(plan.tensors_changed),
            "bytes_read": checkpoint.nbytes, "bytes_written": output_bytes(checkpoint.nbytes, plan),
            "largest_tensor": largest.name, "largest_tensor_bytes": largest.nbytes, "notes": list(plan.notes),
        },
    }  # fmt: skip


def _show(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(stderr=True, width=None if Console(stderr=True).is_terminal else 180)
    table = Table(
        title=f"{report['model']} ({report['model_type']}, {human_bytes(report['bytes'])})"
    )
    for column in ("tensor", "shape", "dtype", "role"):
        table.add_column(column, no_wrap=column == "tensor", overflow="fold")
    for column in ("sigma_max", "stable rank", "condition", "residual"):
        table.add_column(column, justify="right")
    table.add_column("how")
    for row in report["tensors"]:
        if not row["selected"]:
            continue
        table.add_row(
            row["name"], "x".join(map(str, row["shape"])), row["dtype"], row["role"], _number(row.get("sigma_max")),
            _number(row.get("stable_rank")), _number(row.get("condition")), _number(row.get("residual")),
            row.get("problem") or row.get("method", ""),
        )  # fmt: skip
    console.print(table)
    if "sites_error" in report:
        say(f"no lock plan: {report['sites_error']}")
        if report["hint"]:
            say(f"  -> {report['hint']}")
        return
    kinds: dict[str, list[dict[str, Any]]] = {}
    for site in report["sites"]:
        kinds.setdefault(site["kind"], []).append(site)
    for kind, sites in kinds.items():
        inputs = {name for site in sites for name in site["covers"]}
        say(
            f"{len(sites):5} {kind} sites cover the inputs of {len(inputs)} tensors, such as {sites[0]['name']}"
        )
    reasons: dict[str, list[str]] = {}
    for item in report["uncovered"]:
        reasons.setdefault(item["reason"], []).append(item["tensor"])
    for reason, names in reasons.items():
        say(f"not covered: {len(names)} inputs, such as {names[0]} ({reason})")
    plan = report["plan"]
    say(
        f"a default lock: {plan['method']}, {plan['sites']} sites, {plan['tensors_changed']} tensors change; reads "
        f"{human_bytes(plan['bytes_read'])}, writes {human_bytes(plan['bytes_written'])}; largest tensor "
        f"{plan['largest_tensor']} ({human_bytes(plan['largest_tensor_bytes'])})"
    )
    for note in plan["notes"]:
        say(f"note: {note}")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
