"""Whether the operation that a watch names is the right one. Plain data in, plain data out.

- A loop with a true operation (`TRUTHS`): the *operator* is right where its base name is one of those accepted, and of
  a backward the autograd node too, where one is told; the *line* where it is in the right file and holds the right
  fragment; the *direction* where it is the true one. *Right* is all three, *partly* the operator or the line, *silent*
  no name, *wrong* the rest.
- A loop into which the value came (`ARRIVED`): right where the value is said to have arrived, *silent* where nothing is
  named, else wrong.
- A loop that takes its infinity in (`OPTIONAL`): as the first; silence is no mistake there.
- A loop with nothing to name (`NO_CLAIM`, `FINITE`): *silent* is right, and every name wrong.

A watch that knows autograd's nodes alone names the operator by its node: `DivBackward0` is of `div`. A watch that names
a module gives all lines of the module's class, and those lines of the class around it that call it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from benchmarks.detection.scores import Figure, share
from benchmarks.tracing.truths import ALSO, ARRIVED, FINITE, NO_CLAIM, OPTIONAL, TRUTHS, Direction, Truth
from stabilitylab.record.operations import Operation

Group = Literal["truth", "arrived", "optional", "no-claim", "finite"]
Answer = Literal["right", "partly", "wrong", "silent"]

GROUPS: Final[Mapping[Group, Iterable[str]]] = {
    "truth": TRUTHS,
    "arrived": ARRIVED,
    "optional": OPTIONAL,
    "no-claim": NO_CLAIM,
    "finite": FINITE,
}
LOOPS: Final[Mapping[str, Group]] = {loop: group for group, loops in GROUPS.items() for loop in loops}
"""Every loop with its group."""


@dataclass(frozen=True)
class Named:
    """What a watch names. operator: the base name; node: autograd's; each empty where it tells none. lines: (name of a
    file, source) of each line that is meant. arrived: whether the value is said to come from outside. says: in words.
    """

    operator: str = ""
    node: str = ""
    direction: Direction | None = None
    lines: tuple[tuple[str, str], ...] = ()
    arrived: bool = False
    says: str = ""


def named_by(operation: Operation | None) -> Named | None:
    """What our tracer names."""
    if operation is None:
        return None
    place, file = operation.place, Path(operation.place.file).name
    way = operation.node or operation.direction
    reached = f"{operation.reach} {operation.reached}".rstrip()
    says = f"edit {operation.edit} ({operation.phase}): {operation.operator}, {way}, {operation.made}"
    return Named(
        operator=operation.short,
        node=operation.node,
        direction=operation.direction,
        lines=((file, place.source),),
        arrived=operation.made == "arrived",
        says=f"{says}, reached {reached}, {file}:{place.line} {place.source}",
    )


@dataclass(frozen=True)
class Points:
    """What is right about a name."""

    operator: bool
    line: bool
    direction: bool

    @property
    def all(self) -> bool:
        """Whether everything is."""
        return self.operator and self.line and self.direction

    @property
    def any(self) -> bool:
        """Whether anything is but the direction, of which there are only two."""
        return self.operator or self.line


def points(truth: Truth, named: Named) -> Points:
    """A name beside the truth."""
    return Points(
        operator=_operator(truth, named),
        line=any(
            file == true_file and fragment in source
            for file, source in named.lines
            for true_file, fragment in truth.lines
        ),
        direction=named.direction == truth.direction,
    )


def _operator(truth: Truth, named: Named) -> bool:
    if named.operator:
        return named.operator in truth.operators and (not truth.node or not named.node or named.node in truth.node)
    if truth.node:
        return named.node in truth.node
    node = re.sub(r"Backward\d*$", "", named.node).lower()
    return node in {operator.replace("_", "") for operator in truth.operators}


@dataclass(frozen=True)
class Heard:
    """What a watch said of one loop. points: None where there is no truth to compare with, or no name. recorded: what
    else it wrote down, in words.
    """

    loop: str
    group: Group
    watch: str
    answer: Answer
    points: Points | None
    named: Named | None
    recorded: tuple[str, ...] = ()
    seconds: float = 0.0
    error: str = ""


def truths_of(loop: str, *, canary: bool = True) -> tuple[Truth, ...]:
    """The accepted truths of a loop; some hold only where the canary's forward is not traced."""
    found = TRUTHS.get(loop) or OPTIONAL.get(loop)
    also = None if canary else ALSO.get(loop)
    return tuple(truth for truth in (found, also) if truth is not None)


def judged(loop: str, named: Named | None, *, canary: bool = True) -> tuple[Answer, Points | None]:
    """See the module."""
    truths = truths_of(loop, canary=canary)
    if named is None:
        return "silent", None
    if not truths:
        return ("right" if LOOPS[loop] == "arrived" and named.arrived else "wrong"), None
    best = max((points(truth, named) for truth in truths), key=lambda each: (each.all, each.operator + each.line))
    return ("right" if best.all else "partly" if best.any else "wrong"), best


def figures(heards: Sequence[Heard]) -> dict[str, Figure]:
    """Of one watch: shares of the loops with a truth, with Wilson's intervals."""
    found = [each.points for each in heards if each.group == "truth"]
    return {
        "operator": share(each is not None and each.operator for each in found),
        "line": share(each is not None and each.line for each in found),
        "direction": share(each is not None and each.direction for each in found),
        "right": share(each is not None and each.all for each in found),
        "silent": share(each is None for each in found),
    }


def counts(heards: Sequence[Heard]) -> dict[str, dict[str, int]]:
    """How many answers of each kind, by group."""
    found: dict[str, dict[str, int]] = {}
    for each in heards:
        of = found.setdefault(each.group, {})
        of[each.answer] = of.get(each.answer, 0) + 1
    return found


def document_of(heards: Sequence[Heard]) -> dict[str, Any]:
    """One watch, as JSON has it."""
    return {
        "counts": counts(heards),
        "figures": {
            name: {"hits": round((figure.value or 0) * figure.runs), **vars(figure)}
            for name, figure in figures(heards).items()
        },
        "loops": [
            {
                "loop": each.loop,
                "group": each.group,
                "answer": each.answer,
                "points": None if each.points is None else vars(each.points),
                "says": None if each.named is None else each.named.says,
                "recorded": list(each.recorded),
                "seconds": round(each.seconds, 2),
                "error": each.error,
            }
            for each in heards
        ],
    }
