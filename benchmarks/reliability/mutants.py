"""Files that anyone may have written: sound ones, changed in ways that know what they are made of. Knows no goal."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import random
import shutil
import sqlite3
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from stabilitylab.record.store import FILE_NAME
from tests.sealing import seal

DEEP: Final = "[" * 50_000 + "]" * 50_000
PLAIN: Final[tuple[Any, ...]] = (
    None,
    True,
    0,
    -1,
    1 << 70,
    1e308,
    0.5,
    "",
    "x",
    "\x00\x1b[31m\u202e",
    "../../etc/passwd",
    "a" * 10_000,
    [],
    {},
    [[]],
    {"": None},
    [1, "a", None],
)
"""Of JSON."""
CELLS: Final[tuple[Any, ...]] = (
    None,
    0,
    -1,
    3,
    2**62,
    float("inf"),
    -1e300,
    "",
    "text",
    "\x1b]0;x\x07",
    "nan",
    DEEP,
    b"",
    b"\xff\xfe",
    b"\x00" * 9,
    "[]",
    "{}",
    '[["update.norm", "a", 99999999]]',
    "9" * 3_000,
)
"""Of a table."""


class Payload:
    """Runs code where it is unpickled."""

    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.mark,)


def changed_json(value: Any, chance: random.Random, depth: int = 0) -> Any:
    """`value` with one part of it, at any depth, of another kind, gone, twice or renamed."""
    if not isinstance(value, dict | list) or not value or depth > 5 or chance.random() < 0.2:
        return chance.choice(PLAIN)
    how = chance.choice(("gone", "renamed or twice", "inside", "inside"))
    if isinstance(value, dict):
        key = chance.choice(list(value))
        if how == "gone":
            return {name: part for name, part in value.items() if name != key}
        if how == "inside":
            return value | {key: changed_json(value[key], chance, depth + 1)}
        return {(f"{name}x" if name == key else name): part for name, part in value.items()}
    place = chance.randrange(len(value))
    parts = {"gone": [], "inside": [changed_json(value[place], chance, depth + 1)]}
    return [*value[:place], *parts.get(how, [value[place]] * 2), *value[place + 1 :]]


def _json_text(text: str, chance: random.Random) -> str:
    how = chance.random()
    if how < 0.1:
        return chance.choice((DEEP, "NaN", "1e999", text[: len(text) // 2], f"{text}{text}", "", "\ufeff" + text))
    with contextlib.suppress(ValueError, RecursionError):
        return json.dumps(changed_json(json.loads(text), chance))
    return text


def changed_bytes(data: bytes, chance: random.Random) -> bytes:
    """Flipped, cut, repeated or grown."""
    held, at = bytearray(data or b"\0"), chance.randrange(len(data) or 1)
    how = chance.randrange(5)
    if how == 0:
        for _ in range(chance.choice((1, 4, 64))):
            held[chance.randrange(len(held))] ^= 1 << chance.randrange(8)
    elif how == 1:
        del held[at:]
    elif how == 2:
        held[at : at + 512] = chance.randbytes(512)
    elif how == 3:
        held += held[:at]
    else:
        held[at : at + 8] = struct.pack("<Q", chance.choice((0, 1, 2**31, 2**63, 2**64 - 1)))
    return bytes(held)


# -- run files --------------------------------------------------------------------------------------------------------

_SCHEMA_CHANGES: Final = (
    "DROP TABLE {table}",
    "ALTER TABLE {table} RENAME TO other",
    "ALTER TABLE {table} ADD COLUMN more TEXT",
    "ALTER TABLE {table} RENAME COLUMN {column} TO other",
    "CREATE VIEW v AS SELECT * FROM {table}",
    "CREATE TRIGGER t AFTER INSERT ON {table} BEGIN DELETE FROM {table}; END",
    "CREATE INDEX i ON {table} ({column})",
    "DELETE FROM {table}",
    "PRAGMA user_version=99",
    "PRAGMA user_version=-1",
    "PRAGMA application_id=1",
    "INSERT INTO {table} SELECT * FROM {table}",
    "CREATE TABLE extra AS SELECT * FROM {table}, {table} AS again",
)


def _run_cell(db: sqlite3.Connection, chance: random.Random, table: str, columns: list[str]) -> None:
    rows = [each for (each,) in db.execute(f"SELECT {columns[0]} FROM {table}")]
    if not rows:
        return
    column, row = chance.choice(columns), chance.choice(rows)
    (held,) = db.execute(f"SELECT {column} FROM {table} WHERE {columns[0]} IS ?", (row,)).fetchone()
    value: Any = chance.choice(CELLS)
    if chance.random() < 0.6:
        if isinstance(held, str) and held[:1] in "[{":
            value = _json_text(held, chance)
        elif isinstance(held, bytes):
            value = changed_bytes(held, chance)
        elif isinstance(held, int | float):
            value = chance.choice((held + 1, -held, held * 1e6, 1 << 40, 0))
    whole = chance.random() < 0.2
    where, given = ("", ()) if whole else (f" WHERE {columns[0]} IS ?", (row,))
    db.execute(f"UPDATE OR IGNORE {table} SET {column} = ?{where}", (value, *given))


def run_file(folder: Path, sound: Path, chance: random.Random, mark: Path) -> Path:
    """A run of `sound`, changed once to four times in its tables, and now and then in its bytes or beside it."""
    target = folder / "run"
    shutil.copytree(chance.choice(sorted(sound.iterdir())), target)
    file = target / FILE_NAME
    how = chance.random()
    if how < 0.8:
        with contextlib.closing(sqlite3.connect(file)) as db, contextlib.suppress(sqlite3.Error, OverflowError):
            for _ in range(chance.randint(1, 4)):
                tables = [name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
                table = chance.choice(tables)
                columns = [each[1] for each in db.execute(f"PRAGMA table_info({table})")]
                if chance.random() < 0.85:
                    _run_cell(db, chance, table, columns)
                else:
                    statement = chance.choice(_SCHEMA_CHANGES)
                    db.execute(statement.format(table=table, column=chance.choice(columns)))
            db.commit()
        if chance.random() < 0.7:  # whoever changes a run on purpose works its checksums out again
            with contextlib.suppress(sqlite3.Error):
                seal(file)
    elif how < 0.95:
        file.write_bytes(changed_bytes(file.read_bytes(), chance))
    else:
        beside = file.with_name(FILE_NAME + chance.choice(("-wal", "-journal", "-shm")))
        beside.write_bytes(chance.choice((chance.randbytes(5_000), file.read_bytes(), bytes(40_000))))
    return target


# -- what is read besides ---------------------------------------------------------------------------------------------


def thresholds_file(folder: Path, sound: Path, chance: random.Random, mark: Path) -> Path:
    """The package's own limits, changed."""
    text = (sound / "thresholds.json").read_text()
    for _ in range(chance.randint(1, 3)):
        text = _json_text(text, chance)
    return _written(folder / "thresholds.json", text, chance)


def records_file(folder: Path, sound: Path, chance: random.Random, mark: Path) -> Path:
    """Edit records, changed."""
    text = (sound / "records.json").read_text()
    for _ in range(chance.randint(1, 3)):
        text = _json_text(text, chance)
    return _written(folder / "records.json", text, chance)


def _written(file: Path, text: str, chance: random.Random) -> Path:
    data = text.encode("utf-8", "surrogatepass")
    file.write_bytes(changed_bytes(data, chance) if chance.random() < 0.1 else data)
    return file


def model_folder(folder: Path, sound: Path, chance: random.Random, mark: Path) -> Path:
    """A folder of weights whose config, header, index or pickle was changed; some hold code."""
    target = folder / "model"
    shutil.copytree(chance.choice(sorted((sound / "models").iterdir())), target)
    how = chance.choice(("config", "header", "bytes", "index", "pickle", "code"))
    weights = sorted(target.glob("*.safetensors"))
    if how == "config":
        _rewrite(target / "config.json", chance)
    elif how == "header":
        file = chance.choice(weights)
        data = file.read_bytes()
        (size,) = struct.unpack("<Q", data[:8])
        header = _json_text(data[8 : 8 + size].decode(), chance).encode("utf-8", "surrogatepass")
        file.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + size :])
    elif how == "bytes":
        file = chance.choice(weights)
        file.write_bytes(changed_bytes(file.read_bytes(), chance))
    elif how == "index":
        names = {"a.weight": chance.choice(("model.safetensors", "../../../etc/passwd", "/etc/passwd", "missing"))}
        (target / "model.safetensors.index.json").write_text(
            _json_text(json.dumps({"metadata": {}, "weight_map": names}), chance)
        )
        for file in weights:
            if chance.random() < 0.5:
                file.unlink()
    elif how == "pickle":
        for file in weights:
            file.unlink()
        data = pickle.dumps({"a.weight": Payload(str(mark))}, protocol=2)
        (target / "pytorch_model.bin").write_bytes(changed_bytes(data, chance) if chance.random() < 0.3 else data)
    else:
        (target / "theirs.py").write_text(f"import os; os.mkdir({str(mark)!r})\nclass C: pass\n")
        automatic = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM", "AutoModel"), "theirs.C")
        (target / "config.json").write_text(json.dumps({"model_type": "theirs", "auto_map": automatic}))
    return target


def _rewrite(file: Path, chance: random.Random) -> None:
    text = _json_text(file.read_text(), chance)
    file.write_bytes(text.encode("utf-8", "surrogatepass"))


def editor_state(folder: Path, sound: Path, chance: random.Random, mark: Path) -> Path:
    """An editor's archive, changed, or a pickle with code in it."""
    source = chance.choice(sorted((sound / "editors").iterdir()))
    file = folder / source.name
    data = source.read_bytes()
    if chance.random() < 0.2:
        data = pickle.dumps({"model": {"u_std": Payload(str(mark))}}, protocol=2)
    file.write_bytes(changed_bytes(data, chance))
    return file


Maker = Callable[[Path, Path, random.Random, Path], Path]
"""(new folder, folder of sound files, chance, what code would make) → what is to be read."""
