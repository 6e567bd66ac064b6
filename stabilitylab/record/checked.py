"""What is read from a file is of the kinds that it should be, all the way down, before anything else sees it. No torch.

Anyone may have written the file. What is raised here is ValueError: the reader says that the file is damaged.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from types import UnionType
from typing import Any, Final, Literal, Union, get_args, get_origin, get_type_hints

from stabilitylab.record.plain_files import expect_few_parts

LONGEST: Final = 1 << 16
"""Values that one reading may be described to hold."""
_MOST_NUMBERED: Final = 1 << 53
"""A whole number that every reader of JSON keeps."""

_ENTRIES: Final[Mapping[str, Any]] = {
    "sites": tuple[str, ...],
    "config": dict | None,
    "created": str | None,
    "closed": bool,
    "lost_rows": int,
    "command": tuple[str, ...] | None,
    "cwd": str | None,
    "budget": dict | None,
}
"""The entries of a manifest that more is done with than to show them."""


def from_json(text: object) -> Any:
    """Plain values. Raises ValueError for what is no JSON, NaN and what is too large for a float included."""
    if not isinstance(text, str):
        raise ValueError(f"expected text, found {_shown(text)}")
    expect_few_parts(text)
    try:
        return json.loads(text, parse_constant=_no_number, parse_float=_finite, parse_int=_whole)
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None


def _no_number(text: str) -> float:
    raise ValueError(f"{text} where a finite number is expected")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _no_number(text)


def _whole(text: str) -> int:
    if len(text) > 30:
        raise ValueError(f"a whole number of {len(text)} digits")
    return int(text)


def expect(kind: Any, value: Any, what: str) -> Any:
    """`value`, which is of `kind`: a class, a Literal, a tuple or mapping of such, a dataclass, or one of several.

    An int is a float too, a bool neither. Raises ValueError naming `what`.
    """
    if not _test(kind)(value):
        raise ValueError(f"{what} is {_shown(value)}")
    return value


def expect_columns(kinds: Mapping[str, Any]) -> Callable[[Sequence[object]], None]:
    """`expect` for very many records: raises ValueError naming the first column that holds no value of its kind."""
    tests = [(place, name, _test(kind)) for place, (name, kind) in enumerate(kinds.items())]

    def expect_them(record: Sequence[object]) -> None:
        for place, name, test in tests:
            if not test(record[place]):
                raise ValueError(f"column {name!r} of a row is {_shown(record[place])}")

    return expect_them


def entry(key: object, value: object) -> tuple[str, Any]:
    """An entry of a manifest: (key, plain value)."""
    name = expect(str, key, "the name of a manifest's entry")
    found = from_json(value)
    return name, expect(_ENTRIES.get(name, object), found, f"the manifest's {name!r}")


@cache
def _test(kind: Any) -> Callable[[Any], bool]:
    """Whether a value is of `kind`: worked out once, since files hold very many values of few kinds."""
    home, inside = get_origin(kind), get_args(kind)
    if home in (Union, UnionType):
        tests = [_test(each) for each in inside]
        return lambda value: any(test(value) for test in tests)
    if home is Literal:
        return lambda value: isinstance(value, str) and value in inside
    if home is tuple:
        part = _test(inside[0])
        return lambda value: isinstance(value, tuple | list) and all(map(part, value))
    if isinstance(home, type) and issubclass(home, Mapping):
        key, held = map(_test, inside)
        return lambda value: isinstance(value, Mapping) and all(key(a) and held(b) for a, b in value.items())
    return _test_of_one(kind)


def _test_of_one(kind: Any) -> Callable[[Any], bool]:
    """Of a kind that has no kinds in brackets."""
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        fields = [(name, _test(hint)) for name, hint in get_type_hints(kind).items()]
        return lambda value: isinstance(value, kind) and all(test(getattr(value, name)) for name, test in fields)
    if kind in (int, float):
        numbers = int | float if kind is float else int
        return lambda value: (
            isinstance(value, numbers) and not isinstance(value, bool) and abs(value) <= _largest(value)
        )
    if kind is Any:
        return lambda value: True
    plain = type(None) if kind is None else kind
    return lambda value: isinstance(value, plain)


def _largest(value: float) -> float:
    """Of a value's own kind; a NaN is not below it, and an infinity neither."""
    return _MOST_NUMBERED if isinstance(value, int) else 1.7976931348623157e308


def _shown(value: object) -> str:
    said = repr(value) if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"
    return said if len(said) <= 60 else f"{said[:59]}…"
