"""The same streams under several editors: one run folder and one row each."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from stabilitylab.editors.base import Progress
from stabilitylab.editors.registry import make, parse
from stabilitylab.editors.saving import write_whole
from stabilitylab.errors import RunError, UsageError
from stabilitylab.probes.base import Tier
from stabilitylab.record.plain_files import begins_otherwise
from stabilitylab.reports.sinks import Sink
from stabilitylab.testbed.bed import Testbed
from stabilitylab.testbed.lab import Row, run_lab


class Watch(Protocol):
    """Who is told how a comparison goes on."""

    def preparing(self, title: str) -> AbstractContextManager[Progress]:
        """Around what an editor learns before its first edit."""
        ...

    def editing(self, editor: str, seed: int, edits: int) -> AbstractContextManager[Sequence[Sink]]:
        """Around one run: the sinks that show it."""
        ...


def run_name(editor: str, seed: int) -> str:
    """The folder of a run inside a comparison's."""
    return f"{editor}-seed{seed}"


def compare(
    bed: Testbed,
    editors: Sequence[str],
    *,
    seeds: Sequence[int],
    edits: int,
    folder: Path,
    watch: Watch,
    probes: Tier = "default",
    tensorboard: bool = False,
) -> Iterator[Row]:
    """One row per editor and seed, as each run ends, in that order; the runs lie in `folder`.

    All names, the number of requests and the folders are looked at before the first edit.

    Raises:
        UsageError: an unknown editor, one named twice, a limit that one has no use for, or too few requests.
        SiteError: the model lacks the layers that one of the editors needs.
        RunError: a run of one of these names is in `folder` already.
    """
    expect_names(editors, seeds)
    runs = [(editor, seed) for editor in editors for seed in seeds]
    for seed in seeds:
        bed.stream(seed, edits)
    taken = [folder / run_name(*run) for run in runs if (folder / run_name(*run)).exists()]
    if taken:
        raise RunError(f"'{taken[0]}' exists; expected a folder without runs of these editors, see --runs")
    model = bed.load()
    for editor in editors:
        make(editor, model, bed)
    del model
    for editor, seed in runs:
        yield watched(
            bed, editor, edits=edits, seed=seed, run=folder / run_name(editor, seed), watch=watch, probes=probes,
            tensorboard=tensorboard,
        )  # fmt: skip


def watched(
    bed: Testbed, editor: str, *, edits: int, seed: int, run: Path, watch: Watch, probes: Tier, tensorboard: bool
) -> Row:
    """`run_lab` with a person told of it."""
    with watch.editing(editor, seed, edits) as sinks, watch.preparing(f"{editor}: learning") as progress:
        return run_lab(
            bed, editor, edits=edits, seed=seed, run=run, probes=probes, tensorboard=tensorboard, sinks=sinks,
            progress=progress,
        )  # fmt: skip


def write_rows(rows: Sequence[Row], file: Path) -> None:
    """The rows as one JSON list, whole or not at all: an earlier file stays until the new one is complete.

    What is no regular file, such as a pipe, is written to as it is.
    """
    text = json.dumps([row.to_json() for row in rows], indent=2, allow_nan=False) + "\n"
    if file.exists() and not file.is_file():
        file.write_text(text, encoding="utf-8")
    else:
        write_whole(file.resolve(), text.encode())


def expect_writable(file: Path) -> None:
    """Before any edit is made: whether rows can be written to `file`.

    Raises:
        UsageError: it is a folder, or its own folder can't be made or written to.
    """
    if file.is_dir():
        raise UsageError(f"'{file}' is a folder; expected a file for the rows")
    try:
        file.resolve().parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"'{file}' can't be written: its folder can't be made ({error.strerror})") from None
    if file.is_file() and begins_otherwise(file, b"[", or_empty=True):
        raise UsageError(f"'{file}' holds something else than rows; expected another name")
    if not os.access(file if file.exists() else file.resolve().parent, os.W_OK):
        raise UsageError(f"'{file}' can't be written: permission denied")


def expect_names(editors: Sequence[str], seeds: Sequence[int]) -> None:
    """Look at names and seeds, before anything is loaded.

    Raises:
        UsageError: an unknown editor, none, or one or a seed that is given twice.
    """
    for name in editors:
        parse(name)
    _each_once("editor", editors)
    _each_once("seed", seeds)


def _each_once(what: str, values: Sequence[object]) -> None:
    if not values:
        raise UsageError(f"no {what} given; expected at least one")
    twice = next((value for value in values if values.count(value) > 1), None)
    if twice is not None:
        raise UsageError(f"the {what} {twice} is given twice")
