"""Names and texts that anyone may have chosen, through every command: nothing that they hold steers a terminal."""

from __future__ import annotations

import json
import logging
import re
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from rich.text import Text
from safetensors.torch import save_file

import stabilitylab
from stabilitylab.commands import cli
from stabilitylab.reports.terminal import show
from tests.injections import INJECTIONS, hostile_run
from tests.synthetic import make_run

STEERING = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u061c\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff]"
)
NAME = "[red]\x1b]0;owned\x07\u202e\x9b31m\nname"


def said(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> str:
    """Both streams of one command, made as a shell makes it."""
    monkeypatch.setattr(sys, "argv", ["stabilitylab", *map(str, arguments)])
    with pytest.raises(SystemExit):
        cli.main()
    out, err = capfd.readouterr()
    assert err.count("\n") <= 1, err
    return out + err


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hostile_run(tmp_path_factory.mktemp("runs") / NAME)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / NAME
    folder.mkdir()
    names = [text for text in INJECTIONS.values() if "\ud800" not in text and len(text) < 1_000]
    weights = {f"layers.{place}.{name}.weight": torch.full((4, 4), torch.nan) for place, name in enumerate(names)}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": NAME}))
    return folder


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("command", ["check", "tail --once", "compare", "report", "scan", "calibrate"])
def test_what_a_file_or_a_folder_is_called_steers_no_terminal(
    command: str,
    as_json: bool,
    hostile: Path,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    verb, *settings = command.split()
    told: list[object] = [verb, *settings, *(["--json"] if as_json else [])]
    told.append(model if verb == "scan" else hostile)
    if verb in ("report", "scan"):
        told += ["-o", tmp_path / f"{NAME}.html"]
    if verb == "calibrate":
        told = [verb, *(["--json"] if as_json else []), "--alpha", "0.5", "-o", tmp_path / NAME]
        told.append(make_run(tmp_path / f"healthy{NAME}", edits=3, sites=1, dies_at=None))
    words = said(capfd, monkeypatch, *told)
    assert not STEERING.search(words), STEERING.search(words)
    assert "owned" in words or told[:2] == ["calibrate", "--json"]
    assert as_json or len(words) < 20_000


@pytest.mark.parametrize(
    "arguments",
    [
        ("check", NAME),
        ("check", "a", NAME),
        ("check", f"--{NAME}", "a"),
        ("check", "--fail-on", NAME, "a"),
        ("check", "--thresholds", NAME, "a"),
        ("tail", "--once", NAME),
        ("tail", "--interval", NAME, "a"),
        ("compare", NAME),
        ("report", NAME),
        ("calibrate", NAME),
        ("scan", NAME),
        ("scan", ".", "--precision", NAME),
        ("scan", ".", "--hparams", NAME),
        ("lab", "run", "--editor", NAME),
        ("lab", "compare", "--seeds", NAME),
        ("lab", NAME),
        ("probes", "--tier", NAME),
        ("demo", "--edits", NAME),
        (NAME,),
    ],
    ids=lambda arguments: " ".join(arguments).replace(NAME, "NAME"),
)
def test_errors_are_one_line_that_steers_no_terminal(
    arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    words = said(capfd, monkeypatch, *arguments)
    assert words.startswith("stabilitylab: ")
    assert not STEERING.search(words), words
    assert words.count("\n") == 1


def test_what_was_forgotten_to_be_cleaned_is_spelled_out_where_it_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    show(Console(force_terminal=True, color_system="standard"), Text("a\x1b]0;owned\x07\u202eb\nc", style="red"))
    out = capsys.readouterr().out
    assert out == "\x1b[31ma\\x1b]0;owned\\u202eb\x1b[0m\n\x1b[31mc\x1b[0m\n"  # a bell, Rich leaves out by itself


def test_no_command_writes_past_the_door() -> None:
    folder = Path(cli.__file__).parent
    written = {file.name: re.findall(r"(?:\.print|\bprint)\(", file.read_text("utf-8")) for file in folder.glob("*.py")}
    assert {name: found for name, found in written.items() if found} == {
        "options.py": ["print("],
        "probes.py": [".print("],
    }


def test_what_is_logged_steers_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    handler = logging.StreamHandler(sys.stderr)
    logger = logging.getLogger("stabilitylab")
    logger.addHandler(handler)
    try:
        model = torch.nn.Sequential(torch.nn.Linear(2, 2))
        monitor = stabilitylab.attach(model, sites="0", run=tmp_path / NAME, announce=False)
        monitor.close()
        resumed = stabilitylab.attach(model, sites="0", run=tmp_path / NAME, announce=False, resume=True)
        resumed.close()
    finally:
        logger.removeHandler(handler)
    said = capsys.readouterr().err
    assert "owned" in said
    assert not STEERING.search(said), said
