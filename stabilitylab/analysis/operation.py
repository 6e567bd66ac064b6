"""The traced operation of a run: which of those that were recorded is to blame, and what it did in words.

What was traced was seen, and not inferred. So it says where, whatever readings suggest; why it came to that the causes
still say. Nothing is claimed of it where the model is sound: an infinity that a softmax or a loss scaler takes in is
recorded, and that is all.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath
from typing import Final

from stabilitylab.analysis.columns import kind_of
from stabilitylab.analysis.findings import Finding, Link
from stabilitylab.analysis.words import number
from stabilitylab.record.operations import REACHES, Operation, Values

OPERATION: Final = "traced-operation"
"""The name of its link in the chain of causes."""
_SOURCE: Final = 100
_CASTS: Final = frozenset({"_to_copy", "copy_"})
_DIVISIONS: Final = frozenset({"div", "div_", "reciprocal", "addcdiv", "addcdiv_", "_foreach_div", "_foreach_div_"})
_SOFTMAXES: Final = frozenset({"_softmax", "_log_softmax"})
_LARGEST: Final = {"float16": 65504.0, "bfloat16": 3.39e38, "float32": 3.4e38}


def blamed(operations: Sequence[Operation], nonfinite_edit: int | None, *, lost: int, edits: int) -> Operation | None:
    """The operation that broke the model, or that keeps edits from it; None where none was traced, or none did.

    nonfinite_edit: the first edit with a value that is not finite and stays. Of its operations the one that came
    furthest: into a weight, then into the canary's answer. One that was made once more comes first: it knows most.
    lost: of `edits`, how many of the last moved nothing, where none does any more; else 0.
    """
    if nonfinite_edit is not None:
        # What was there before the first edit is met in it.
        met = {0, 1} if nonfinite_edit == 0 else {nonfinite_edit}
        found = [each for each in operations if each.edit in met and not _only_follows(each)]
        return min(found, key=_order, default=None)
    found = [each for each in operations if each.edit > edits - lost]
    return found[0] if found else None


def _only_follows(operation: Operation) -> bool:
    """Whether it shows only that the model was broken when the canary came."""
    return operation.made == "arrived" and operation.phase == "canary"


def _order(operation: Operation) -> tuple[bool, bool, int, bool]:
    return (
        operation.phase != "replay",
        operation.made == "arrived",
        REACHES.index(operation.reach),
        operation.phase == "canary",
    )


def its_finding(operation: Operation, findings: Sequence[Finding]) -> Finding | None:
    """The finding about a value that is not finite in the layer that the operation ran in, if that is watched.

    What the canary shows after the edit is not about an operation inside it, though both may be the whole model's.
    """
    in_canary = operation.phase == "canary"
    return next(
        (
            finding
            for finding in findings
            if finding.site == operation.module
            and finding.verdict == "non-finite"
            and finding.start == operation.edit
            and (kind_of(finding.metric) == "canary") == in_canary
        ),
        None,
    )


def link(operation: Operation) -> Link:
    """The operation as a link in the chain of causes."""
    site = operation.module or None
    return Link("operation", OPERATION, operation.edit, site, None, _shortly(operation), advice(operation), "high")


def where(operation: Operation) -> str:
    """``div, in the backward of line 101 of algebra.py``."""
    line = _line(operation)
    if operation.direction == "backward":
        return f"{operation.short}, in the backward of {line}" if line else f"{operation.short}, in the backward"
    return f"{operation.short}, at {line}" if line else operation.short


def _line(operation: Operation) -> str:
    place = operation.place
    return f"line {place.line} of {PurePath(place.file).name}" if place.file else ""


def says(operation: Operation) -> str:
    """What it did, and with which values."""
    return _joined(_did(operation), _with(operation), _then(operation), replayed(operation))


def _shortly(operation: Operation) -> str:
    return _joined(_did(operation), _then(operation), replayed(operation))


def _joined(*parts: str) -> str:
    return " ".join(part for part in parts if part)


def _did(operation: Operation) -> str:
    source = operation.place.source
    shown = f" (`{source if len(source) <= _SOURCE else source[: _SOURCE - 1] + '…'}`)" if source else ""
    inside = f", in {operation.module}" if operation.module else ""
    when = {
        "edit": f"in edit {operation.edit}",
        "canary": f"in the canary's forward after edit {operation.edit}",
        "replay": f"in edit {operation.edit}, made once more",
    }[operation.phase]
    what = {
        "producer": f"gave the first {operation.value} from finite values",
        "designed": f"made the {operation.value} that it was asked for, which went on from there",
        "arrived": f"took in a {operation.value} that was there before",
    }[operation.made]
    return f"{where(operation)}{shown}{inside}, {what} {when}."


def _with(operation: Operation) -> str:
    told = [_operand(values) for values in operation.operands if values.least is not None or values.nonfinite]
    settings = [f"{name} {value}" for name, value in (operation.settings or {}).items() if name in _TELLING]
    given = ", ".join([*told, *settings])
    return f"It was given {given}." if given else ""


_TELLING: Final = frozenset({"eps", "value", "other", "alpha", "beta", "exponent", "scale", "ord"})


def _operand(values: Values) -> str:
    if values.least is None or values.greatest is None:
        what = "nothing finite"
    elif values.least == values.greatest:
        what = number(values.least)
    else:
        what = f"{number(values.least)} to {number(values.greatest)}"
    bad = f" and {number(values.nonfinite)} that are not finite" if values.nonfinite else ""
    return f"{values.name} {what}{bad} ({values.dtype})"


def reached(operation: Operation) -> str:
    """How far its result came, in words; empty where that is not known."""
    return {
        "weight": operation.reached,
        "gradient": f"the gradient of {operation.reached}",
        "output": "what the model returns",
        "loss": "the loss",
        "values": "",
    }[operation.reach]


def _then(operation: Operation) -> str:
    return f"It reached {reached(operation)}." if reached(operation) else ""


def replayed(operation: Operation) -> str:
    """What came of making the edit once more, in a sentence; empty where it was not, or told nothing."""
    said = []
    for each in operation.precisions:
        if each.error:
            said.append(f"could not be made in {each.dtype} ({each.error})")
        elif each.finite:
            largest = "" if each.largest is None else f", largest {number(each.largest)}"
            said.append(f"finite in {each.dtype}{largest}")
        else:
            said.append(f"not finite in {each.dtype}")
    kinds = {"range": ": its dtype's range is to blame", "algebra": ": its algebra is to blame"}
    again = f"Made once more: {', '.join(said)}{kinds[operation.kind] if operation.kind else ''}." if said else ""
    other = (
        "The edit left something else then: the editor is not deterministic."
        if operation.deterministic is False
        else ""
    )
    return _joined(again, other)


def advice(operation: Operation) -> str:
    """What to do at that line."""
    line = _line(operation) or "that operation"
    name = operation.short
    if operation.made == "arrived":
        return "Find out what wrote it: trace the edits before this one, or look at how the model was loaded."
    if operation.made == "designed":
        return f"Keep what {line} masks out of sums and losses: select the other entries first."
    if name in _SOFTMAXES and any(values.nonfinite for values in operation.operands):
        return f"A row of {line} is masked in full: leave such rows out, or let each query see itself."
    if _divides_by_zero(operation):
        return f"Keep the divisor at {line} away from zero: clamp it, or add an epsilon that its dtype can hold."
    result = operation.result
    if operation.value != "NaN" and result is not None and result.dtype in {"float16", "bfloat16"}:
        ends = number(_LARGEST[result.dtype])
        return f"{result.dtype} ends at {ends}: make {line} in float32, or load the model in bfloat16 or float32."
    return f"Look at {line} with these values: clamp what goes in, or make it in a wider dtype."


def _divides_by_zero(operation: Operation) -> bool:
    if operation.short not in _DIVISIONS:
        return False
    divisor = operation.operands[-1] if operation.operands else None
    return (
        divisor is not None
        and divisor.least is not None
        and divisor.greatest is not None
        and (divisor.least <= 0.0 <= divisor.greatest)
    )
