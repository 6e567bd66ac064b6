"""Edit records in MMEdit's layout (Cheng et al., *Can We Edit Multimodal Large Language Models?*, arXiv 2310.08475)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any

from stabilitylab.errors import RecordError, did_you_mean


@dataclass(frozen=True)
class EditRecord:
    """One requested edit and what to ask afterwards. Images are names (paths), not pixels.

    After the edit the model should answer `alt` to `src` about `image`, to `rephrase` about `image`, and to `src` about
    `image_rephrase`; its answers to `loc` (text only) and to `m_loc_q` about `m_loc` should be what they were before.
    """

    src: str
    """The question that is edited."""
    pred: str
    """What the unedited model is expected to answer."""
    alt: str
    """What the edited model should answer."""
    rephrase: str
    """`src` in other words."""
    image: str
    """Name of the image that `src` asks about."""
    image_rephrase: str
    """Name of another picture of the same thing."""
    loc: str
    """An unrelated question without an image."""
    loc_ans: str
    """The answer to `loc`."""
    m_loc: str
    """Name of an unrelated image."""
    m_loc_q: str
    """A question about `m_loc`."""
    m_loc_a: str
    """The answer to `m_loc_q`."""


_NAMES = tuple(field.name for field in fields(EditRecord))


def as_record(request: EditRecord | Mapping[str, Any]) -> EditRecord:
    """`request` itself, or the record made of a mapping of the same fields; further fields are ignored.

    Raises:
        RecordError: a field is missing or not a string.
    """
    return request if isinstance(request, EditRecord) else _record(request, "the request")


def load_records(path: str | PathLike[str]) -> list[EditRecord]:
    """Read a json file in MMEdit's layout: a list of objects with the fields of `EditRecord`, all strings.

    Other fields are ignored. Only the text is read; whether the images exist is not looked at.

    Raises:
        RecordError: no such file, not JSON, not a list, or a record with a field missing or not a string: the message
            names the first bad record's index (from 0) and the field.
    """
    path = Path(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = did_you_mean(path.name, _neighbours(path))
        raise RecordError(f"{path}: no such file{near}") from None
    except OSError as error:
        raise RecordError(f"{path}: can't be read ({error.strerror or error})") from None
    except UnicodeDecodeError as error:
        raise RecordError(f"{path}: not JSON (not UTF-8 at byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise RecordError(f"{path}: not JSON (line {error.lineno}, column {error.colno}: {error.msg})") from None
    except (RecursionError, ValueError) as error:
        raise RecordError(f"{path}: not usable JSON ({error})") from None
    if not isinstance(found, list):
        raise RecordError(f"{path}: expected a list of records, found {_kind(found)}")
    return [_record(entry, f"{path}: record {index}") for index, entry in enumerate(found)]


def _record(entry: Any, which: str) -> EditRecord:
    if not isinstance(entry, Mapping):
        raise RecordError(f"{which} is {_kind(entry)}, expected an object with the field 'src' and more")
    for name in _NAMES:
        if name not in entry:
            near = did_you_mean(name, (key for key in entry if isinstance(key, str) and key not in _NAMES))
            raise RecordError(f"{which} has no field {name!r}{near}")
        if not isinstance(entry[name], str):
            raise RecordError(f"{which}, field {name!r}: expected a string, found {_kind(entry[name])}")
    return EditRecord(**{name: entry[name] for name in _NAMES})


def _kind(value: Any) -> str:
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
