"""The command ``stabilitylab``: arguments in, exit code out. Does no work of its own.

Exit codes: 0, 1 when the verdict (of a scan, a warning) reaches ``--fail-on`` or none of the last edits took effect, 2
when the command can't be carried out, 3 when the run holds nothing to judge yet, 5 when something asked for could not
be watched and nothing worse is known, 130 after Ctrl-C. A reader of the output that goes away ends it by SIGPIPE (141
in a shell), never by 1: that is a verdict's alone.
"""

from __future__ import annotations

import io
import signal
import sys
from typing import Annotated

import typer

import stabilitylab
from stabilitylab.commands import calibrate, check, compare, demo, lab, probes, report, scan, tail
from stabilitylab.commands.options import EXIT_USAGE
from stabilitylab.errors import StabilityLabError

app = typer.Typer(
    no_args_is_help=True,
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

lab_app = typer.Typer(no_args_is_help=True, help="Editing methods on real models, watched and scored.")
lab_app.command("run")(lab.run_one)
lab_app.command("compare")(lab.compare_several)
app.add_typer(lab_app, name="lab")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"stabilitylab {stabilitylab.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Numerical-stability diagnostics for sequential model editing."""


def main() -> None:
    """Run the command line; every error of ours, and of the disk, is one line on stderr and exit code 2."""
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that can't show ‖W‖ still gets its verdict
    try:
        app(prog_name="stabilitylab")
    except (StabilityLabError, OSError) as error:
        print("stabilitylab:", " ".join(str(error).splitlines()), file=sys.stderr)
        sys.exit(EXIT_USAGE)
