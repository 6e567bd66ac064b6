"""The door from a run, a diagnosis or a finding to `stabilitylab.reports`: what a notebook asks of them.

Reading a run and judging it neither draw nor write pages. They come here, and what is needed is imported only then.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import altair as alt

    from stabilitylab.analysis.caution import Caution
    from stabilitylab.analysis.findings import Diagnosis, Finding
    from stabilitylab.record.readings import Metric
    from stabilitylab.record.run import Run
    from stabilitylab.record.scanned import Scan

Library = Literal["pandas", "polars"]


def html(shown: Run | Diagnosis | Finding | tuple[Metric, ...]) -> str:
    """What a notebook shows, as escaped HTML that is readable on light and on dark."""
    from stabilitylab.reports.notebook import html as made

    return made(shown)


def scan_page(figures: Scan, cautions: Sequence[Caution], out: Path) -> Path:
    """Write the page of a scan. Raises RunError when it can't be written there."""
    from stabilitylab.reports.scan_html import write_scan

    return write_scan(figures, cautions, out)


def frame(run: Run, library: Library | None = None) -> Any:
    """All readings in long format; see `Run.to_frame`."""
    from stabilitylab.reports.frames import to_frame

    return to_frame(run, library)


class Plot:
    """Charts of a run for a notebook, made with Altair. ``run.plot`` is one.

    On each, the flagged edits are marked, NaN and infinities stand in a lane of their own, and the pointer shows a
    reading with its edit's label. `stabilitylab.reports.figures` draws the same with matplotlib, for papers.
    """

    def __init__(self, run: Run) -> None:
        self._run = run

    def __repr__(self) -> str:
        return "<Plot: heatmap(metric), lines(metric, sites=…), spectra(site), logit_range()>"

    def heatmap(self, metric: str, sites: str | Sequence[str] | None = None) -> alt.LayerChart:
        """Layers (rows, in dataflow order) by edits, coloured by value.

        sites: names or patterns such as ``"*.fc2"``; by default all at which the metric was read. Raises UsageError
        with the nearest name for a metric or site that the run does not know.
        """
        from stabilitylab.reports.charts import heatmap

        return heatmap(self._run, metric, sites)

    def lines(self, metric: str, sites: str | Sequence[str] | None = None) -> alt.LayerChart:
        """One metric over the edits, a line per site; the axis is logarithmic where the metric says so.

        sites: names or patterns such as ``"*.fc2"``; by default all at which the metric was read. Raises UsageError
        with the nearest name for a metric or site that the run does not know.
        """
        from stabilitylab.reports.charts import lines

        return lines(self._run, metric, sites)

    def spectra(self, site: str, metric: str = "gradient.spectrum") -> alt.LayerChart:
        """The leading singular values at one site over the edits: the 1st, 2nd, 4th, … as a fan.

        Raises UsageError with the nearest name for a metric or site that the run does not know.
        """
        from stabilitylab.reports.charts import spectra

        return spectra(self._run, site, metric)

    def logit_range(self, family: Literal["canary", "logits"] = "canary") -> alt.LayerChart:
        """Smallest to largest logit over the edits as a band, with the log-sum-exp.

        family: ``canary`` (after each edit) or ``logits`` (inside the edit, in the model as the edit found it).
        """
        from stabilitylab.reports.charts import logit_range

        return logit_range(self._run, family)
