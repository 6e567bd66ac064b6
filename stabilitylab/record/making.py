"""Making a run's folder and file: whole or not at all, and never over anything that is there already. No torch.

The file is written under a scratch name beside its own, and takes that by one step of the file system: who is killed
before leaves a folder that is as good as free, who is killed later a run that can be read.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from stabilitylab.errors import RunError, UsageError

_SCRATCH: Final = ".making-"
"""What the names of scratch folders begin with."""


def is_taken(folder: Path) -> bool:
    """Whether `folder` holds anything besides what a killed process left of making a run. Raises RunError where it
    can't be looked at.
    """
    try:
        if not os.path.lexists(folder):
            folder.stat()  # says why, where that is not that it is missing
        return not folder.is_dir() or any(not each.name.startswith(_SCRATCH) for each in folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return os.path.lexists(folder)
    except (OSError, ValueError) as error:
        raise RunError(f"can't make a run in {_shown(folder)}: {_reason(error)}") from error


def free_folder(folder: Path) -> Path:
    """`folder` where a run can be made in it, else the first of ``folder-2``, ``folder-3``, … where one can."""
    number, candidate = 1, folder
    while is_taken(candidate):
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate


@contextlib.contextmanager
def making(file: Path) -> Iterator[Path]:
    """A scratch path, to be filled inside, that becomes `file` at the end. Its folder is made, and is gone again where
    that fails. Raises RunError, also where `file` is there by then.
    """
    missing: list[Path] = []
    try:
        missing += [folder for folder in (file.parent, *file.parent.parents) if not folder.exists()]
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=file.parent) as scratch:
            yield Path(scratch) / file.name
            _take_place(Path(scratch) / file.name, file)
    except BaseException as error:
        for folder in missing:  # the innermost first; those that others have used meanwhile stay
            with contextlib.suppress(OSError):
                folder.rmdir()
        if isinstance(error, OSError | sqlite3.Error):
            raise RunError(f"can't write a run file in {_shown(file.parent)}: {_reason(error)}") from error
        raise


def _take_place(made: Path, file: Path) -> None:
    try:
        os.link(made, file)
    except FileExistsError:
        raise RunError(f"run folder '{file.parent}' was taken by another process; expected a new one") from None
    except OSError:  # a file system without links
        os.rename(made, file)


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)


def _shown(folder: Path) -> str:
    named = repr(str(folder))
    return named if len(named) <= 200 else f"{named[:199]}…"


def wal_works(folder: Path) -> bool:
    """Try write-ahead logging on a scratch file: network file systems fail at it, some after reporting success."""
    with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=folder) as scratch:
        path = Path(scratch) / "scratch.db"
        try:
            with (
                contextlib.closing(sqlite3.connect(path)) as writer,
                contextlib.closing(sqlite3.connect(path)) as reader,
            ):
                if writer.execute("PRAGMA journal_mode=WAL").fetchone()[0] != "wal":
                    return False
                writer.executescript("CREATE TABLE t (x); INSERT INTO t VALUES (1);")
                writer.commit()
                return bool(reader.execute("SELECT count(*) FROM t").fetchone() == (1,))
        except sqlite3.Error:
            return False


def as_json(name: str, value: Any) -> str:
    """`value` as a manifest holds it. Raises UsageError naming the part of it that is no plain JSON."""
    try:
        return json.dumps(value, allow_nan=False, ensure_ascii=True)
    except (ValueError, TypeError, RecursionError):
        raise UsageError(_not_plain(name, value)) from None


def _not_plain(name: str, value: Any) -> str:
    """What is wrong with a value, and where in it."""
    expected = "expected plain JSON: dicts with strings as keys, lists, strings, finite numbers, true, false, null"
    for _ in range(_DEEPEST):
        at, inner = _first_wrong(value)
        if at is None:
            break
        name, value = f"{name}{at}", inner
    else:
        return f"{name[:80]}… is too deep, or holds itself; {expected}"
    if isinstance(value, float):
        return f"{name} is {value}; {expected}"
    wrong_key = next((key for key in value if not isinstance(key, str)), None) if isinstance(value, Mapping) else None
    what = f"a {type(value).__name__}" if wrong_key is None else f"a dict with a key of type {type(wrong_key).__name__}"
    return f"{name} is {what}; {expected}"


_DEEPEST: Final = 100


def _first_wrong(value: Any) -> tuple[str | None, Any]:
    """(how to get there, the first part of a container that is no JSON); (None, …) where there is none."""
    if isinstance(value, dict):
        parts: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, list | tuple):
        parts = enumerate(value)
    else:
        return None, value
    for key, part in parts:
        try:
            json.dumps(part, allow_nan=False)
        except (ValueError, TypeError, RecursionError):
            return f"[{key!r}]", part
    return None, value
