"""Finding a run file and opening it to be read, also while it is written or after its writer was killed. No torch."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal

from stabilitylab.errors import RunError, nearest
from stabilitylab.record.store import APPLICATION_ID, FILE_NAME, SCHEMA_VERSION
from stabilitylab.record.tables import CHECKED_SINCE

__all__ = ["COPY_TRIES", "FILE_NAME", "LOCK_SECONDS", "connect", "damaged", "find_file", "find_runs"]

LOCK_SECONDS: Final = 10.0
"""How long a reader waits for a writer that has no write-ahead log; one commit takes milliseconds."""

COPY_TRIES: Final = 5

_MOST_ROWS: Final = 200_000
_LEAST_BYTES: Final = 64
"""A table may hold so many rows, and one more for each so many bytes of the file. An edit's row takes more than that in
a file, and some hundreds of bytes in memory: a file of very many rows of nothing is none of ours."""
_TABLES: Final = ("edit", "dry", "outcome", "note", "alarm", "operation", "layout", "manifest", "metric")
_LONGEST: Final = 300
_STEP: Final = 10_000
STEPS: Final = 10_000
"""How often so many instructions of SQLite's are allowed for, and once more per so many bytes of the file: reading a
run takes a fraction of that, and nothing that a file holds can make it take for ever."""


def find_runs(folder: Path) -> list[Path]:
    """The run folders directly under `folder`, by name."""
    try:
        return sorted(path.parent for path in folder.glob(f"*/{FILE_NAME}"))
    except OSError:
        return []


def find_file(path: Path) -> Path:
    """The run file that `path` is or holds. Raises RunError naming the runs nearest to it."""
    try:
        file = path / FILE_NAME if path.is_dir() else path
        if file.is_file():
            return file
    except OSError as error:
        raise RunError(f"can't look for a run in '{path}': {error.strerror}") from error
    if path.is_dir() and (inside := find_runs(path)):
        raise RunError(f"'{path}' is a folder of runs; expected one of them: {', '.join(map(str, inside[:5]))}")
    runs = [str(run) for run in find_runs(path.parent)]
    alike = nearest(str(path), runs) or runs[:3]
    hint = f"; runs beside it: {', '.join(map(repr, alike))}" if alike else ""
    what = f"holds no {FILE_NAME}" if path.is_dir() else "is no file" if path.exists() else "does not exist"
    raise RunError(f"'{path}' {what}; expected a run folder{hint}")


def _check(db: sqlite3.Connection, file: Path) -> None:
    try:
        application = db.execute("PRAGMA application_id").fetchone()[0]
        version = db.execute("PRAGMA user_version").fetchone()[0]
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
        raise RunError(f"'{file}' is not a run file ({_told(error)}); expected one that stabilitylab wrote") from error
    if application != APPLICATION_ID:
        raise RunError(f"'{file}' is a database but not a run file; expected one that stabilitylab wrote")
    if version > SCHEMA_VERSION:
        raise RunError(
            f"'{file}' has run schema {version}, this stabilitylab reads up to {SCHEMA_VERSION}; upgrade stabilitylab"
        )
    if version >= CHECKED_SINCE:  # text that is no UTF-8 any more is for the checksums to find, record by record
        db.text_factory = lambda data: data.decode("utf-8", "surrogateescape")
    try:
        _expect_tables_alone(db)
        _expect_few_rows(db)
    except (sqlite3.DatabaseError, ValueError) as error:
        raise damaged(file, error) from error


def damaged(file: Path, error: Exception) -> RunError:
    """What is raised where reading a run file fails."""
    return RunError(f"'{file}' is damaged: {_told(error)}")


def _told(error: Exception) -> str:
    """An error's words, which may quote what the file holds, of any length and in several lines."""
    words = " ".join(str(error).split())
    return words if len(words) <= _LONGEST else f"{words[: _LONGEST - 1]}…"


def _expect_tables_alone(db: sqlite3.Connection) -> None:
    """Nothing in the file may compute: no view, trigger, virtual table or generated column in the place of a table."""
    for kind, name, says in db.execute("SELECT type, name, sql FROM sqlite_master").fetchall():
        # Indexes that SQLite makes by itself have no text; what an index of anyone else's computes is never read.
        if kind != "table" and not (kind == "index" and says is None):
            raise ValueError(f"it holds a {str(kind)[:20]}, {str(name)[:40]!r}; expected tables alone")
        if kind == "table" and not str(says).startswith("CREATE TABLE "):
            raise ValueError(f"it holds a table that is not plain, {str(name)[:40]!r}")
        hidden = db.execute("SELECT hidden FROM pragma_table_xinfo(?)", (name,)).fetchall() if kind == "table" else []
        if any(each != (0,) for each in hidden):
            raise ValueError(f"table {str(name)[:40]!r} has columns that are computed")


def _expect_few_rows(db: sqlite3.Connection) -> None:
    """What is held of each row must not come to many times the file."""
    ((pages,),), ((size,),) = (db.execute(f"PRAGMA {name}") for name in ("page_count", "page_size"))
    most = _MOST_ROWS + pages * size // _LEAST_BYTES
    held = {name for (name,) in db.execute("SELECT name FROM sqlite_master")}
    for table in _TABLES:
        if table in held:
            (rows,) = db.execute(f"SELECT count(*) FROM {table}").fetchone()
            if rows > most:
                raise ValueError(f"table {table!r} holds {rows:,} rows in {pages * size:,} bytes")


def _expect_files(file: Path) -> None:
    """What is opened beside the run is a file: a pipe would be waited for. Raises RunError."""
    for ending in ("", "-wal", "-shm", "-journal"):
        beside = file.with_name(file.name + ending)
        try:
            kind = beside.lstat().st_mode
        except OSError:
            continue
        if not stat.S_ISREG(kind):
            raise RunError(f"'{beside}' is no file; expected a run that stabilitylab wrote")


def _copy(file: Path, folder: Path) -> Path:
    """Copy a run file, with the log or journal that it is not whole without, as they stood at one moment."""
    parts = [file.with_name(file.name + ending) for ending in ("", "-wal", "-journal")]

    def state() -> list[tuple[int, int] | None]:
        found = [part.stat() if part.exists() else None for part in parts]
        return [(stat.st_mtime_ns, stat.st_size) if stat else None for stat in found]

    for _ in range(COPY_TRIES):
        before = state()
        for part in parts:
            (folder / part.name).unlink(missing_ok=True)
            if part.exists():
                shutil.copyfile(part, folder / part.name)
        if state() == before:
            return folder / file.name
    raise RunError(f"'{file}' changes faster than it can be copied; expected a run that can be read in place")


@contextlib.contextmanager
def connect(file: Path) -> Iterator[sqlite3.Connection]:
    """A connection that sees the run as it stands at this moment, and never changes it.

    Where it can't be read in place (its folder can't take the log's shared memory, or a killed writer left a journal
    that has to be rolled back first), a temporary copy is.
    """
    with contextlib.ExitStack() as stack:
        _expect_files(file.resolve())
        try:
            db = stack.enter_context(contextlib.closing(_open(file, "ro")))
        except sqlite3.OperationalError as error:
            if "locked" in str(error):
                raise RunError(f"'{file}' is locked by another program; expected a run that can be read") from error
            try:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="stabilitylab-")))
                db = stack.enter_context(contextlib.closing(_open(_copy(file, folder), "rw")))
            except (OSError, sqlite3.OperationalError) as failure:
                raise RunError(f"can't read '{file}': {_told(failure)}") from failure
        _check(db, file)
        yield db


def _open(file: Path, mode: Literal["ro", "rw"]) -> sqlite3.Connection:
    """Connect, and begin the one transaction that everything is read in."""
    db = sqlite3.connect(f"{file.resolve().as_uri()}?mode={mode}", uri=True, timeout=LOCK_SECONDS)
    left = iter(range(STEPS + file.stat().st_size // _STEP))
    db.set_progress_handler(lambda: next(left, None) is None, _STEP)
    try:
        db.execute("PRAGMA trusted_schema = OFF")
        db.execute("BEGIN")
        db.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except sqlite3.OperationalError:
        db.close()
        raise
    except (sqlite3.DatabaseError, UnicodeDecodeError):
        pass  # `_check` says what is wrong with it; SQLite's own message may quote damaged bytes
    return db
