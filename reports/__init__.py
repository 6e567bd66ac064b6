"""What people look at: console, HTML page, TensorBoard, figures. Reads runs and diagnoses; derives no number.

A *sink* (`stabilitylab.reports.sinks.Sink`) is told of each row while the run goes on. `SINKS` names those that
come with stabilitylab; adding one is a class and a line here. They are imported on first use: both libraries take time.

================  ======================================================  ==========================================
name              class                                                   made with
================  ======================================================  ==========================================
``tensorboard``   `stabilitylab.reports.tensorboard.TensorBoardSink`      logdir, metrics, manifest
``console``       `stabilitylab.reports.console.ProgressSink`             total (or None), console (or None)
``alarm``         `stabilitylab.reports.announcing.AlarmSink`             run (its folder)
================  ======================================================  ==========================================

After the run: `stabilitylab.reports.html.write_report`, `stabilitylab.reports.console.diagnosis_page`, and the charts
of `stabilitylab.reports.figures` (matplotlib) and `stabilitylab.reports.charts` (Altair, as ``run.plot``).
"""

from __future__ import annotations

import importlib
from typing import Any, Final

from stabilitylab.errors import UsageError, did_you_mean

SINKS: Final = {
    "tensorboard": "stabilitylab.reports.tensorboard:TensorBoardSink",
    "console": "stabilitylab.reports.console:ProgressSink",
    "alarm": "stabilitylab.reports.announcing:AlarmSink",
}


def sink_class(name: str) -> type[Any]:
    """The class of the sink called `name`. Raises UsageError for an unknown name, with the nearest one."""
    if name not in SINKS:
        raise UsageError(f"no sink {name!r}; expected one of {', '.join(SINKS)}{did_you_mean(name, SINKS)}")
    module, _, attribute = SINKS[name].partition(":")
    found: type[Any] = getattr(importlib.import_module(module), attribute)
    return found
