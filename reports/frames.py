"""A run's readings as a data frame of pandas or polars, neither of which stabilitylab needs."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from itertools import chain, repeat
from typing import Any, Final

import numpy as np

from stabilitylab.errors import UsageError, did_you_mean
from stabilitylab.record.run import Run

LIBRARIES: Final = ("pandas", "polars")
"""In the order in which they are looked for."""


def to_frame(run: Run, library: str | None = None) -> Any:
    """A `pandas.DataFrame` or `polars.DataFrame` of `columns`. Raises UsageError; see `Run.to_frame`."""
    frame_of = _library(library).DataFrame
    return frame_of(columns(run))


def _library(wanted: str | None) -> Any:
    if wanted is not None and wanted not in LIBRARIES:
        raise UsageError(f"library {wanted!r}; expected one of {', '.join(LIBRARIES)}{did_you_mean(wanted, LIBRARIES)}")
    for name in LIBRARIES if wanted is None else (wanted,):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
    missing = "neither pandas nor polars is installed" if wanted is None else f"{wanted} is not installed"
    raise UsageError(f"a data frame needs pandas or polars, and {missing}; try: pip install {wanted or 'pandas'}")


def columns(run: Run) -> dict[str, Any]:
    """The long format by column, one entry per value: see `Run.to_frame`. Text is as the run holds it.

    A lone surrogate in a name, which neither library can hold, is spelled out.
    """
    rows = [(edit, list(edit.row.readings.items())) for edit in run.edits]
    sizes = [sum(values.size for _, values in read) for _, read in rows]
    read = [reading for _, readings in rows for reading in readings]
    lengths = [values.size for _, values in read]
    plain = {name: _encodable(name) for key, _ in read for name in key}

    def per_row(values: Sequence[Any]) -> list[Any]:
        return list(chain.from_iterable(map(repeat, values, sizes)))

    def per_reading(values: Sequence[str]) -> list[str]:
        return list(chain.from_iterable(map(repeat, values, lengths)))

    return {
        "edit": np.repeat([edit.edit for edit, _ in rows], sizes).astype(np.int64),
        "label": per_row([_encodable(edit.label) for edit, _ in rows]),
        "status": per_row([edit.status for edit, _ in rows]),
        "outcome": per_row([edit.outcome for edit, _ in rows]),
        "metric": per_reading([plain[metric] for (metric, _), _ in read]),
        "site": per_reading([plain[site] for (_, site), _ in read]),
        "element": np.concatenate([np.arange(0), *map(np.arange, lengths)]).astype(np.int64),
        "value": np.concatenate([np.zeros(0), *(values for _, values in read)]),
    }


def _encodable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
