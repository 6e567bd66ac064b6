"""``stabilitylab lab run`` and ``lab compare``."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from stabilitylab.commands.options import Precision, Tier, say
from stabilitylab.errors import UsageError

MOST_SEEDS = 2**32 - 1

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


def run_one(
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


def compare_several(
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
    from stabilitylab.reports.terminal import show
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
            show(Console(), lab_page(rows))
            say(f"runs: {folder}")
