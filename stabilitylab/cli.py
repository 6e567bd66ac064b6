"""The command ``stabilitylab``: arguments in, exit code out. Does no work of its own.

Exit codes: 0, 1 when the verdict reaches ``--fail-on``, 2 when the command can't be carried out, 3 when the run holds
nothing to judge yet, 130 after Ctrl-C. A reader of the output that goes away ends it by SIGPIPE (141 in a shell), never
by 1: that is a verdict's alone.
"""

from __future__ import annotations

import io
import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

import stabilitylab
from stabilitylab.analysis import Diagnosis, json_safe, severity
from stabilitylab.analysis.thresholds import read
from stabilitylab.errors import StabilityLabError, UsageError
from stabilitylab.run import Run, load

EXIT_BAD_VERDICT = 1
EXIT_USAGE = 2
EXIT_INCOMPLETE = 3
MOST_SEEDS = 2**32 - 1
WIDEST_PAGE = 100
"""Columns: longer lines of prose are hard to read."""

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Numerical-stability diagnostics for sequential model editing.",
)


lab = typer.Typer(no_args_is_help=True, help="Editing methods on real models, watched and scored.")
app.add_typer(lab, name="lab")


class FailOn(str, Enum):
    """The verdicts that `check` can be told to fail on."""

    drifting = "drifting"
    diverging = "diverging"
    collapsed = "collapsed"
    nonfinite = "non-finite"


class Precision(str, Enum):
    """The dtypes that a testbed's model (of BLIP2-OPT: its decoder) can be loaded in."""

    fp16 = "fp16"
    bf16 = "bf16"
    fp32 = "fp32"


class Tier(str, Enum):
    """The sets of probes, by cost."""

    light = "light"
    default = "default"
    deep = "deep"


ModelName = Annotated[str, typer.Option(help="blip2-digits, smollm2, or the folder of a causal language model.")]
Edits = Annotated[int, typer.Option(min=1, max=100_000, help="How many edits, one on top of the other.")]
Data = Annotated[
    Path | None, typer.Option(help="Edit records in CounterFact's or MMEdit's layout instead of the model's own.")
]
ModelText = Annotated[Path | None, typer.Option("--text", help="Text for the second moments of ROME and MEMIT.")]
JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write a list of rows here too.")]
Events = Annotated[bool, typer.Option("--tensorboard", help="Also write TensorBoard events.")]
LabPrecision = Annotated[
    Precision | None, typer.Option(help="By default fp16 for blip2-digits' decoder, else fp32.", show_default=False)
]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, or its run.db.", show_default=False)]


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


@app.command()
def demo(
    precision: Annotated[Precision, typer.Option(help="The decoder's dtype; EasyEdit loads fp16.")] = Precision.fp16,
    edits: Annotated[int, typer.Option(min=1, max=1000, help="The most edits to make.")] = 60,
    seed: Annotated[int, typer.Option(min=0, help="Which stream of edits.")] = 0,
    out: Annotated[Path, typer.Option(help="The run's folder; a demo run in it is replaced.")] = Path("runs/demo"),
) -> None:
    """Edit a small real BLIP2-OPT with MEND, one edit after the other, until it says NaN; then say why."""
    from stabilitylab.testbed.demo import run_demo

    run_demo(out=out, edits=edits, seed=seed, precision=precision.value, console=Console())


def as_json(run: Run, found: Diagnosis) -> dict[str, Any]:
    """What ``check --json`` prints: the diagnosis with the run's name and costs, as plain JSON values."""
    diagnosis = found.to_json()
    extra = {
        "run": str(run.path),
        "edits": len(run),
        "complete": run.complete,
        "probe_time_share": run.probe_time_share,
        "canary_time_share": run.canary_time_share,
        "alarms": [vars(alarm) for alarm in run.alarms],
        "notes": [vars(note) for note in run.notes],
    }
    plain: dict[str, Any] = json_safe({**extra, **{key: value for key, value in diagnosis.items() if key != "edits"}})
    return plain


@app.command()
def check(
    run: RunPath,
    as_object: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    fail_on: Annotated[FailOn, typer.Option(help="Exit with 1 from this verdict on.")] = FailOn.diverging,
    thresholds: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Limits from `calibrate`, in place of those of the run.", show_default=False),
    ] = None,
) -> None:
    """Say what became of a run, and exit with 1 when it is diverging or worse.

    A run that goes on, or whose writer was killed, is judged by the edits that it holds.
    """
    limits = None if thresholds is None else read(thresholds)
    found = load(run)
    diagnosis = found.diagnosis(limits)
    if as_object:
        typer.echo(json.dumps(as_json(found, diagnosis), indent=2, allow_nan=False))
    else:
        from stabilitylab.reports.console import diagnosis_page

        console = Console()
        console.print(diagnosis_page(found, diagnosis), width=min(console.width, WIDEST_PAGE))
    if severity(diagnosis.verdict) >= severity(fail_on.value):
        raise typer.Exit(EXIT_BAD_VERDICT)
    if not any(edit.row.readings for edit in found.edits if edit.edit > 0):
        print(f"stabilitylab: '{found.path}' holds no measured edit yet; nothing to judge", file=sys.stderr)
        raise typer.Exit(EXIT_INCOMPLETE)


@app.command()
def tail(
    run: RunPath,
    interval: Annotated[float, typer.Option(min=0.1, max=3600, help="Seconds between two looks.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Show it as it is now, and end.")] = False,
    as_object: Annotated[bool, typer.Option("--json", help="Print one JSON object per new edit, a line each.")] = False,
) -> None:
    """Follow a run that goes on, from another terminal, until it is closed.

    A page that renews itself, or a line per new edit where the output is piped. A run that is not there yet is waited
    for.
    """
    from stabilitylab.reports.tail import follow

    def says(words: str) -> None:
        print("stabilitylab:", words, file=sys.stderr, flush=True)

    follow(run, interval=interval, once=once, as_json=as_object, says=says)


@app.command()
def compare(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run folders, or their run files.", show_default=False)
    ],
    as_object: Annotated[bool, typer.Option("--json", help="Print a JSON list with an object per run.")] = False,
) -> None:
    """Say what became of several runs, side by side."""
    from stabilitylab.reports.side_by_side import facts, side_by_side

    found = [load(run) for run in runs]
    if as_object:
        typer.echo(json.dumps([facts(run) for run in found], indent=2, allow_nan=False))
    else:
        console = Console()
        console.print(side_by_side(found, console.width))


@app.command()
def calibrate(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Runs known to be healthy, all of one kind.", show_default=False),
    ],
    out: Annotated[Path, typer.Option("--output", "-o", help="Where the limits go.")] = Path("thresholds.json"),
    alpha: Annotated[
        float, typer.Option(min=0.001, max=0.5, help="The share of healthy runs that may be called diverging.")
    ] = 0.05,
    as_object: Annotated[bool, typer.Option("--json", help="Print the limits as one JSON object.")] = False,
) -> None:
    """Take the analyzer's limits from runs of your own, for `check --thresholds` and `attach(thresholds=...)`.

    A further healthy run of the same kind of loop, model and editor is then called diverging by drift with probability
    ALPHA at most. That takes 19 runs for 0.05, and 99 for 0.01.
    """
    from stabilitylab.calibrating import calibrate as calibrate_on

    thresholds = calibrate_on(runs, alpha=alpha)
    limits = json.dumps(thresholds.to_json(), indent=2, allow_nan=False)
    out.write_text(f"{limits}\n", encoding="utf-8")
    typer.echo(limits if as_object else f"{out}: {thresholds}")


@app.command()
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="A run folder, or its run.db; several are compared.", show_default=False),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="The page; by default report.html in the run's folder, or comparison.html here."
        ),
    ] = None,
    as_object: Annotated[bool, typer.Option("--json", help="Print one JSON object: the two files' paths.")] = False,
) -> None:
    """Write the run's stability report, or compare several: one HTML page that needs nothing else, and its JSON."""
    found = [load(run) for run in runs]
    if len(found) > 1:
        from stabilitylab.reports.comparison import write_comparison

        page = write_comparison(found, out or Path("comparison.html"))
    else:
        from stabilitylab.reports.html import write_report

        page = write_report(found[0], out or found[0].path / "report.html")
    typer.echo(json.dumps({"page": str(page), "data": str(page.with_suffix(".json"))}) if as_object else page)


@app.command()
def probes(
    tier: Annotated[Tier, typer.Option(help="The tier to list; each holds the cheaper ones.")] = Tier.deep,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the page that docs/metrics.md holds.")] = False,
    as_object: Annotated[bool, typer.Option("--json", help="Print a JSON list with an object per metric.")] = False,
) -> None:
    """List what is measured: each metric with its unit, meaning, formula and source."""
    from stabilitylab.probes import probes_of
    from stabilitylab.reports.catalogue import catalogue_page, catalogue_table

    held = [(probe.tier, metric) for probe in probes_of(tier.value) for metric in probe.metrics]
    if as_object:
        listed = [{"tier": tier, **asdict(metric)} for tier, metric in held]
        typer.echo(json.dumps(listed, indent=2, allow_nan=False))
    elif markdown:
        typer.echo(catalogue_page(held), nl=False)
    else:
        Console().print(catalogue_table(held))


@lab.command("run")
def lab_run(
    editor: Annotated[str, typer.Option(help="Such as mend, or mend+ball; an unknown one lists them all.")],
    model: ModelName = "blip2-digits",
    edits: Edits = 60,
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEEDS, help="Which stream of edits.")] = 0,
    data: Data = None,
    text: ModelText = None,
    run: Annotated[
        Path | None, typer.Option(help="The run's new folder; by default one under runs/ named by the time.")
    ] = None,
    precision: LabPrecision = None,
    probes: Annotated[Tier, typer.Option(help="What is measured.")] = Tier.default,
    tensorboard: Events = False,
    json_file: JsonFile = None,
) -> None:
    """One stream of edits under one method, watched, and scored."""
    folder = run or _by_time("lab")
    _lab(model, [editor], [seed], edits, data, text, precision, probes, tensorboard, json_file, folder, single=True)


@lab.command("compare")
def lab_compare(
    editors: Annotated[str, typer.Option(help="Names with commas between them.")] = "mend,malmen,grace,mend+ball",
    model: ModelName = "blip2-digits",
    edits: Edits = 60,
    seeds: Annotated[str, typer.Option(help="Streams of edits, with commas between them.")] = "0",
    data: Data = None,
    text: ModelText = None,
    runs: Annotated[
        Path | None, typer.Option(help="Folder of the runs; by default one under runs/ named by the time.")
    ] = None,
    precision: LabPrecision = None,
    probes: Annotated[Tier, typer.Option(help="What is measured.")] = Tier.default,
    tensorboard: Events = False,
    json_file: JsonFile = None,
) -> None:
    """The same streams under several methods: one table, and one run folder each."""
    names = [name.strip() for name in editors.split(",") if name.strip()]
    folder = runs or _by_time("lab")
    _lab(model, names, _numbers(seeds), edits, data, text, precision, probes, tensorboard, json_file, folder)


def _by_time(name: str) -> Path:
    return Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"


def _numbers(words: str) -> list[int]:
    found = [word.strip() for word in words.split(",") if word.strip()]
    wrong = next((word for word in found if not (word.isascii() and word.isdigit() and int(word) <= MOST_SEEDS)), None)
    if wrong is not None:
        raise UsageError(f"--seeds {words!r}: {wrong!r} is no seed; expected whole numbers up to {MOST_SEEDS}")
    return [int(word) for word in found]


def _lab(
    model: str,
    editors: Sequence[str],
    seeds: Sequence[int],
    edits: int,
    data: Path | None,
    text: Path | None,
    precision: Precision | None,
    probes: Tier,
    tensorboard: bool,
    json_file: Path | None,
    folder: Path,
    *,
    single: bool = False,
) -> None:
    """Open the testbed, make the runs, print the table; the rows so far are written after each run."""
    from stabilitylab.testbed.beds import open_bed
    from stabilitylab.testbed.compare import compare, expect_names, expect_writable, watched, write_rows
    from stabilitylab.testbed.lab_page import LabProgress, lab_page

    expect_names(editors, seeds)  # before minutes are spent on a model
    if json_file is not None:
        expect_writable(json_file)
    says = LabProgress(len(editors) * len(seeds), Console(stderr=True))
    with says.preparing(model) as progress:
        bed = open_bed(model, precision=precision and precision.value, data=data, text=text, progress=progress)
    options: dict[str, Any] = {"watch": says, "probes": probes.value, "tensorboard": tensorboard}
    made = (
        iter([watched(bed, editors[0], edits=edits, seed=seeds[0], run=folder, **options)])
        if single
        else compare(bed, editors, seeds=seeds, edits=edits, folder=folder, **options)
    )
    rows = []
    try:
        for row in made:
            rows.append(row)
            if json_file is not None:
                write_rows(rows, json_file)
    finally:  # what is done is shown, whatever ended the rest
        if rows:
            console = Console()
            console.print(lab_page(rows))
            console.print(f"runs: {folder}", markup=False, soft_wrap=True)


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
