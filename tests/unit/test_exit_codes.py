"""Every exit code of the command line (docs/console.md), of each verb that can end with it, each error in one line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from stabilitylab.commands import cli, options
from stabilitylab.commands.options import (
    EXIT_BAD_VERDICT,
    EXIT_INCOMPLETE,
    EXIT_INTERNAL,
    EXIT_INTERRUPTED,
    EXIT_UNWATCHED,
    EXIT_USAGE,
)
from stabilitylab.record.readings import EditRow, Metric, Note
from stabilitylab.record.store import FILE_NAME, RunWriter
from tests.folders import weights, write

METRICS = [
    Metric("weight.nonfinite", "1", "count", "after", "", "", ""),
    Metric("update.norm", "1", "log", "after", "", "", ""),
]
ENTRIES = {
    "check": "stabilitylab.commands.check.load",
    "scan": "stabilitylab.acting.scanning.scanned.scan",
    "tail": "stabilitylab.reports.tail.follow",
    "compare": "stabilitylab.commands.compare.load",
    "report": "stabilitylab.commands.report.load",
    "calibrate": "stabilitylab.analysis.calibrating.calibrate",
    "probes": "stabilitylab.probes.registry.probes_of",
}
"""What each verb calls first."""


def run(folder: Path, edits: int, *, norm: float = 1.0, nonfinite: float = 0.0, notes: tuple[Note, ...] = ()) -> None:
    writer = RunWriter(folder, {"sites": ["fc"]}, METRICS)
    for edit in range(edits + 1):
        held = {"weight.nonfinite": nonfinite if edit == edits else 0.0} | ({"update.norm": norm} if edit else {})
        readings = {(name, "fc"): np.array([value]) for name, value in held.items()}
        writer.append(EditRow(edit, "", "applied" if edit else "start", 1.7e9 + edit, 1.0, 0.1, 0.0, None, readings))
    for note in notes:
        writer.note(note)
    writer.set_manifest({"closed": True})
    writer.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the commands are given, by name."""
    folder = tmp_path_factory.mktemp("files")
    run(folder / "healthy", 30)
    run(folder / "broken", 5, nonfinite=3.0)
    run(folder / "nothing-lands", 12, norm=0.0)
    run(folder / "unwatched", 5, notes=(Note(0, "canary-off", "the canary failed"),))
    run(folder / "broken-unwatched", 5, nonfinite=3.0, notes=(Note(0, "canary-off", "the canary failed"),))
    run(folder / "without-edits", 0)
    (folder / "no-run").mkdir()
    (folder / "no-run" / FILE_NAME).write_bytes(b"no database" * 100)
    (folder / "empty").mkdir()
    write(folder / "model", weights())
    held = weights()
    held["model.layers.1.mlp.down_proj.weight"][3, 5] = np.nan
    write(folder / "broken-model", held)
    return folder


def ends(files: Path, command: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of a command line, whose words that name something of `files` are paths."""
    words = [str(files / word) if (files / word).exists() else word for word in command.split()]
    monkeypatch.chdir(files.parent)
    monkeypatch.setattr(sys, "argv", ["stabilitylab", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("--version", 0),
        ("check healthy", 0),
        ("scan model", 0),
        ("tail --once healthy", 0),
        ("tail --once broken", 0),
        ("compare healthy broken", 0),
        ("report healthy -o page.html", 0),
        ("report broken healthy -o pages.html", 0),
        ("calibrate healthy --alpha 0.5 -o limits.json", 0),
        ("probes", 0),
        ("lab --help", 0),
        ("check broken", EXIT_BAD_VERDICT),
        ("check broken --json", EXIT_BAD_VERDICT),
        ("check broken-unwatched", EXIT_BAD_VERDICT),
        ("check nothing-lands", EXIT_BAD_VERDICT),
        ("scan broken-model", EXIT_BAD_VERDICT),
        ("", EXIT_USAGE),
        ("lab", EXIT_USAGE),
        ("chekc healthy", EXIT_USAGE),
        *[(f"{verb} missing", EXIT_USAGE) for verb in (*ENTRIES, "tail --once") if verb != "tail"],
        *[(f"{verb} no-run", EXIT_USAGE) for verb in ("check", "tail --once", "compare", "report", "calibrate")],
        *[(f"{verb} healthy --no-such-option", EXIT_USAGE) for verb in ENTRIES],
        *[(verb, EXIT_USAGE) for verb in ENTRIES if verb != "probes"],
        ("scan empty", EXIT_USAGE),
        ("check healthy --fail-on sideways", EXIT_USAGE),
        ("check healthy --thresholds missing.json", EXIT_USAGE),
        ("scan model --fail-on sideways", EXIT_USAGE),
        ("report healthy -o healthy", EXIT_USAGE),
        ("calibrate healthy", EXIT_USAGE),
        ("probes --tier lite", EXIT_USAGE),
        ("lab run --editor none-such", EXIT_USAGE),
        ("check without-edits", EXIT_INCOMPLETE),
        ("check without-edits --json", EXIT_INCOMPLETE),
        ("check unwatched", EXIT_UNWATCHED),
        ("check unwatched --json", EXIT_UNWATCHED),
    ],
)
def test_how_it_ends(
    files: Path, command: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ends(files, command, monkeypatch) == code
    said = capsys.readouterr()
    assert "Traceback" not in said.out + said.err
    if code in (EXIT_USAGE, EXIT_INCOMPLETE) and command not in ("", "lab"):
        assert said.err.startswith("stabilitylab: ")
        assert said.err.count("\n") == 1
    else:
        assert said.err == ""


def raising(error: BaseException) -> Callable[..., object]:
    def broken(*_: object, **__: object) -> object:
        raise error

    return broken


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ZeroDivisionError("ours"), EXIT_INTERNAL),
        (KeyError("ours"), EXIT_INTERNAL),
        (MemoryError("ours"), EXIT_INTERNAL),
        (RecursionError("ours"), EXIT_INTERNAL),
        (PermissionError(13, "theirs"), EXIT_USAGE),
        (KeyboardInterrupt(), EXIT_INTERRUPTED),
    ],
    ids=lambda given: type(given).__name__ if isinstance(given, BaseException) else str(given),
)
@pytest.mark.parametrize("verb", ENTRIES)
def test_how_it_ends_where_something_breaks(
    files: Path,
    verb: str,
    error: BaseException,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(ENTRIES[verb], raising(error))
    assert ends(files, verb if verb == "probes" else f"{verb} healthy", monkeypatch) == code
    said = capsys.readouterr().err
    assert said.count("\n") == (0 if code == EXIT_INTERRUPTED else 1)
    assert ("internal error: " in said) == (code == EXIT_INTERNAL)


def test_each_code_and_each_verb_is_asked_for() -> None:
    marks = [mark for mark in test_how_it_ends.pytestmark if mark.name == "parametrize"]  # type: ignore[attr-defined]
    more = test_how_it_ends_where_something_breaks.pytestmark  # type: ignore[attr-defined]
    asked = {code for mark in [*marks, *more] if "code" in mark.args[0] for *_, code in mark.args[1]}
    assert asked == {0, *(value for name, value in vars(options).items() if name.startswith("EXIT_"))}
    listed = CliRunner().invoke(cli.app, ["--help"]).output
    assert all(f" {verb} " in listed for verb in ENTRIES)
    assert {command.callback.__name__ for command in cli.app.registered_commands if command.callback} == {
        *ENTRIES,
        "demo",
    }
