"""``python -m stabilitylab.testbed.train``: train the digit model and its MEND editor anew, and print one table."""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from stabilitylab.editors.mend import Mend
from stabilitylab.errors import StabilityLabError
from stabilitylab.testbed import blip2_digits, digits, evaluation
from stabilitylab.testbed import training as train_digits
from stabilitylab.testbed.mend_data import examples
from stabilitylab.testbed.training import train_model

SEED = 0
MEND_STEPS = 150
KEEP_WEIGHT = 30.0
"""Of the locality KL, against 1 of the edit loss; the authors weigh them 1 and 0.1. Less makes larger updates and an
earlier NaN."""
LEARNING_RATE = 5e-4
RATE_LEARNING_RATE = 3e-5
VALIDATION_EDITS = 40
HELD_OUT_EDITS = 200
HELD_OUT_STREAM = 777
SEQUENCES = 10
LONGEST = 60


@contextmanager
def _bar(console: Console, title: str) -> Iterator[train_digits.Progress]:
    """A bar when a person watches; otherwise a line now and then."""
    if not console.is_terminal:
        console.print(f"{title} ...")
        yield train_digits.quiet
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[says]}"), console=console, transient=True) as bars:
        task = bars.add_task(title, total=None, says="")

        def show(done: int, steps: int, says: str) -> None:
            bars.update(task, completed=done, total=steps, says=escape(says))

        yield show


def train_mend(folder: Path, *, seed: int, steps: int, progress: train_digits.Progress = train_digits.quiet) -> Mend:
    """An editor for the model in `folder`, at the state that was best on validation edits, rounded as it is stored.

    Best is by the smaller of success (mean of the three) and locality, on edits of the decoder in float16.
    """
    model, tokenizer = blip2_digits.load("fp32", folder)
    judged, _ = blip2_digits.load("fp16", folder)
    records = digits.edit_stream(seed, VALIDATION_EDITS, "validation")

    def figure(mend: Mend) -> float:
        found = evaluation.single_edits(judged, tokenizer, records, mend.edit)
        return min((found.efficacy + found.rephrase + found.image_rephrase) / 3, found.locality)

    mend = Mend.for_model(model, seed=seed)
    mend.train_on(
        model,
        examples(seed),
        steps=steps,
        keep_weight=KEEP_WEIGHT,
        learning_rate=LEARNING_RATE,
        rate_learning_rate=RATE_LEARNING_RATE,
        validate=figure,
        progress=progress,
    )
    mend.round_to_stored()
    return mend


def first_non_finite(folder: Path, seed: int, precision: str = "fp16", longest: int = LONGEST) -> int | None:
    """The first edit of stream `seed` (from 1) after which a weight or a canary logit is NaN or infinite, if any.

    Logits at padding do not count.
    """
    model, tokenizer = blip2_digits.load(precision, folder)
    mend, canary = Mend.load(model, folder), blip2_digits.canary(tokenizer)
    real = canary["attention_mask"].bool()
    with torch.no_grad():
        for number, record in enumerate(digits.edit_stream(seed, longest), 1):
            mend.edit(model, record)
            values = [model.get_submodule(site).weight for site in mend.sites]
            if not all(bool(value.isfinite().all()) for value in [*values, model(**canary).logits[real]]):
                return number
    return None


def table(folder: Path, *, seconds: float | None = None) -> Table:
    """What the checkpoints in `folder` are worth, decoder in float16: accuracy, single edits, sequences until NaN.

    `seconds` is how long their training took, if that is known.
    """
    model, tokenizer = blip2_digits.load("fp16", folder)
    mend = Mend.load(model, folder)
    single = evaluation.single_edits(model, tokenizer, digits.edit_stream(HELD_OUT_STREAM, HELD_OUT_EDITS), mend.edit)
    ends = [first_non_finite(folder, seed) for seed in range(SEQUENCES)]
    found = Table("held out, decoder in fp16", "", title="Digits testbed")
    rows: list[tuple[str, str]] = [
        ("parameters of the model", f"{_size(model):,}"),
        ("parameters of MEND", f"{_size(mend):,}"),
        ("visual questions right", f"{evaluation.accuracy(model, tokenizer):.3f}"),
        ("text questions right", f"{evaluation.text_accuracy(model, tokenizer):.3f}"),
        (f"{HELD_OUT_EDITS} single edits: success", f"{single.efficacy:.3f}"),
        ("… rephrased question", f"{single.rephrase:.3f}"),
        ("… rephrased image", f"{single.image_rephrase:.3f}"),
        ("… text locality", f"{single.text_locality:.3f}"),
        ("… image locality", f"{single.image_locality:.3f}"),
        (f"sequences with NaN or Inf within {LONGEST}", f"{sum(end is not None for end in ends)} of {SEQUENCES}"),
        ("… first such edit", " ".join("–" if end is None else str(end) for end in ends)),
        ("size", f"{sum(path.stat().st_size for path in folder.glob('*.safetensors')) / 1e6:.2f} MB"),
        *([] if seconds is None else [("training", f"{seconds:.0f} s")]),
    ]
    for row in rows:
        found.add_row(*row)
    return found


def _size(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _train_into(out: Path, seed: int, console: Console) -> None:
    """Train both and put them into `out` together: a model never lies beside another model's editor."""
    with tempfile.TemporaryDirectory() as made:
        with _bar(console, "Digit model") as progress:
            model = blip2_digits.save(train_model(seed, progress=progress), made)
        with _bar(console, "MEND") as progress:
            editor = train_mend(Path(made), seed=seed, steps=MEND_STEPS, progress=progress).save(made)
        out.mkdir(parents=True, exist_ok=True)
        for file in (model, editor):
            shutil.move(file, out / file.name)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train into ``--out`` (the package's checkpoints by default) and print the table; 2 for bad arguments."""
    parser = argparse.ArgumentParser(prog="python -m stabilitylab.testbed.train", description=__doc__)
    parser.add_argument("--out", type=Path, default=blip2_digits.CHECKPOINTS, metavar="DIR", help="where to write")
    parser.add_argument("--seed", type=int, default=SEED, help="of weights and data order (default %(default)s)")
    parser.add_argument("--table", action="store_true", help="train nothing: print the table of what lies in DIR")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)  # The tensors are small, and sums are the same on every machine's number of cores.
    console, start, seconds = Console(), time.monotonic(), None
    try:
        if not chosen.table:
            _train_into(chosen.out, chosen.seed, console)
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
