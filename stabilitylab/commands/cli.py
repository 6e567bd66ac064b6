"""The command ``stabilitylab``: arguments in, exit code out. Does no work of its own.

Exit codes: 0, those of `options`, and 130 after Ctrl-C. A reader of the output that goes away ends it by SIGPIPE (141
in a shell), never by 1: that is a verdict's alone.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer

import stabilitylab
from stabilitylab.commands import calibrate, check, compare, demo, lab, probes, report, scan, tail
from stabilitylab.commands.options import EXIT_INTERNAL, EXIT_INTERRUPTED, EXIT_USAGE, complain
from stabilitylab.errors import StabilityLabError

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Numerical-stability diagnostics for sequential model editing.",
)
for verb in (
    demo.demo,
    scan.scan,
    check.check,
    tail.tail,
    compare.compare,
    calibrate.calibrate,
    report.report,
    probes.probes,
):
    app.command()(verb)

lab_app = typer.Typer(help="Editing methods on real models, watched and scored.")
lab_app.command("run")(lab.run_one)
lab_app.command("compare")(lab.compare_several)
app.add_typer(lab_app, name="lab")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"stabilitylab {stabilitylab.__version__}")
        raise typer.Exit


def _help(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(EXIT_USAGE)


@lab_app.callback(invoke_without_command=True)
def _lab(context: typer.Context) -> None:
    """Editing methods on real models, watched and scored."""
    _help(context)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Numerical-stability diagnostics for sequential model editing."""
    _help(context)


def main() -> None:
    """Run the command line; every error is one line on stderr, with exit code 2, or 4 where it should not have been."""
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that can't show ‖W‖ still gets its verdict
    try:
        # Not by itself: its own words about a wrong argument show that as it came.
        code = app(prog_name="stabilitylab", standalone_mode=False)
    except (StabilityLabError, OSError) as error:
        complain(error)
        sys.exit(EXIT_USAGE)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except typer.Abort as error:
        sys.exit(EXIT_INTERRUPTED if isinstance(error.__cause__, KeyboardInterrupt) else EXIT_USAGE)
    except Exception as error:
        if hasattr(error, "format_message"):  # an argument that is none, of whichever click Typer brings
            usage = getattr(error, "ctx", None)
            complain(f"{error.format_message()}{'' if usage is None else f' {usage.get_usage()}; see --help'}")
            sys.exit(EXIT_USAGE)
        if os.environ.get("STABILITYLAB_DEBUG"):
            raise
        at = traceback.extract_tb(error.__traceback__)[-1]
        complain(
            f"internal error: {type(error).__name__}: {error} ({Path(at.filename).name}:{at.lineno}); please report it"
            " with the command, and with what STABILITYLAB_DEBUG=1 shows"
        )
        sys.exit(EXIT_INTERNAL)
    sys.exit(code if isinstance(code, int) else 0)
