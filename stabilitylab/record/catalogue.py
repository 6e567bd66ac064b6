"""The metrics of a run, in the order in which an edit makes them."""

from __future__ import annotations

from stabilitylab.record.display import html
from stabilitylab.record.readings import Metric


class Catalogue(tuple[Metric, ...]):
    """A tuple of metrics that a notebook shows as a table with their meaning, formula and source."""

    __slots__ = ()

    def __repr__(self) -> str:
        families = dict.fromkeys(metric.family for metric in self)
        return f"<Catalogue: {len(self)} metrics, {len(families)} families>"

    def __str__(self) -> str:
        return "\n".join(f"{metric.name} ({metric.unit}, {metric.scale}): {metric.meaning}" for metric in self)

    def _repr_html_(self) -> str:
        return html(self)
