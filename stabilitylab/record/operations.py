"""The first operation that turned finite values into a NaN or an infinity, as it is recorded. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal, get_args

Direction = Literal["forward", "backward"]
Phase = Literal["edit", "canary", "replay"]
"""Where it ran: inside the edit, in the canary's forward after it, or when the edit was made once more."""
Made = Literal["producer", "designed", "arrived"]
"""``producer``: its inputs were finite. ``designed``: it was asked for an infinity (a mask), which went where it must
not. ``arrived``: it passed on what was not finite before the edit began."""
Reach = Literal["weight", "gradient", "output", "loss", "values"]
"""How far its result had come by the end, the worst first: a weight or buffer of the model; a gradient; what the model
returned; a single number; only other values."""
Kind = Literal["range", "algebra"]
REACHES: Final[tuple[Reach, ...]] = get_args(Reach)


@dataclass(frozen=True)
class Values:
    """A tensor that went into an operation, or came out of it.

    name: the operation's own word for it (``self``, ``mat1``), with the weight's name where it is one of the model's.
    least, greatest: of its finite entries; None where there is none, or none was read. nonfinite: how many are not;
    None where nothing was read.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    least: float | None = None
    greatest: float | None = None
    nonfinite: int | None = None


@dataclass(frozen=True)
class Place:
    """A line of the user's, the editor's or the model's code. file: its path; empty where no such line is known."""

    file: str = ""
    line: int = 0
    function: str = ""
    source: str = ""


@dataclass(frozen=True)
class Step:
    """One operation on the way of a value that is not finite. module: the layer's name, empty outside of any."""

    operator: str
    module: str
    direction: Direction
    place: Place


@dataclass(frozen=True)
class Precision:
    """The edit made once more in another precision. finite: whether all that it computed and left was; None where that
    can't be said. largest: where it is finite, the largest magnitude that the blamed operation gave, or, where that
    precision has no such operation (a cast), of the weight or gradient that it had reached. error: why it could not be
    made, or what it raised.
    """

    dtype: str
    finite: bool | None = None
    largest: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class Operation:
    """The operation that a trace blames, of one edit.

    operator: torch's own name, such as ``aten.div.Tensor``. node: of a backward, the step of autograd that it was part
    of, such as ``SqrtBackward0``; place and module are then those of the forward operation. number: how many operations
    of the edit came before it. operands: tensors that went in. settings: other arguments, such as ``eps``. result: what
    came out, the part that is not finite. index: of the first bad entry in it. value: what stands there. reach: how far
    it came. reached: the name of the weight that it reached, or empty. went_back: whether a backward made it or passed
    it on. chain: the first few operations after it that
    passed it on. precisions: of a replay, what other precisions give. deterministic: of a replay, whether it left bit
    for bit what the edit had left.
    """

    edit: int
    phase: Phase
    operator: str
    direction: Direction
    module: str
    place: Place
    made: Made
    reach: Reach
    reached: str = ""
    went_back: bool = False
    node: str = ""
    number: int = 0
    operands: tuple[Values, ...] = ()
    settings: Mapping[str, str] | None = None
    result: Values | None = None
    index: tuple[int, ...] | None = None
    value: str = "NaN"
    chain: tuple[Step, ...] = ()
    precisions: tuple[Precision, ...] = ()
    deterministic: bool | None = None

    @property
    def kind(self) -> Kind | None:
        """Of a replay, what it was about: the numbers' range, where a wider precision stays finite; the algebra, where
        the widest that could be tried is not finite either; None where none could.
        """
        tried = [each.finite for each in self.precisions if each.finite is not None]
        return None if not tried else "range" if tried[-1] else "algebra"

    @property
    def short(self) -> str:
        """Its name without namespace and overload: ``div``."""
        parts = self.operator.split(".")
        return parts[1] if len(parts) > 1 else self.operator

    def to_json(self) -> dict[str, Any]:
        """Plain values. Numbers are finite by what they mean."""
        return asdict(self)


def operation_from_json(plain: Mapping[str, Any]) -> Operation:
    """The operation that `Operation.to_json` made plain. Raises KeyError or TypeError for anything else."""
    values = dict(plain)
    values["place"] = Place(**values["place"])
    values["operands"] = tuple(_values(each) for each in values["operands"])
    values["result"] = None if values["result"] is None else _values(values["result"])
    values["index"] = None if values["index"] is None else tuple(values["index"])
    values["chain"] = tuple(Step(**{**step, "place": Place(**step["place"])}) for step in values["chain"])
    values["precisions"] = tuple(Precision(**each) for each in values["precisions"])
    return Operation(**values)


def _values(plain: Mapping[str, Any]) -> Values:
    return Values(**{**plain, "shape": tuple(plain["shape"])})
