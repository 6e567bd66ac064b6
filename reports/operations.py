"""The traced operation as it is shown, and what to do where a NaN came that nobody traced."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Final

from stabilitylab.analysis.findings import Diagnosis
from stabilitylab.analysis.operation import reached, replayed
from stabilitylab.record.homes import homeless
from stabilitylab.record.operations import Operation, Place, Step, Values
from stabilitylab.record.run import Run
from stabilitylab.reports import manifest
from stabilitylab.reports.text import clean, number, shorten, with_short_names

VARIABLE: Final = "STABILITYLAB_TRACE"
_CODE: Final = 160


def facts(operation: Operation, places: Mapping[str, str]) -> list[tuple[str, str]]:
    """What is known of it, named, one per line. places: the short name of each site."""
    node = f", a part of {clean(operation.node, 60)}" if operation.node else ""
    way = "backward, by the line of its forward" if operation.direction == "backward" else "forward"
    rows = [
        ("operation", f"{clean(operation.operator, 80)}{node}"),
        ("direction", way),
        ("line", _line(operation.place)),
        ("code", clean(operation.place.source, _CODE)),
        ("layer", shorten(with_short_names(operation.module, places), 80)),
        *(
            (f"in: {shorten(with_short_names(values.name, places), 48)}", _values(values))
            for values in operation.operands
        ),
        ("settings", ", ".join(f"{clean(k, 30)} {clean(v, 30)}" for k, v in (operation.settings or {}).items())),
        ("out", _result(operation)),
        ("passed on by", " → ".join(_step(step) for step in operation.chain)),
        ("reached", clean(reached(operation), 160)),
        ("once more", clean(replayed(operation), 400)),
    ]
    return [(name, words) for name, words in rows if words]


def _line(place: Place) -> str:
    if not place.file:
        return ""
    # Of an installed package, where it is installed says nothing.
    file = homeless(place.file.rpartition("/site-packages/")[2])
    return clean(f"{PurePath(place.file).name}:{place.line}, in {place.function} ({file})", 300)


def _shape(values: Values) -> str:
    return f"{clean(values.dtype, 20)} [{', '.join(map(str, values.shape))}]"


def _values(values: Values) -> str:
    if values.nonfinite is None and values.least is None:
        return f"{_shape(values)}, range not known"
    if values.least is None:
        ends = "nothing finite"
    elif values.least == values.greatest:
        ends = number(values.least)
    else:
        ends = f"{number(values.least)} to {number(values.greatest)}"
    bad = f", {number(values.nonfinite)} not finite" if values.nonfinite else ""
    return f"{_shape(values)}, {ends}{bad}"


def _result(operation: Operation) -> str:
    if operation.result is None:
        return operation.value
    at = f", the first at [{', '.join(map(str, operation.index))}]" if operation.index else ""
    return f"{_values(operation.result)}: {operation.value}{at}"


def _step(step: Step) -> str:
    name = step.operator.split(".")[1] if "." in step.operator else step.operator
    return clean(f"{name}{' (backward)' if step.direction == 'backward' else ''}", 60)


def untraced(run: Run, diagnosis: Diagnosis) -> str:
    """How to have the operation named, where a value that is not finite stayed and no tracer saw it come; else empty.

    For a run of a script: the line that runs it again, traced at that edit.
    """
    edit = diagnosis.first_nonfinite_edit
    if diagnosis.operation is not None or not edit:
        return ""
    off = next((note.says for note in run.notes if note.kind == "trace-off"), None)
    if off is not None:
        return f"Which operation gave it is not known: {clean(off, 200)}."
    script = manifest.quoted(manifest.typed(run.manifest.get("command"))) or "your script"
    return f"No tracer was on when it came. To have the operation named: {VARIABLE}={edit} {script}"
