"""`specdef audit`: how strong is this lock? Every attack beside its control, a verdict by tier, and a report."""

from __future__ import annotations

import inspect
import re
import shlex
from collections.abc import Mapping
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from specdef.cli import audit_options as options
from specdef.cli.common import (
    Config,
    Device,
    Json,
    Seed,
    find_model,
    parse_list,
    print_json,
    say,
)
from specdef.errors import CheckpointError, SpecDefError

if TYPE_CHECKING:
    from specdef.attacks.task import Budget

STUDY = "audit.journal"
"""Where the runs of an audit are kept, in its folder."""


def audit(
    locked: options.Locked = None,
    original: options.Original = None,
    data: options.Data = None,
    heldout: options.Heldout = None,
    heldout_split: options.HeldoutSplit = None,
    retain: options.Retain = None,
    batch_size: options.BatchSize = 4,
    num_batches: options.NumBatches = 8,
    eval_batches: options.EvalBatches = 4,
    length: options.Length = 64,
    split: options.Split = None,
    columns: options.Columns = None,
    task: options.Task = None,
    suite: options.Suite = "2026.1",
    size: options.SuiteSize = None,
    tiers: options.Tiers = "1-6",
    only: options.Only = None,
    optimizers: options.Optimizers = None,
    budget: options.BudgetText = None,
    steps: options.Steps = None,
    evaluations: options.Evaluations = None,
    seconds: options.Seconds = None,
    seeds: options.Seeds = None,
    dtype: options.Precision = options.Dtype.float32,
    key: options.Key = None,
    keep_going: options.KeepGoing = False,
    out: options.Out = None,
    resume: options.Resume = False,
    workers: options.Workers = 1,
    storage: options.Storage = None,
    report: options.Report = None,
    list_attacks: options.ListAttacks = False,
    dry_run: options.DryRun = False,
    seed: Seed = 0,
    device: Device = "cpu",
    json: Json = False,
    config: Config = None,
) -> None:
    """Attack a locked model and its original alike, and say tier by tier what the lock withstood.

    Exit code 1 where it did not withstand something, 3 where nothing valid was measured.
    """
    given = dict(locals())
    if list_attacks:
        from specdef.cli.audit_plan import listing, say_listing

        values = listing()
        if json:
            print_json(values)
        say_listing(values)
        return
    if report is not None:
        _render_again(report, out, as_json=json)
        return
    if locked is None or original is None or data is None:
        raise ValueError("an audit needs LOCKED, --original MODEL and --data DATA.")
    from specdef.audit.suite import entries
    from specdef.cli.audit_plan import (
        choose_attacks,
        choose_suite,
        parse_tiers,
        plan_audit,
        say_dry_run,
    )
    from specdef.cli.audit_workers import further_workers, load_audited
    from specdef.cli.retain_data import RetainData

    wanted = parse_tiers(tiers)
    recipe = choose_suite(suite, size.value if size else None)
    attacks = choose_attacks(recipe, parse_list(only), parse_list(optimizers), key)
    if not entries(recipe, attacks, wanted):
        raise SpecDefError("no attack is left: those chosen are of other tiers", hint=f"Leave --tiers {tiers} out.")  # fmt: skip
    spent = _budget(recipe.budget, budget, steps, evaluations, seconds)
    for name, number in (("seeds", seeds), ("workers", workers)):
        if number is not None and number < 1:
            raise ValueError(f"--{name} must be at least 1, got {number}.")
    if retain is not None and retain == data:
        raise ValueError("--retain names the very data that is learned; give data of the model's own task.")  # fmt: skip
    drawn = RetainData(
        retain=data, heldout=heldout, batch_size=batch_size, num_batches=num_batches, eval_batches=eval_batches, length=length,
        split=split, heldout_split=heldout_split, columns=columns, task=task, seed=seed,
    )  # fmt: skip
    folder, source = find_model(locked, quiet=json), find_model(original, quiet=json)
    place = out or Path(f"{folder.resolve().name}.audit")
    if not (resume or dry_run):
        _refuse_used(place)
    models = (folder, source, drawn, retain, device)
    victim, twin, goal = load_audited(*models)
    if dry_run:
        values = plan_audit(victim, goal, recipe, attacks, tiers=wanted, budget=spent, seeds=seeds or recipe.seeds, dtype=dtype.value)  # fmt: skip
        values = {"locked": locked, "original": original, "data": data, **values}
        if json:
            print_json(values)
        say_dry_run(values)
        return
    from specdef.audit.audit import audit as run_audit
    from specdef.audit.render.pages import write_pages
    from specdef.audit.storage import FAILURES
    from specdef.cli.audit_progress import audit_view
    from specdef.cli.lock_deformation import Interrupted

    settings: dict[str, Any] = {
        "attacks": attacks, "tiers": wanted, "budget": spent, "seeds": seeds, "suite": recipe.name, "dtype": dtype.value,
        "storage": storage or place / STUDY, "stop_when_broken": not keep_going,
    }  # fmt: skip
    try:
        with further_workers(workers, models, settings), audit_view() as progress:
            found = run_audit(victim, twin, goal, progress=progress, **settings)
    except KeyboardInterrupt:
        raise Interrupted(
            f"interrupted; the runs so far are in {_kept(storage, place)}",
            hint="Go on with the same command and --resume.",
        ) from None
    except FAILURES as error:
        raise SpecDefError(
            f"{_kept(storage, place)} cannot be read or written: {(str(error).splitlines() or [type(error).__name__])[0]}",
            hint="See to its disk or server, then go on with the same command and --resume.",
        ) from error
    values = found.to_dict() | {"about": _about(given)}
    files = write_pages(place, values)
    if json:
        print_json({n: v for n, v in values.items() if n != "curves"} | {"files": [str(f) for f in files]})  # fmt: skip
    _show(values, files)
    if code := exit_code(values):
        raise typer.Exit(code)


def exit_code(report: Mapping[str, Any]) -> int:
    """Return what the verb ends with.

    Args:
        report: `AuditReport.to_dict()`.

    Returns:
        0 if everything tested held; 1 if a tier was broken or weakened, or the model is useless; 3 if nothing valid was
        measured.
    """
    found = {tier["status"] for tier in report["tiers"]}
    if report["useless"] or found & {"broken", "weakened"}:
        return 1
    return 0 if "held at this budget" in found else 3


def _budget(
    usual: Budget, text: str | None, steps: int | None, evaluations: int | None, seconds: float | None
) -> Budget:  # fmt: skip
    """Put a budget together of "STEPS" or "STEPS/SECONDS" and the single options."""
    if text is not None:
        match = re.fullmatch(r"(\d+)?(?:/(\d+(?:\.\d+)?))?", text.strip())
        if not match or not any(match.groups()):
            raise ValueError(f"--budget takes STEPS, STEPS/SECONDS or /SECONDS, like 20 or 20/60, got {text!r}.")  # fmt: skip
        if (match[1] and steps is not None) or (match[2] and seconds is not None):
            raise ValueError("--budget says the same as --steps and --seconds; give one of them.")
        steps = int(match[1]) if match[1] else steps
        seconds = float(match[2]) if match[2] else seconds
    if seconds is not None and not seconds > 0:
        raise ValueError(f"--seconds must be positive, got {seconds}.")
    changes = {"steps": steps, "evaluations": evaluations, "seconds": seconds}
    return replace(usual, **{n: v for n, v in changes.items() if v is not None})  # type: ignore[arg-type]


def _kept(storage: str | None, folder: Path) -> str:
    """Name where the runs are kept; an address of a database may hold a password."""
    if storage is None:
        return str(folder / STUDY)
    return "the database" if "://" in storage else storage


def _refuse_used(folder: Path) -> None:
    if folder.is_dir() and any(folder.iterdir()):
        raise CheckpointError(
            "is there already, and not empty", path=folder, hint="Go on with it: --resume; or choose another --out."
        )  # fmt: skip
    if folder.exists() and not folder.is_dir():
        raise CheckpointError("is no folder", path=folder, hint="Choose another --out.")


def _about(given: Mapping[str, Any]) -> dict[str, str]:
    """Return what a report says of its run: names, no paths and no credentials of this machine."""
    said = {name: Path(str(given[name])).name for name in ("locked", "original", "data")}
    drawn = f"{given['num_batches']} batches of {given['batch_size']} rows to learn from, {given['eval_batches']} held out"
    return {
        "command": command_line(given),
        "locked model": said["locked"],
        "original": said["original"],
        "data": f"{said['data']}: {drawn}, seed {given['seed']}",
        "device": given["device"],
    }


def command_line(given: Mapping[str, Any]) -> str:
    """Write the options of a run as a command; absolute paths by their last part, addresses without who logs in.

    Args:
        given: The arguments of `audit` by name.

    Returns:
        The command, with every option that is not at its default.
    """
    parts = ["specdef", "audit"]
    for name, parameter in inspect.signature(audit).parameters.items():
        value = given[name]
        if value == parameter.default or name in ("json", "config"):
            continue
        text = str(value.value if isinstance(value, Enum) else value)
        if "://" in text:
            scheme, _, rest = text.partition("://")
            text = f"{scheme}://{rest.rpartition('@')[2].partition('?')[0]}"
        elif Path(text).is_absolute():
            text = Path(text).name
        flag = [] if name == "locked" else [f"--{name.replace('_', '-')}"]
        parts += flag if value is True else [*flag, text]
    return shlex.join(parts)


def _render_again(path: Path, out: Path | None, *, as_json: bool) -> None:
    from specdef.audit.render.pages import read_report, write_pages

    values = read_report(path)
    place = out or path.parent
    if place.exists() and not place.is_dir():
        raise CheckpointError("is no folder", path=place, hint="Choose another --out.")
    files = write_pages(place, values)
    if as_json:
        print_json({"files": [str(file) for file in files]})
    _show(values, files)


def _show(report: Mapping[str, Any], files: list[Path]) -> None:
    from specdef.audit.render.view import view

    said = view(report)
    for tier in said["tiers"]:
        say(f"tier {tier['tier']} ({tier['name']}): {tier['status']['word']}{'; ' if tier['said'] else ''}{tier['said']}")  # fmt: skip
    for flag in said["flags"]:
        say(f"flag {flag['flag']}, {len(flag['cells'])} cell(s): {flag['advice']}")
    say(report["verdict"])
    for file in files:
        say(f"wrote {file}")
