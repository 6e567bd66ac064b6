"""What a run keeps of its user's own text, where it was asked to keep none: labels, messages, settings, paths, code.

A text becomes a hash of it, keyed by a secret that is drawn when the run begins and lives in this process alone: within
a run equal texts are seen to be equal, and nobody can look one up, not even by trying all that it might have been.
Layers' names, classes, versions, numbers and the run's own sentences stay: without them there is nothing to read.
"""

from __future__ import annotations

import hmac
import os
import platform
import re
import secrets
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any, Final

from stabilitylab.record.homes import homeless
from stabilitylab.record.operations import Operation, Place
from stabilitylab.record.readings import EditRow, Note
from stabilitylab.record.serving import SERVES

DIGITS: Final = 12
"""Of a hash: 48 bits, so that of a million labels no two are likely to share one."""
_RAISED: Final = re.compile(r"\A([A-Za-z_]\w*): (.*)\Z", re.DOTALL)
_TOLD: Final = re.compile(r"(: |\(|raised )([A-Za-z_]\w*): (.*)\Z", re.DOTALL)
"""How notes tell of an exception: its class, and then its words to the end."""
_LEAST_NAME: Final = 3
"""Characters of a user's or a machine's name that is looked for in other text."""
_AS_THEY_ARE: Final = frozenset({"sites", "site_details", "patterns", "thresholds"})
"""Entries of a manifest that hold names of layers, or nothing but figures."""


class Redaction:
    """Takes the user's text out of what a run is going to hold. One object for a run."""

    def __init__(self) -> None:
        self._secret = secrets.token_bytes(32)
        # A user's name may be a layer's or a class's too: it is looked for where a path or an address holds it.
        user, hosts = re.escape(_user()), {platform.node(), platform.node().partition(".")[0]}
        told = [rf"(?<=[/\\]){user}(?=[/\\]|\b)|\b{user}(?=@)"] if len(user) >= _LEAST_NAME else []
        told += [rf"(?<![\w.]){re.escape(host)}(?![\w])" for host in sorted(hosts) if len(host) >= _LEAST_NAME]
        self._names = re.compile("|".join(told)) if told else None
        self._home = str(Path.home())

    def text(self, given: str) -> str:
        """The hash that stands for a text; nothing stands for nothing."""
        if not given:
            return given
        return f"#{hmac.digest(self._secret, given.encode('utf-8', 'surrogatepass'), 'sha256').hex()[:DIGITS]}"

    def nameless(self, given: str) -> str:
        """A sentence of ours without home folders, the user's name and the machine's."""
        known = given.replace(self._home, "~") if len(self._home) > 1 else given
        known = homeless(known)
        return known if self._names is None else self._names.sub("…", known)

    def row(self, row: EditRow) -> EditRow:
        """Without what the label and an exception say."""
        raised = _RAISED.match(row.error or "")
        error = row.error if raised is None else f"{raised[1]}: {self.text(raised[2])}"
        return replace(row, label=self.text(row.label), error=error)

    def note(self, note: Note) -> Note:
        """Without what an exception says, and without names of people, machines and homes."""
        if note.kind == SERVES:  # names of layers, which are looked up again
            return note
        said = _TOLD.sub(lambda told: f"{told[1]}{told[2]}: {self.text(told[3])}", note.says)
        return replace(note, says=self.nameless(said))

    def operation(self, operation: Operation) -> Operation:
        """Without lines of code and folders; file names, line numbers and functions stay."""
        return replace(
            operation,
            place=_bare(operation.place),
            chain=tuple(replace(step, place=_bare(step.place)) for step in operation.chain),
            precisions=tuple(
                each if each.error is None else replace(each, error=self._raised(each.error))
                for each in operation.precisions
            ),
        )

    def manifest(self, entries: Mapping[str, Any]) -> dict[str, Any]:
        """Of the command the script alone, no folder, and of `config` its keys, numbers and switches."""
        told = {
            name: value if name in _AS_THEY_ARE else self._plain(value, name == "config")
            for name, value in entries.items()
        }
        if isinstance(entries.get("command"), list):
            told["command"] = _script(entries["command"])
        if "cwd" in entries:
            told["cwd"] = None
        return told

    def _raised(self, said: str) -> str:
        return re.sub(r": (.*)\Z", lambda told: f": {self.text(told[1])}", said, count=1, flags=re.DOTALL)

    def _plain(self, value: Any, hashed: bool) -> Any:
        if isinstance(value, str):
            return self.text(value) if hashed else self.nameless(value)
        if isinstance(value, Mapping):
            return {key: self._plain(item, hashed) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._plain(item, hashed) for item in value]
        return value


class Kept(Redaction):
    """Of a run that may hold everything: all stays as it is."""

    def __init__(self) -> None:
        """Nothing is drawn."""

    def row(self, row: EditRow) -> EditRow:
        """Itself."""
        return row

    def note(self, note: Note) -> Note:
        """Itself."""
        return note

    def operation(self, operation: Operation) -> Operation:
        """Itself."""
        return operation

    def manifest(self, entries: Mapping[str, Any]) -> dict[str, Any]:
        """The same."""
        return dict(entries)


def _user() -> str:
    return next(
        (os.environ[name] for name in ("USER", "LOGNAME", "USERNAME") if os.environ.get(name)), Path.home().name
    )


def _bare(place: Place) -> Place:
    return replace(place, file=PurePath(place.file).name, source="")


def _script(command: list[Any]) -> list[str]:
    path = PurePath(str(command[0])) if command else PurePath()
    return [f"{path.parent.name}/{path.name}" if path.name == "__main__.py" else path.name]
