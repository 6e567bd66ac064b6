"""Whether an edit gives reason to look closer at the next one. What is out of the ordinary is the analyzer's to say."""

from __future__ import annotations

from typing import Final

import numpy as np

from stabilitylab.analysis.findings import Diagnosis, severity
from stabilitylab.record.readings import EDITOR_SITE, EditRow

LEAST_HEADROOM_BITS: Final = 4.0
_HEADROOM: Final = ".headroom"


def gives_reason(row: EditRow, diagnosis: Diagnosis) -> bool:
    """Whether the edit failed, left or met a value that is not finite, came near its dtype's limit, or was found out of
    line; or something was found of the editor's state.
    """
    if row.status == "failed" or any(_speaks(metric, values) for (metric, _), values in row.readings.items()):
        return True
    return any(
        finding.edit == row.edit and (severity(finding.verdict) > 0 or finding.site.startswith(EDITOR_SITE))
        for finding in diagnosis.findings
    )


def _speaks(metric: str, values: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> bool:
    if not values.size:
        return False
    if metric.endswith(".nonfinite"):
        return bool(values[0] > 0)
    if _HEADROOM in metric:
        return bool(values[0] < LEAST_HEADROOM_BITS)
    return not bool(np.isfinite(values[0]))
