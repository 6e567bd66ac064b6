"""Where in a row each metric stands, and at which places a rule has spoken already."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from stabilitylab.analysis.columns import Columns, Flat, Once, PerSchema, Places, Schema
from stabilitylab.record.readings import EDITOR_SITE, Key

NO_PROOF = frozenset(
    {
        "drift.ratio",
        "gradient.stable_rank",
        "feedback.gain",
        "editor.input_unit",
        "weight.condition_number",
        "canary.perplexity",
        "canary.perplexity_ratio",
        "editor.covariance_condition",
        "editor.system_condition",
    }
)
"""Derived readings: NaN or infinity there may come from x/0 or a log of zero, with every measured value finite."""

_NOTHING: Places = np.zeros(0, dtype=np.intp)


class Lookup:
    """Shared by all facts; worked out anew only when the set of readings changes."""

    def __init__(self, columns: Columns) -> None:
        self.once = Once()
        self._columns = columns
        self._groups = PerSchema(_groups)
        self._at: dict[str, Places] = {}

    def look(self, row: Flat) -> None:
        """Take in where things are: by metric, and by the groups of metrics that are checked as one."""
        self._at = self._groups.of(row.schema)

    def at(self, what: str) -> Places:
        """Positions in the row of a metric, or of ``*.nonfinite``, ``*.headroom_bits``, ``*.dead``, ``value`` and
        ``layer-std``."""
        return self._at.get(what, _NOTHING)

    def positions(self, schema: Schema, what: str) -> Places:
        """The same in rows with other readings."""
        return self._groups.of(schema).get(what, _NOTHING)

    def value(self, row: Flat, metric: str, site: str) -> float | None:
        """One reading; None when it was not taken."""
        position = row.schema.position.get((metric, site))
        return None if position is None else float(row.values[position])

    def key(self, row: Flat, position: np.intp) -> Key:
        """(metric, site) of a position in the row."""
        return self._columns.keys[int(row.places[position])]

    def earliest(self, row: Flat, positions: Places) -> Places:
        """The one of some positions in the row that comes first in the dataflow; none of none."""
        found = min(positions, key=lambda position: self._columns.order(int(row.places[position])), default=None)
        return _NOTHING if found is None else np.array([found], dtype=np.intp)

    def new(self, rule: str, row: Flat, at: Places) -> Iterator[tuple[int, float, str, str]]:
        """(place, value, metric, site) of those positions in the row at which `rule` has not spoken before."""
        for position in at[self.once.new(rule, row.places[at])]:
            place = int(row.places[position])
            yield (place, float(row.values[position]), *self._columns.keys[place])


def _groups(schema: Schema) -> dict[str, Places]:
    at: dict[str, list[int]] = {}
    for position, (metric, site) in enumerate(schema.keys):
        at.setdefault(metric, []).append(position)
        kind = metric.rpartition(".")[2].removeprefix("norm_")
        if kind in {"nonfinite", "headroom_bits", "dead"}:
            at.setdefault(f"*.{kind}", []).append(position)
        if kind not in {"nonfinite", "headroom_bits"} and metric not in NO_PROOF:
            at.setdefault("value", []).append(position)
        if metric == f"{EDITOR_SITE}.std_min" and site.endswith(".u"):
            at.setdefault("layer-std", []).append(position)
    return {what: np.array(positions, dtype=np.intp) for what, positions in at.items()}
