"""Edit records in MMEdit's layout (Cheng et al., *Can We Edit Multimodal Large Language Models?*, arXiv 2310.08475)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any

from stabilitylab.testbed.reading import expect_object, expect_string, read_list


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
    return [_record(entry, f"{path}: record {index}") for index, entry in enumerate(read_list(path))]


def _record(entry: Any, which: str) -> EditRecord:
    entry = expect_object(entry, which, _NAMES[0])
    return EditRecord(**{name: expect_string(entry, name, which, _NAMES) for name in _NAMES})
