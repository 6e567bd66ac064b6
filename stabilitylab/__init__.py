"""A flight recorder and early-warning system for sequential model editing.

>>> import stabilitylab as sl
>>> with sl.attach(model, sites="*.fc[12]", run="runs/mend") as monitor:    # doctest: +SKIP
...     for request in requests:
...         with monitor.edit(label=request["prompt"]) as edit:
...             model = edit.returns(editor.edit(model, request))
>>> print(monitor.diagnosis())                                              # doctest: +SKIP

Everything below is imported on first use: reading a run needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stabilitylab import integrations
    from stabilitylab.acting.scanning.scanned import Scanned, scan
    from stabilitylab.analysis import Diagnosis, Finding
    from stabilitylab.errors import StabilityLabError
    from stabilitylab.record.run import Run, load
    from stabilitylab.watching.attaching import attach
    from stabilitylab.watching.canary import Canary
    from stabilitylab.watching.editor_report import EditorReport
    from stabilitylab.watching.monitor import Monitor

__version__ = "0.1.0"

_HOMES = {
    "Canary": "stabilitylab.watching.canary",
    "attach": "stabilitylab.watching.attaching",
    "Monitor": "stabilitylab.watching.monitor",
    "load": "stabilitylab.record.run",
    "scan": "stabilitylab.acting.scanning.scanned",
    "Scanned": "stabilitylab.acting.scanning.scanned",
    "Run": "stabilitylab.record.run",
    "Diagnosis": "stabilitylab.analysis",
    "Finding": "stabilitylab.analysis",
    "EditorReport": "stabilitylab.watching.editor_report",
    "StabilityLabError": "stabilitylab.errors",
}

__all__ = [
    "Canary",
    "Diagnosis",
    "EditorReport",
    "Finding",
    "Monitor",
    "Run",
    "Scanned",
    "StabilityLabError",
    "attach",
    "integrations",
    "load",
    "scan",
]


def __getattr__(name: str) -> Any:
    if name == "integrations":
        return importlib.import_module("stabilitylab.integrations")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'stabilitylab' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
