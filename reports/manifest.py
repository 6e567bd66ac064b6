"""What a run was made with, as lines for a reader, and the commands that make it again."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any, Final

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
_ELSEWHERE: Final = frozenset({"site_details", "scan"})
SHOWN: Final = 600


def environment(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, value) of every manifest entry, those that we know first; each cut to a readable length."""
    keys = [key for key in _NAMES if key in manifest] + sorted(set(manifest) - set(_NAMES) - _ELSEWHERE)
    return [(_NAMES.get(key, clean(key, 40)), _plain(manifest[key])) for key in keys]


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
    """Shell lines that lead to the same run, as far as the manifest knows; one per step."""
    lines = []
    git, versions, command = manifest.get("git"), manifest.get("versions"), manifest.get("command")
    if manifest.get("cwd"):
        lines.append(f"cd {shlex.quote(clean(manifest['cwd'], SHOWN))}")
    if isinstance(git, dict) and git.get("commit"):
        dirty = "   # tracked files differed from this commit" if git.get("dirty") else ""
        lines.append(f"git checkout {shlex.quote(clean(git['commit'], 60))}{dirty}")
    if isinstance(versions, dict) and versions:
        pins = " ".join(shlex.quote(f"{clean(name, 60)}=={clean(version, 60)}") for name, version in versions.items())
        lines.append(f"pip install {pins}")
    if isinstance(command, list) and command:
        lines.append(" ".join(shlex.quote(clean(part, SHOWN)) for part in command))
    return lines
