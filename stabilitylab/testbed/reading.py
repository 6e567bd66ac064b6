"""Reading files of edit requests: a list of JSON objects, and errors that name the first bad one and its field."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Final

from stabilitylab.errors import RecordError, did_you_mean
from stabilitylab.record.plain_files import read_json

MOST_BYTES: Final = 256 << 20
LONGEST: Final = 100_000
"""Characters of one text; what is longer is no request that a model could be asked."""


def read_list(path: str | PathLike[str]) -> list[Any]:
    """The list that a JSON file holds.

    Raises:
        RecordError: no such file, not JSON, or not a list.
    """
    path = Path(path)
    try:
        found = read_json(path, MOST_BYTES)
    except FileNotFoundError:
        near = did_you_mean(path.name, _neighbours(path))
        raise RecordError(f"{path}: no such file{near}") from None
    except OSError as error:
        raise RecordError(f"{path}: can't be read ({error.strerror or error})") from None
    except ValueError as error:
        raise RecordError(f"{path}: {error}") from None
    if not isinstance(found, list):
        raise RecordError(f"{path}: expected a list of records, found {kind_of(found)}")
    return found


def expect_object(entry: Any, which: str, field: str) -> Mapping[str, Any]:
    """`entry` itself.

    Raises:
        RecordError: it is no object; the message says `which`, and that one with `field` was expected.
    """
    if not isinstance(entry, Mapping):
        raise RecordError(f"{which} is {kind_of(entry)}, expected an object with the field {field!r} and more")
    return entry


def expect_field(entry: Mapping[str, Any], name: str, which: str, known: Iterable[str]) -> Any:
    """The value of a field.

    Raises:
        RecordError: there is none; the message offers those most alike that are not `known` to be others.
    """
    if name not in entry:
        taken = set(known)
        near = did_you_mean(name, (key for key in entry if isinstance(key, str) and key not in taken))
        raise RecordError(f"{which} has no field {name!r}{near}")
    return entry[name]


def expect_string(entry: Mapping[str, Any], name: str, which: str, known: Iterable[str]) -> str:
    """The string in a field.

    Raises:
        RecordError: there is no such field, or it holds something else.
    """
    value = expect_field(entry, name, which, known)
    if not isinstance(value, str):
        raise RecordError(f"{which}, field {name!r}: expected a string, found {kind_of(value)}")
    if len(value) > LONGEST:
        raise RecordError(f"{which}, field {name!r}: {len(value):,} characters, expected at most {LONGEST:,}")
    return value


def kind_of(value: Any) -> str:
    """What a JSON value is, in a word or two."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    for types, word in ((dict, "an object"), (list, "a list"), (str, "a string"), ((int, float), "a number")):
        if isinstance(value, types):
            return word
    return type(value).__name__


def _neighbours(path: Path) -> list[str]:
    try:
        return [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return []
