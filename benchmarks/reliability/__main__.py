"""Whether what is promised of reliability holds: nothing changed, nothing lost unsaid, nothing that a file could do.

    python -m benchmarks.reliability [--only PROMISE …] [--long] [--no-clocks] [--seed N] [--json FILE]
    python -m benchmarks.reliability --docs FILE.json …

The short form is a sample of the long one, drawn by the seed. Exit code 1 where a goal is missed. Some goals are times:
``--no-clocks`` shows these and does not judge them, for a machine that does other work meanwhile. ``--docs`` prints the
table of docs/reliability.md from what runs have written, the last of them first in what is shown of a promise.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from benchmarks.overhead import machine, write
from benchmarks.reliability import table
from benchmarks.reliability.promise import Effort, Promise, Result

PROMISES: Final = (
    "inert",
    "lost",
    "concurrent",
    "long",
    "fail_open",
    "hostile_files",
    "hostile_text",
    "network",
    "old_files",
)
"""Modules of this package, each with its `promise`."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PROMISES, action="append", help="this promise; may be given again")
    parser.add_argument("--long", action="store_true", help="the whole, in place of a sample: about an hour")
    parser.add_argument("--no-clocks", dest="clocks", action="store_false", help="show times, and don't judge them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--docs", type=Path, nargs="+", metavar="FILE", help="print the table of the docs from these")
    options = parser.parse_args()
    if options.json and not options.json.parent.is_dir():
        parser.error(f"--json {options.json}: there is no folder {options.json.parent}")
    return options


def promise_of(name: str) -> Promise:
    """The tests of one promise."""
    made: Promise = importlib.import_module(f"benchmarks.reliability.{name}").promise
    return made


def _tell(progress: Progress, task: TaskID, says: str, share: float) -> None:
    progress.update(task, description=says[:50], completed=share)


def run(options: argparse.Namespace, errors: Console) -> dict[str, list[Result]]:
    """The results; what is known is written after each promise."""
    about = {"machine": machine(), "when": date.today().isoformat()}
    about |= {"seed": options.seed, "long": options.long, "clocks": options.clocks}
    results: dict[str, list[Result]] = {}
    seconds: dict[str, float] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with (
        tempfile.TemporaryDirectory(prefix="reliability-") as scratch,
        Progress(*columns, console=errors, disable=not errors.is_terminal, transient=True) as progress,
    ):
        for name in [each for each in PROMISES if each in (options.only or PROMISES)]:
            task = progress.add_task(name, total=1.0)
            began = time.monotonic()
            effort = Effort(options.long, options.seed, Path(scratch), partial(_tell, progress, task))
            found = promise_of(name)(effort)
            results[name] = [each.unjudged() if each.clock and not options.clocks else each for each in found]
            seconds[name] = time.monotonic() - began
            progress.remove_task(task)
            if options.json is not None:
                write(options.json, about | {"promises": table.document(results, seconds)})
    return results


def missed(results: Mapping[str, Sequence[Result]]) -> bool:
    """Whether a goal is missed."""
    return any(each.met is False for found in results.values() for each in found)


def _command(found: dict[str, Any]) -> str:
    """What made such a document."""
    judged = found.get("clocks", True)
    if len(found["promises"]) == len(PROMISES):
        return f"make reliability{'-long' if found['long'] else ''}{'' if judged else ' CLOCKS=no'}"
    words = [*(["--long"] if found["long"] else []), *([] if judged else ["--no-clocks"])]
    return " ".join(["python -m benchmarks.reliability", *words, *(f"--only {name}" for name in found["promises"])])


def main() -> int:
    options = arguments()
    if options.docs:
        documents = [json.loads(file.read_text()) for file in options.docs]
        print(table.MARK)
        print(table.page([(_command(found), found) for found in documents], PROMISES), end="")
        return 0
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.getLogger("stabilitylab").addHandler(logging.NullHandler())
    logging.getLogger("stabilitylab").propagate = False  # what breaks here breaks on purpose
    out, errors = Console(), Console(stderr=True)
    results = run(options, errors)
    out.print(table.table(results), highlight=False)
    for said in table.breaks(results):
        out.print(f"  {said}", highlight=False, markup=False)
    return int(missed(results))


if __name__ == "__main__":
    sys.exit(main())
