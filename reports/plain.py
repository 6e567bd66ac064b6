"""A run with its diagnosis as plain JSON values: what ``stabilitylab check --json`` prints."""

from __future__ import annotations

from typing import Any

from stabilitylab.analysis.findings import Diagnosis, json_safe
from stabilitylab.record.run import Run


def plain(run: Run, found: Diagnosis) -> dict[str, Any]:
    """The diagnosis with the run's name, costs, alarms and notes; NaN and infinities are strings."""
    diagnosis = found.to_json()
    extra = {
        "run": str(run.path),
        "edits": len(run),
        "complete": run.complete,
        "probe_time_share": run.probe_time_share,
        "canary_time_share": run.canary_time_share,
        "trace_time_share": run.trace_time_share,
        "alarms": [vars(alarm) for alarm in run.alarms],
        "notes": [vars(note) for note in run.notes],
    }
    values: dict[str, Any] = json_safe({**extra, **{key: value for key, value in diagnosis.items() if key != "edits"}})
    return values
