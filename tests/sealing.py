"""Makes a changed run file one that claims to be as it was written: its checksums and counts are worked out again."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

from stabilitylab.record.tables import CHECKED_SINCE, COUNTS_ENTRY, MANIFEST, TABLES, Table


def seal(file: Path) -> None:
    """All that can be sealed: a record of other kinds, or a table that is none any more, stays as it is. A run of an
    older schema has nothing of it.
    """
    with closing(sqlite3.connect(file)) as db, db:
        (schema,) = db.execute("PRAGMA user_version").fetchone()
        if schema < CHECKED_SINCE:
            return
        counts = {}
        plain = {name for (name,) in db.execute("SELECT name FROM pragma_table_list WHERE type = 'table'")}
        for table in [each for each in TABLES if each.name in plain and _computes_nothing(db, each)]:
            with contextlib.suppress(sqlite3.Error, OverflowError):
                (counts[table.name],) = db.execute(f"SELECT count(*) FROM {table.name}").fetchone()
                _number_anew(db, table)
                _seal_records(db, table)
        counts["manifest"] = counts.get("manifest", 1) - 1
        with contextlib.suppress(sqlite3.Error):
            if db.execute("SELECT count(*) FROM manifest WHERE key = ?", (COUNTS_ENTRY,)).fetchone()[0]:
                db.execute(MANIFEST.replace, MANIFEST.signed((COUNTS_ENTRY, json.dumps(counts))))


def _computes_nothing(db: sqlite3.Connection, table: Table) -> bool:
    return all(hidden == 0 for (hidden,) in db.execute("SELECT hidden FROM pragma_table_xinfo(?)", (table.name,)))


def _number_anew(db: sqlite3.Connection, table: Table) -> None:
    if table.number == "position":
        edits = [edit for (edit,) in db.execute(f"SELECT edit FROM {table.name} ORDER BY edit")]
        positions: list[tuple[int, Any]] = list(enumerate(edits, start=1))
        db.executemany(f"UPDATE {table.name} SET position = ? WHERE edit = ?", positions)


def _seal_records(db: sqlite3.Connection, table: Table) -> None:
    key = table.columns[0]
    for record in db.execute(f"SELECT {', '.join(table.columns)} FROM {table.name}").fetchall():
        sealed = table.checksum(record)
        if sealed is not None:
            db.execute(f"UPDATE {table.name} SET crc = ? WHERE {key} = ?", (sealed, record[0]))
