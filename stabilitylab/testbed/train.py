"""``python -m stabilitylab.testbed.train``: train the digit model, MEND and MALMEN anew, and print one table."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table

from stabilitylab.editors.base import Progress, quiet
from stabilitylab.editors.hypernetwork import HypernetworkEditor
from stabilitylab.editors.malmen import Malmen
from stabilitylab.editors.mend import Mend
from stabilitylab.editors.saving import write_whole
from stabilitylab.errors import StabilityLabError
from stabilitylab.testbed import blip2_digits, digits, evaluation
from stabilitylab.testbed.mend_data import edit_batch, examples, shipped
from stabilitylab.testbed.records import EditRecord
from stabilitylab.testbed.training import train_model

SEED = 0
SET = 8
"""Edits that MALMEN is judged by together."""


@dataclass(frozen=True)
class Job:
    """An editor to train: its steps, and the validation edits that it is judged by, `together` at a time."""

    kind: type[HypernetworkEditor]
    steps: int
    validation_edits: int
    together: int


JOBS = {"mend": Job(Mend, 150, 40, 1), "malmen": Job(Malmen, 600, 80, SET)}
HELD_OUT_EDITS = 200
HELD_OUT_STREAM = 777
SEQUENCES = 10
LONGEST = 60


@contextmanager
def _bar(console: Console, title: str) -> Iterator[Progress]:
    """A bar when a person watches; otherwise a line now and then."""
    if not console.is_terminal:
        console.print(f"{title} ...")
        yield quiet
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bars(*columns, TextColumn("{task.fields[says]}"), console=console, transient=True) as bars:
        task = bars.add_task(title, total=None, says="")

        def show(done: int, steps: int, says: str) -> None:
            bars.update(task, completed=done, total=steps, says=escape(says))

        yield show


def set_edits(
    model: Any, tokenizer: Any, records: Sequence[EditRecord], size: int, edit: Callable[[Any, list[EditRecord]], Any]
) -> evaluation.Scores:
    """Scores of sets of `size` edits, each set together on the unedited `model`, which is left as it was."""
    originals = evaluation.Originals.of(model, tokenizer, records)
    before = copy.deepcopy(model.state_dict())
    found = []
    for start in range(0, len(records), size):
        places = range(start, min(start + size, len(records)))
        edited = edit(model, [records[place] for place in places])
        found.append(originals.outcomes(edited, tokenizer, places))
        model.load_state_dict(before)
    return evaluation.scores(torch.cat(found))


def train_editor(job: Job, folder: Path, *, seed: int, progress: Progress = quiet) -> HypernetworkEditor:
    """An editor for the model in `folder`, at the state that was best on validation edits, rounded as it is stored.

    Best is by the smaller of success (mean of the three) and locality, on edits of the decoder in float16.
    """
    model, tokenizer = blip2_digits.load("fp32", folder)
    judged, _ = blip2_digits.load("fp16", folder)
    records = digits.edit_stream(seed, job.validation_edits, "validation")

    def figure(editor: Any) -> float:
        def edit(model: Any, some: list[EditRecord]) -> Any:
            return editor.edit(model, some if job.together > 1 else some[0])

        found = set_edits(judged, tokenizer, records, job.together, edit)
        return min((found.efficacy + found.rephrase + found.image_rephrase) / 3, found.locality)

    editor = job.kind.for_model(model, batch_of=edit_batch, seed=seed)
    settings = dataclasses.replace(editor.training_settings, steps=job.steps)
    editor.train_on(model, examples(seed), seed=seed, settings=settings, validate=figure, progress=progress)
    editor.round_to_stored()
    return editor


def first_non_finite(folder: Path, seed: int, precision: str = "fp16", longest: int = LONGEST) -> int | None:
    """The first edit of stream `seed` (from 1) after which a weight or a canary logit is NaN or infinite, if any.

    Logits at padding do not count.
    """
    model, tokenizer = blip2_digits.load(precision, folder)
    mend, canary = shipped(Mend, model, folder), blip2_digits.canary(tokenizer)
    real = canary["attention_mask"].bool()
    with torch.no_grad():
        for number, record in enumerate(digits.edit_stream(seed, longest), 1):
            mend.edit(model, record)
            values = [model.get_submodule(site).weight for site in mend.sites]
            if not all(bool(value.isfinite().all()) for value in [*values, model(**canary).logits[real]]):
                return number
    return None


def table(folder: Path, *, seconds: float | None = None) -> Table:
    """What the checkpoints in `folder` are worth, decoder in float16: accuracy, edits, sequences until NaN.

    `seconds` is how long their training took, if that is known.
    """
    model, tokenizer = blip2_digits.load("fp16", folder)
    mend, malmen = shipped(Mend, model, folder), shipped(Malmen, model, folder)
    records = digits.edit_stream(HELD_OUT_STREAM, HELD_OUT_EDITS)
    single = evaluation.single_edits(model, tokenizer, records, mend.edit)
    sets = set_edits(model, tokenizer, records, SET, malmen.edit)
    ends = [first_non_finite(folder, seed) for seed in range(SEQUENCES)]
    found = Table("held out, decoder in fp16", "", title="Digits testbed")
    rows: list[tuple[str, str]] = [
        ("parameters of the model", f"{_size(model):,}"),
        ("parameters of MEND", f"{_size(mend):,}"),
        ("parameters of MALMEN", f"{_size(malmen):,}"),
        ("visual questions right", f"{evaluation.accuracy(model, tokenizer):.3f}"),
        ("text questions right", f"{evaluation.text_accuracy(model, tokenizer):.3f}"),
        *_scored(f"MEND, {HELD_OUT_EDITS} single edits", single),
        (f"sequences with NaN or Inf within {LONGEST}", f"{sum(end is not None for end in ends)} of {SEQUENCES}"),
        ("… first such edit", " ".join("–" if end is None else str(end) for end in ends)),
        *_scored(f"MALMEN, {HELD_OUT_EDITS} edits in sets of {SET}", sets),
        ("size", f"{sum(path.stat().st_size for path in folder.glob('*.safetensors')) / 1e6:.2f} MB"),
        *([] if seconds is None else [("training", f"{seconds:.0f} s")]),
    ]
    for row in rows:
        found.add_row(*row)
    return found


def _size(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _scored(what: str, scores: evaluation.Scores) -> list[tuple[str, str]]:
    return [
        (f"{what}: success", f"{scores.efficacy:.3f}"),
        ("… rephrased question", f"{scores.rephrase:.3f}"),
        ("… rephrased image", f"{scores.image_rephrase:.3f}"),
        ("… text locality", f"{scores.text_locality:.3f}"),
        ("… image locality", f"{scores.image_locality:.3f}"),
    ]


def _train_into(out: Path, seed: int, only: str | None, console: Console) -> None:
    """Train the model and its editors and put them into `out` together: no model lies beside another's editor.

    only: the one editor to train, for the model that lies in `out` already.
    """
    with tempfile.TemporaryDirectory() as made:
        files = []
        if only is None:
            with _bar(console, "Digit model") as progress:
                files.append(blip2_digits.save(train_model(seed, progress=progress), made))
        model = out if only else Path(made)
        for name, job in JOBS.items():
            if only in (None, name):
                with _bar(console, job.kind.name) as progress:
                    files.append(train_editor(job, model, seed=seed, progress=progress).save(made))
        out.mkdir(parents=True, exist_ok=True)
        for file in files:
            write_whole(out / file.name, file.read_bytes())


def main(arguments: Sequence[str] | None = None) -> int:
    """Train into ``--out`` (the package's checkpoints by default) and print the table; 2 for bad arguments."""
    parser = argparse.ArgumentParser(prog="python -m stabilitylab.testbed.train", description=__doc__)
    parser.add_argument("--out", type=Path, default=blip2_digits.CHECKPOINTS, metavar="DIR", help="where to write")
    parser.add_argument("--seed", type=int, default=SEED, help="of weights and data order (default %(default)s)")
    parser.add_argument("--only", choices=JOBS, help="train this editor alone, for the model that lies in DIR")
    parser.add_argument("--table", action="store_true", help="train nothing: print the table of what lies in DIR")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)  # The tensors are small, and sums are the same on every machine's number of cores.
    console, start, seconds = Console(), time.monotonic(), None
    try:
        if not chosen.table:
            _train_into(chosen.out, chosen.seed, chosen.only, console)
            seconds = time.monotonic() - start
        with console.status("Measuring ..."):
            found = table(chosen.out, seconds=seconds)
        console.print(found)
        console.print(str(chosen.out), markup=False, soft_wrap=True)
    except (StabilityLabError, OSError) as error:
        Console(stderr=True).print(f"error: {error}", markup=False)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
