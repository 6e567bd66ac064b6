"""All that a scan warns of, the most urgent first."""

from __future__ import annotations

from stabilitylab.analysis import caution_editors, caution_live, caution_model
from stabilitylab.analysis.caution import Caution, by_urgency
from stabilitylab.record.scanned import Scan


def cautions(scan: Scan) -> tuple[Caution, ...]:
    """The warnings of a scan."""
    return by_urgency([*caution_editors.cautions(scan), *caution_model.cautions(scan), *caution_live.cautions(scan)])
