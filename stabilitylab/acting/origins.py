"""Which operation a value that is not finite comes from, as it is passed on from tensor to tensor.

An operation whose inputs are finite and whose result is not begins a trail, and what is computed from that result
belongs to it. Which trail is to blame shows at the edit's end, by how far each came: most end at once, such as the −∞
of a mask that a softmax turns into zeros. Knows tensors only by a number for their memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import CodeType
from typing import Final

from stabilitylab.acting.call import Call
from stabilitylab.acting.operators import Operator
from stabilitylab.acting.tensors import MINUS_INFINITY, NAN
from stabilitylab.record.operations import REACHES, Made, Operation, Reach

FOLLOWED: Final = 4
"""How many operations after the first are named."""
MOST_TRAILS: Final = 256

_SOFTMAXES: Final = frozenset({"_softmax", "_log_softmax", "_safe_softmax", "logsumexp"})
_ATTENTION: Final = ("_scaled_dot_product", "_flash_attention", "_efficient_attention")
"""Operations for which −∞ is a value like any other, so that a NaN from it is their own: a row of nothing else."""


@dataclass(eq=False)
class Trail:
    """One operation and what became of its result. kinds: of what is not finite in it. went_back: whether a backward
    passed it on.
    """

    operation: Operation
    kinds: int
    chain: list[Call] = field(default_factory=list)
    reach: Reach = "values"
    reached: str = ""
    went_back: bool = False

    @property
    def made(self) -> Made:
        """How the first value came to be."""
        return self.operation.made

    def gives_one_number(self, call: Call) -> None:
        """An operation of the forward made it a single number: a loss, unless a number was asked for, as for a mask."""
        if not call.backward and (self.made != "designed" or call.gathers):
            self.reaches("loss")

    def reaches(self, reach: Reach, name: str = "") -> None:
        """It came so far, unless it was further already."""
        if REACHES.index(reach) < REACHES.index(self.reach) or (reach == self.reach and not self.reached):
            self.reach, self.reached = reach, name


@dataclass(frozen=True)
class Entering:
    """A tensor that went into an operation. memory: its number. kinds: what it held. arrived: makes the trail of
    values that were there before, where no trail of its memory is known.
    """

    memory: int
    kinds: int
    arrived: Callable[[], Operation]


class Origins:
    """Follows what is not finite through one edit."""

    def __init__(self) -> None:
        self.trails: list[Trail] = []
        self._of: dict[int, tuple[Trail, int]] = {}
        self._at: dict[tuple[CodeType | None, int], Trail] = {}

    def __bool__(self) -> bool:
        """Whether any memory is known to hold a value that is not finite."""
        return bool(self._of)

    def kinds(self, memory: int) -> int:
        """What is known to be there; 0 where nothing is."""
        known = self._of.get(memory)
        return 0 if known is None else known[1]

    def trail(self, memory: int) -> Trail | None:
        """The trail that ended there last."""
        known = self._of.get(memory)
        return None if known is None else known[0]

    def overwritten(self, memory: int) -> None:
        """All of it is finite again."""
        self._of.pop(memory, None)

    def passed(
        self,
        call: Call,
        entering: Sequence[Entering],
        leaving: Sequence[tuple[int, int]],
        begin: Callable[[Made], Operation],
    ) -> Trail:
        """An operation gave something that is not finite. Returns the trail that it begins, or goes on.

        entering: what went in and was not finite. leaving: (memory, kinds) of what came out and is not. begin: makes
        the record of a trail's first operation.
        """
        kinds, before = _all(kinds for _, kinds in leaving), _all(tensor.kinds for tensor in entering)
        sources = [self._source(tensor) for tensor in entering]
        forward = self._forward_of(call)
        if not sources and forward is not None:
            trail = forward
        elif not sources:
            # Nobody masks with a NaN.
            trail = self._begin(begin("designed" if call.asks_for_infinity and not kinds & NAN else "producer"), kinds)
            if not call.backward:
                self._at[call.spot.code, call.spot.instruction] = trail
        elif _misuses(call.operator, before, kinds, all(each.made == "designed" for each in sources)):
            trail = self._begin(begin("producer"), kinds)
        else:
            trail = min(sources, key=lambda source: (source.made != "producer", source.operation.number))
            trail.kinds |= kinds
            trail.went_back = trail.went_back or call.backward
            if len(trail.chain) < FOLLOWED:
                trail.chain.append(call.without_tensors())
        for memory, found in leaving:
            self._of[memory] = (trail, found)
        return trail

    def _forward_of(self, call: Call) -> Trail | None:
        """Of a backward the trail that its own forward had begun with a NaN, where that came as far as a loss: what has
        no value has no slope either, even where nothing that is not finite went into the backward. (An infinity may
        have been taken in on the way.)
        """
        trail = self._at.get((call.spot.code, call.spot.instruction)) if call.backward else None
        if trail is None or trail.made != "producer" or not trail.kinds & NAN:
            return None
        return trail if REACHES.index(trail.reach) <= REACHES.index("loss") else None

    def _source(self, tensor: Entering) -> Trail:
        known = self._of.get(tensor.memory)
        if known is not None:
            return known[0]
        trail = self._begin(tensor.arrived(), tensor.kinds)
        self._of[tensor.memory] = (trail, tensor.kinds)
        return trail

    def _begin(self, operation: Operation, kinds: int) -> Trail:
        trail = Trail(operation, kinds)
        if len(self.trails) < MOST_TRAILS:
            self.trails.append(trail)
        return trail

    def blamed(self) -> Trail | None:
        """The trail that came furthest; of those that came as far the first, what was asked for last. None where each
        ended in nothing: an infinity that reached neither weight, gradient, output nor loss.
        """
        live = [trail for trail in self.trails if trail.reach != "values" or trail.kinds & NAN]
        made: dict[Made, int] = {"producer": 0, "arrived": 1, "designed": 2}
        return min(
            live,
            key=lambda trail: (REACHES.index(trail.reach), made[trail.made], trail.operation.number),
            default=None,
        )


def _misuses(operator: Operator, before: int, after: int, designed: bool) -> bool:
    """Whether an infinity that was rightly there went where it must not: the fault is then that operation's.

    designed: whether all that went in and was not finite was asked for. Such an infinity must not become a NaN, and not
    be added up with other numbers; a softmax may take any −∞, but not a row of nothing else.
    """
    if designed and (operator.adds_up or (after & NAN and not before & NAN)):
        return True
    takes_any = operator.name in _SOFTMAXES or operator.name.startswith(_ATTENTION)
    return takes_any and before == MINUS_INFINITY and bool(after & NAN)


def _all(kinds: Iterable[int]) -> int:
    found = 0
    for each in kinds:
        found |= each
    return found
