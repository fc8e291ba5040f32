"""The command line: one executable, one file per verb; torch is imported inside the verbs only."""

from __future__ import annotations

import os
import sys

import typer

from specdef import __version__
from specdef.cli import audit as audit_verb
from specdef.cli import fragility as fragility_verb
from specdef.cli import inspect as inspect_verb
from specdef.cli import lock as lock_verb
from specdef.cli import predict as predict_verb
from specdef.cli import reproduce as reproduce_verb
from specdef.cli import spectrum as spectrum_verb
from specdef.cli import unlock as unlock_verb
from specdef.cli import verify as verify_verb
from specdef.cli.common import report_error
from specdef.cli.lock_options import GroupedHelp, LockCommand
from specdef.errors import SpecDefError

# Where the system grants large pages on request, let torch ask for them: every run of an attack touches fresh memory. It is read
# when torch first allocates, so it must stand before torch is imported.
if os.path.exists("/sys/kernel/mm/transparent_hugepage"):
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Lock open weights against training, check the lock, undo it with the key, attack it; predict training from curvature, and whether it breaks alignment.",
    epilog="Exit codes: 0 done, 1 a finding, 2 bad input, 3 did not converge.",
)


def _version(value: bool) -> bool:
    if value:
        typer.echo(f"specdef {__version__}")
        raise typer.Exit
    return value


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version."
    ),
) -> None:
    pass


app.command("inspect")(inspect_verb.inspect)
app.command("lock", cls=LockCommand)(lock_verb.lock)
app.command("verify", cls=GroupedHelp)(verify_verb.verify)
app.command("unlock")(unlock_verb.unlock)
app.command("audit", cls=GroupedHelp)(audit_verb.audit)
app.command("fragility")(fragility_verb.fragility)
app.command("predict")(predict_verb.predict)
app.command("spectrum")(spectrum_verb.spectrum)
app.command("reproduce")(reproduce_verb.reproduce)


def main(argv: list[str] | None = None) -> None:
    """Run the command line.

    Args:
        argv: Arguments behind the program's name; None takes sys.argv.

    Raises:
        SystemExit: Always, with the exit code.
    """
    arguments = sys.argv[1:] if argv is None else argv
    verb = next((name for name in arguments if not name.startswith("-")), "")
    try:
        app(args=arguments, prog_name="specdef")
    except SystemExit as ended:
        if ended.code == 130:  # typer turns Ctrl-C into this, without a word
            typer.echo("interrupted; nothing was left behind", err=True)
        raise
    except SpecDefError as error:
        report_error(error, as_json="--json" in arguments)
        raise SystemExit(error.exit_code) from None
    except ValueError as error:
        # argument mistakes of the library; anything else that raises ValueError is a bug and shows its traceback
        if type(error) is not ValueError:
            raise
        hint = f"`specdef {verb} --help` lists the options."
        report_error(error, as_json="--json" in arguments, hint=hint)
        raise SystemExit(2) from None
    except MemoryError as error:
        hint = "Give the process more memory, or select fewer layers."
        report_error(error, as_json="--json" in arguments, hint=hint)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
