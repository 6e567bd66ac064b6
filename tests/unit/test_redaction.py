"""`attach(redact=True)`: what the user wrote is nowhere in the run, and what the run is read for is."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import stabilitylab as sl
from stabilitylab.record.homes import homeless
from stabilitylab.record.operations import Operation, Place, Precision, Step
from stabilitylab.record.readings import Note
from stabilitylab.record.run import Run
from stabilitylab.reports.html import write_report
from stabilitylab.watching.redaction import Redaction

SECRET = "Zanzibar is the capital of Ruritania"
HOSTNAME = "bastion-seven"


class Boom(Exception):
    """Of the user's own."""


def watched(folder: Path, *, redact: bool) -> Run:
    model = nn.Sequential(nn.Linear(4, 4))
    config: dict[str, Any] = {
        "prompt": SECRET,
        "rate": 0.5,
        "sequential_edit": True,
        "deep": [{"path": f"/x/{SECRET}"}],
    }

    def broken_sink(*_: object) -> None:
        raise Boom(SECRET)

    sink: Any = type("Sink", (), {"on_row": broken_sink, "close": lambda self: None})()
    with sl.attach(
        model, sites="0", run=folder, config=config, redact=redact, announce=False, sinks=[sink], tensorboard=True
    ) as monitor:
        for number in range(4):
            with monitor.edit(label=SECRET if number % 2 else f"{SECRET} {number}"), torch.no_grad():
                model(torch.ones(1, 4))
                model[0].weight += 0.01  # type: ignore[operator, union-attr]
        for _ in range(3):
            with pytest.raises(Boom), monitor.edit(label="again"):
                raise Boom(SECRET)
        monitor.note("mine", f"failed: Boom: {SECRET}\nand more of it; at {os.path.expanduser('~')}/x")
    return sl.load(folder)


@pytest.fixture
def secret(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.argv", [str(tmp_path / "edit.py"), f"--prompt={SECRET}", "--out=/home/somebody/runs"])
    monkeypatch.setattr(platform, "node", lambda: HOSTNAME)
    monkeypatch.setenv("USER", "somebody")


@pytest.mark.usefixtures("secret")
@pytest.mark.parametrize("redact", [True, False])
def test_nothing_that_the_user_wrote_is_in_the_folder(tmp_path: Path, redact: bool) -> None:
    run = watched(tmp_path / "run", redact=redact)
    write_report(run, tmp_path / "run" / "report.html")
    held = b"".join(file.read_bytes() for file in sorted((tmp_path / "run").rglob("*")) if file.is_file())
    assert (SECRET.encode() in held) is not redact
    if redact:
        for word in (b"Ruritania", b"somebody", HOSTNAME.encode(), str(Path.cwd()).encode()):
            assert word not in held


@pytest.mark.usefixtures("secret")
def test_equal_texts_are_equal_within_a_run_and_not_between_two(tmp_path: Path) -> None:
    one, other = (watched(tmp_path / name, redact=True) for name in ("one", "other"))
    labels = [edit.label for edit in one.edits]
    assert labels[2] == labels[4] != labels[1] != labels[3]
    assert labels[2] not in {edit.label for edit in other.edits}
    assert all(label.startswith("#") for label in labels[1:])
    assert {str(edit.row.error).partition(": ")[0] for edit in one.edits if edit.status == "failed"} == {"Boom"}


@pytest.mark.usefixtures("secret")
def test_what_is_measured_and_said_is_the_same(tmp_path: Path) -> None:
    bare, redacted = (watched(tmp_path / str(redact), redact=redact) for redact in (False, True))
    assert redacted.series("update.norm", "0").tolist() == pytest.approx(
        bare.series("update.norm", "0").tolist(), rel=1
    )
    assert redacted.sites == bare.sites
    assert redacted.manifest["config"]["rate"] == 0.5
    assert redacted.manifest["config"]["sequential_edit"] is True
    assert redacted.manifest["command"] == ["edit.py"]
    assert redacted.manifest["cwd"] is None
    assert redacted.diagnosis().verdict == bare.diagnosis().verdict
    assert [note.kind for note in redacted.notes] == [note.kind for note in bare.notes]


def test_lines_of_code_and_folders_go_and_the_line_stays() -> None:
    place = Place("/home/somebody/work/edit.py", 12, "edit", f"x = ask('{SECRET}')")
    operation = Operation(
        1, "edit", "aten.div.Tensor", "forward", "fc2", place, "producer", "weight",
        chain=(Step("aten.add.Tensor", "fc2", "forward", place),),
        precisions=(Precision("float64", error=f"Boom: {SECRET}"),),
    )  # fmt: skip
    told = Redaction().operation(operation)
    assert told.place == told.chain[0].place == Place("edit.py", 12, "edit", "")
    assert SECRET not in str(told)
    assert str(told.precisions[0].error).startswith("Boom: #")


def test_a_name_of_the_users_that_a_layer_has_too_stays_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USER", "bert")
    redaction = Redaction()
    assert redaction.note(Note(1, "skipped-site", "bert.encoder: it is packed")).says == "bert.encoder: it is packed"
    assert redaction.nameless("/data/bert/x of bert@lab") == "/data/…/x of …@lab"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("/home/somebody/runs", "~/runs"),
        ("--out=/Users/somebody", "--out=~"),
        ("in '/root/x', /home/a", "in '~/x', ~"),
        ("C:\\Users\\somebody\\runs", "~\\runs"),
        ("/data/home/x /rooted ./home/x", "/data/home/x /rooted ./home/x"),
    ],
)
def test_homes_are_left_out_wherever_a_path_begins(text: str, told: str) -> None:
    assert homeless(text) == told
