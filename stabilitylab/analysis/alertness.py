"""Whether an edit gives reason to look closer at the next one. What is out of the ordinary is the analyzer's to say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from stabilitylab.analysis.findings import Finding, severity
from stabilitylab.record.packed import Frame, PackedReadings, PerFrame, as_packed
from stabilitylab.record.readings import EDITOR_SITE, EditRow

LEAST_HEADROOM_BITS: Final = 4.0
_HEADROOM: Final = "headroom_bits"


def gives_reason(row: EditRow, findings: Sequence[Finding]) -> bool:
    """Whether the edit failed, left or met a value that is not finite, came near its dtype's limit, or was found out of
    line; or something was found of the editor's state.
    """
    if row.status == "failed" or _speak(as_packed(row.readings)):
        return True
    return any(
        finding.edit == row.edit and (severity(finding.verdict) > 0 or finding.site.startswith(EDITOR_SITE))
        for finding in findings
    )


class _Kinds(NamedTuple):
    """Where the first values of a row's readings are, by what they are: counts of bad values, headroom, the rest."""

    counts: NDArray[np.intp]
    headroom: NDArray[np.intp]
    others: NDArray[np.intp]


def _kinds(frame: Frame) -> _Kinds:
    counts: list[int] = []
    headroom: list[int] = []
    others: list[int] = []
    for (metric, _), start in zip(frame.keys, frame.starts.tolist(), strict=True):
        (counts if metric.endswith(".nonfinite") else headroom if metric.endswith(_HEADROOM) else others).append(start)
    return _Kinds(*(np.array(starts, dtype=np.intp) for starts in (counts, headroom, others)))


_KINDS: Final = PerFrame(_kinds)


def _speak(readings: PackedReadings) -> bool:
    flat, kinds = readings.flat, _KINDS.of(readings.frame)
    return bool(
        (flat[kinds.counts] > 0).any()
        or (flat[kinds.headroom] < LEAST_HEADROOM_BITS).any()
        or not np.isfinite(flat[kinds.others]).all()
    )
