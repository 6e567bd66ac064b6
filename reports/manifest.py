"""What a run was made with, as lines for a reader, and the commands that make it again."""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import PurePath
from typing import Any, Final

from stabilitylab.record.homes import homeless
from stabilitylab.reports.text import clean, number

_NAMES: Final = {
    "created": "begun",
    "closed": "closed by the monitor",
    "model_class": "model",
    "parameters": "parameters",
    "dtypes": "parameters by dtype",
    "sites": "watched sites",
    "patterns": "site patterns",
    "editor_class": "editor",
    "canary": "canary",
    "config": "configuration",
    "seed": "seed",
    "python": "Python",
    "platform": "platform",
    "weight_pass": "sweep over a weight",
    "versions": "packages",
    "cwd": "folder",
    "command": "command",
    "git": "git",
}
_OURS: Final = "stabilitylab"  # on no index
_ELSEWHERE: Final = frozenset({"site_details", "scan"})
SHOWN: Final = 600
_MONTHS: Final = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip  # not as the machine's own language has them
_ACRONYMS: Final = frozenset({"mend", "malmen", "grace", "rome", "memit", "wise", "ft"})
"""Methods that the field writes in capitals, whatever their classes are called."""
_HEAD: Final = re.compile(r"(?<=\w)(For[A-Z]\w+|(LMHead|DoubleHeads)?Model)$")
"""What a model's class says of its task."""


def title(manifest: Mapping[str, Any], edits: int) -> str:
    """``MEND on Blip2, float16: 31 edits, 28 November 2026``, as far as it is known."""
    model, editor = _class(manifest.get("model_class")), _class(manifest.get("editor_class"))
    editor = editor.upper() if editor.lower() in _ACRONYMS else editor
    who = f"{editor} on {_HEAD.sub('', model)}" if editor and model else _HEAD.sub("", model) or "A run"
    dtype = _dtype(manifest)
    day = _day(manifest.get("created"))
    what = f"{who}, {dtype}" if dtype else who
    return clean(f"{what}: {number(edits)} edit{'' if edits == 1 else 's'}{f', {day}' if day else ''}", 160)


def _class(name: Any) -> str:
    return name.rpartition(".")[2] if isinstance(name, str) else ""


def _dtype(manifest: Mapping[str, Any]) -> str:
    """The dtype of most of the layers that are watched; without any, of most tensors."""
    details, tensors = manifest.get("site_details"), manifest.get("dtypes")
    if isinstance(details, dict) and details:
        watched = Counter(str(each.get("dtype")) for each in details.values() if isinstance(each, dict))
        return watched.most_common(1)[0][0] if watched else ""
    counted = tensors.items() if isinstance(tensors, dict) else ()
    return max((each for each in counted if isinstance(each[1], int)), key=lambda each: each[1], default=("", 0))[0]


def _day(created: Any) -> str:
    try:
        day = datetime.fromisoformat(created)
    except (TypeError, ValueError):
        return ""
    return f"{day.day} {_MONTHS[day.month - 1]} {day.year}"


def environment(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, value) of every manifest entry, those that we know first; each cut to a readable length."""
    keys = [key for key in _NAMES if key in manifest] + sorted(set(manifest) - set(_NAMES) - _ELSEWHERE)
    return [(_NAMES.get(key, clean(key, 40)), homeless(_plain(manifest[key]))) for key in keys]


def _plain(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return number(value, 4)
    if isinstance(value, dict):
        return clean(", ".join(f"{clean(key, 60)} {_plain(item)}" for key, item in value.items()), SHOWN)
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return clean(", ".join(clean(item, 120) for item in value), SHOWN)
    return clean(value if isinstance(value, str) else json.dumps(value), SHOWN)


def reproduce(manifest: Mapping[str, Any]) -> list[str]:
    """Shell lines that lead to the same run, as far as the manifest knows; one per step.

    Folder and commit only for a script, which is found in the one and may differ by the other.
    """
    lines = []
    git, versions, command = manifest.get("git"), manifest.get("versions"), typed(manifest.get("command"))
    script = command[:1] == ["python"] and command[1:2] != ["-m"]
    if script and manifest.get("cwd"):
        lines.append(f"cd {_quoted(homeless(clean(manifest['cwd'], SHOWN)))}")
    if script and isinstance(git, dict) and git.get("commit"):
        dirty = "   # tracked files differed from this commit" if git.get("dirty") else ""
        lines.append(f"git checkout {shlex.quote(clean(git['commit'], 60))}{dirty}")
    if isinstance(versions, dict):
        pins = [_pin(name, version) for name, version in versions.items() if name != _OURS]
        lines += [f"pip install {' '.join(pins)}"] if pins else []
    lines += [quoted(command)] if command else []
    return lines


def _pin(name: Any, version: Any) -> str:
    """As an index has it: without the part of a version that says how it was built, ``+cpu``."""
    return shlex.quote(f"{clean(name, 60)}=={clean(version, 60).partition('+')[0]}")


def typed(recorded: Any) -> list[str]:
    """What was typed, told from what Python makes of it: of a module its path, of a script no ``python``."""
    parts = [homeless(clean(part, SHOWN)) for part in recorded] if isinstance(recorded, list) else []
    if not any(parts):
        return []
    path = PurePath(parts[0])
    if path.name == "__main__.py":
        return ["python", "-m", path.parent.name, *parts[1:]]
    if path.suffix == ".py":
        return ["python", *parts]
    return [path.name, *parts[1:]] if path.parent.name == "bin" else parts


def quoted(command: Sequence[str]) -> str:
    """A line for a shell."""
    return " ".join(_quoted(part) for part in command)


def _quoted(part: str) -> str:
    """For a shell, which opens a ``~`` only where it is not quoted."""
    home, rest = ("~/", part[2:]) if part.startswith("~/") else ("", part)
    return home + shlex.quote(rest) if rest else home
