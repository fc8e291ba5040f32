"""`specdef spectrum`: the eigenvalues of a model's curvature, where they sit, and how they are distributed."""

from __future__ import annotations

import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from specdef.cli.analysis import (
    BatchSize,
    Columns,
    Data,
    DataOptions,
    Dtype,
    Length,
    NumBatches,
    Parameters,
    Precision,
    Split,
    TaskName,
    load_workload,
    progress_text,
)
from specdef.cli.common import (
    Config,
    Device,
    Json,
    Seed,
    find_model,
    parse_list,
    print_json,
    say,
    write_json,
)


class Matrix(StrEnum):
    """Matrices whose spectrum is shown."""

    hessian = "hessian"
    ggn = "ggn"
    fisher = "fisher"


def spectrum(
    model: Annotated[str, typer.Argument(help="Model folder or hub id.")],
    data: Data,
    operator: Annotated[
        Matrix,
        typer.Option(help="Hessian, its Gauss-Newton part, or the empirical Fisher matrix."),
    ] = Matrix.hessian,
    k: Annotated[int, typer.Option(help="Eigenvalues of largest magnitude.")] = 5,
    num_probes: Annotated[
        int, typer.Option(help="Random vectors for the density; 0 for no density.")
    ] = 4,
    num_steps: Annotated[int, typer.Option(help="Lanczos steps for each of them.")] = 40,
    blocks: Annotated[
        bool,
        typer.Option(help="Also compute the largest eigenvalue of every block of parameters."),
    ] = True,
    tol: Annotated[float, typer.Option(help="Relative error accepted for an eigenvalue.")] = 1e-2,
    max_matvecs: Annotated[
        int, typer.Option(help="Products an eigenvalue computation may take.")
    ] = 300,
    parameters: Parameters = None,
    batch_size: BatchSize = 4,
    num_batches: NumBatches = 1,
    length: Length = 64,
    split: Split = None,
    columns: Columns = None,
    task: TaskName = None,
    dtype: Dtype = Precision.float32,
    out: Annotated[
        Path | None, typer.Option(help="Folder to create, with spectrum.json and spectrum.png.")
    ] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    json: Json = False,
    config: Config = None,
) -> None:
    """Show the spectrum of a model's curvature on data. Exit 3 if an eigenvalue did not converge."""
    if k < 1:
        raise ValueError(f"--k must be at least 1, got {k}.")
    if num_probes < 0 or num_steps < 1:
        raise ValueError("--num-probes must not be negative, --num-steps at least 1.")
    if max_matvecs < 1:
        raise ValueError(f"--max-matvecs must be at least 1, got {max_matvecs}.")
    began = time.monotonic()
    from specdef.cli.spectrum_report import (
        block_eigenvalue,
        curves,
        group_by_block,
        make_operator,
        measure,
        plot_spectrum,
        spectrum_report,
    )
    from specdef.weights.atomic import atomic_folder, refuse_existing

    if out is not None:
        refuse_existing(out)
    folder = find_model(model, quiet=json)
    options = DataOptions(
        data=data, batch_size=batch_size, num_batches=num_batches, length=length, split=split, columns=columns,
        task=task, seed=seed,
    )  # fmt: skip
    work = load_workload(folder, options, dtype=dtype.value, device=device)
    limits: dict[str, Any] = {"tol": tol, "max_matvecs": max_matvecs, "seed": seed}
    with progress_text("spectrum") as progress:
        H = make_operator(operator.value, work, parse_list(parameters), dtype.value)
        progress.watch(H)
        progress.phase("largest eigenvalues and density")
        found, density = measure(H, k, num_probes, num_steps, **limits)
        tops = {}
        if blocks:
            for name, members in group_by_block(H.slices).items():
                progress.phase(name)
                block = make_operator(operator.value, work, members, dtype.value)
                progress.watch(block)
                tops[name] = block_eigenvalue(block, **limits)
    report = {
        "model": model, "data": data, "task": work.loaded.task, "operator": operator.value, "dtype": dtype.value,
        **spectrum_report(H, found, tops, density), "seconds": round(time.monotonic() - began, 2), "files": [],
    }  # fmt: skip
    if out is not None:
        with atomic_folder(out) as place:
            report["files"] = [str(out / "spectrum.json"), str(out / "spectrum.png")]
            write_json(place / "spectrum.json", report | {"curves": curves(density)})
            plot_spectrum(place / "spectrum.png", report, density)
    if json:
        print_json(report)
    _show(report)
    if not bool(found.converged.all()):
        say("not converged: raise --max-matvecs or --tol")
        raise typer.Exit(3)


def _show(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(stderr=True, width=None if Console(stderr=True).is_terminal else 180)
    title = f"{report['operator']} of {report['model']}: {report['num_parameters']} parameters, loss {report['loss']:.4g}"
    table = Table("eigenvalue", "error", "most of its vector lies in", title=title)
    for row in report["top"]:
        mass = sorted(row["mass"].items(), key=lambda item: -item[1])[:3]
        table.add_row(
            f"{row['value']:.5g}", f"{row['error']:.1g}{'' if row['converged'] else ' (not converged)'}",
            ", ".join(f"{name} {share:.0%}" for name, share in mass),
        )  # fmt: skip
    console.print(table)
    if any("value" in row for row in report["blocks"].values()):
        table = Table(
            "block", "parameters", "its largest eigenvalue", title="blocks on the diagonal"
        )
        for name, row in report["blocks"].items():
            value = f"{row['value']:.5g}{'' if row['converged'] else ' (not converged)'}"
            table.add_row(name, str(row["num_parameters"]), value)
        console.print(table)
    for bound in report["bounds"]:
        if bound["value"] is None:
            say(f"bound by {bound['name']}: {bound['reason']}")
        else:
            say(
                f"bound by block {bound['block']}: {bound['value']:.4g}, truth is {bound['tightness']:.3g} times that"
            )
    if report["density"]:
        d = report["density"]
        error = f"{d['trace_standard_error']:.1g}"
        say(
            f"trace {d['trace']:.4g} (standard error {error if error != 'nan' else 'unknown from one probe'}); "
            f"{d['above']:.2%} of eigenvalues above {d['near_zero']:.2g}, {d['below']:.2%} below -{d['near_zero']:.2g}"
        )
    for path in report["files"]:
        say(f"wrote {path}")
