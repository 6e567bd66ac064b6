"""``stabilitylab lab``: streams of edits under several methods, from the command line to the rows."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import stabilitylab as sl
from stabilitylab.commands import cli
from stabilitylab.editors import registry
from stabilitylab.editors.base import Editor
from stabilitylab.errors import EditError, RecordError, RunError, StabilityLabError, UsageError
from stabilitylab.testbed import digits
from stabilitylab.testbed.bed import SCORES
from stabilitylab.testbed.compare import write_rows
from stabilitylab.testbed.digits_bed import DigitsBed
from stabilitylab.testbed.lab import Row, run_lab

NAMED = [
    "editor", "seed", "edits", "verdict", "onset_edit", "first_nonfinite_edit", "efficacy", "rephrase",
    "image_rephrase", "locality", "retention", "drift_ratio", "edits_per_s",
]  # fmt: skip
SITE = "language_model.model.decoder.layers.2.fc2"


@pytest.fixture(scope="module")
def bed() -> DigitsBed:
    return DigitsBed("fp16")


class Breaking:
    """Writes NaN into a weight from its `nan_at`-th edit on; raises at its `raise_at`-th."""

    sites = (SITE,)

    def __init__(self, nan_at: int | None = None, raise_at: int | None = None) -> None:
        self._edits, self._nan_at, self._raise_at = 0, nan_at, raise_at

    def edit(self, model: nn.Module, request: Any) -> nn.Module:
        self._edits += 1
        if self._edits == self._raise_at:
            raise torch.linalg.LinAlgError("singular")
        if self._nan_at is not None and self._edits >= self._nan_at:
            with torch.no_grad():
                model.get_submodule(SITE).weight[0, 0] = math.nan  # type: ignore[index]
        return model


@pytest.fixture
def breaking(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def named(**settings: Any) -> None:
        kind = registry.Kind("breaking", "for a test", lambda model, prompts: Breaking(**settings))
        monkeypatch.setitem(registry._BY_NAME, "breaking", kind)

    return named


def test_a_row_says_what_became_of_the_stream(bed: DigitsBed, tmp_path: Path, breaking: Callable[..., None]) -> None:
    breaking(nan_at=3)
    row = run_lab(bed, "breaking", edits=4, seed=1, run=tmp_path / "run")
    assert list(row.to_json())[: len(NAMED)] == NAMED
    assert (row.editor, row.seed, row.edits, row.verdict) == ("breaking", 1, 4, "non-finite")
    assert row.first_nonfinite_edit == 3
    # Before the NaN nothing was edited, so nothing was learned; after it no answer counts, not even an unchanged one.
    assert (row.efficacy, row.locality, row.retention) == (0, 0, 0)
    assert row.drift_ratio is not None
    assert math.isnan(row.drift_ratio)
    assert row.to_json()["drift_ratio"] is None
    assert row.perplexity_before is not None
    assert row.perplexity_before < 3
    assert row.perplexity is not None
    assert math.isnan(row.perplexity)
    run = sl.load(row.run)
    assert run.complete
    assert [edit.label for edit in run.edits if edit.edit == 1] == [bed.label(bed.stream(1, 1)[0])]
    assert run.manifest["config"]["editor"] == "breaking"


def test_nothing_edited_keeps_everything(bed: DigitsBed, tmp_path: Path, breaking: Callable[..., None]) -> None:
    breaking()
    row = run_lab(bed, "breaking", edits=3, seed=1, run=tmp_path / "run")
    assert (row.efficacy, row.locality, row.drift_ratio, row.failed) == (0, 1, 0, 0)
    assert row.perplexity == row.perplexity_before


def test_an_editors_error_is_an_edit_that_failed_and_the_stream_goes_on(
    bed: DigitsBed, tmp_path: Path, breaking: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    breaking(raise_at=2)
    right = [replace(record, alt=record.pred) for record in bed.stream(0, 3)]  # the model knows these already
    monkeypatch.setattr(bed, "stream", lambda seed, n: right[:n])
    row = run_lab(bed, "breaking", edits=3, seed=0, run=tmp_path / "run")
    assert (row.failed, row.edits, row.drift_ratio) == (1, 3, 0)
    assert row.error is not None
    assert row.error.endswith("LinAlgError: singular")
    # What an editor failed to do counts as wrong, even where the model had it right all along.
    assert row.efficacy == row.retention == pytest.approx(2 / 3)
    assert row.locality == 1
    assert [edit.status for edit in sl.load(row.run).edits] == ["start", "applied", "failed", "applied"]


def test_an_editor_that_can_not_edit_at_all_is_an_error(
    bed: DigitsBed, tmp_path: Path, breaking: Callable[..., None]
) -> None:
    breaking(raise_at=1)
    with pytest.raises(EditError, match=r"breaking failed at each of 1 edits; the first: _?LinAlgError: singular"):
        run_lab(bed, "breaking", edits=1, seed=0, run=tmp_path / "run")


def test_what_the_stream_itself_asks_to_change_need_not_stay(bed: DigitsBed) -> None:
    one, two = bed.stream(0, 2)
    model, place = bed.load(), SCORES.index("image_locality")
    kind = digits.kind_of(two.src)
    clash = replace(one, m_loc=f"{two.image.partition('~')[0]}~5", m_loc_q=kind.phrasings[-1])
    assert bed.originals(model, [clash]).outcomes(model, [0])[0, place] == 1
    assert math.isnan(bed.originals(model, [clash, two]).outcomes(model, [0])[0, place])


def test_drift_is_measured_whatever_the_probes(bed: DigitsBed, tmp_path: Path) -> None:
    rows = [run_lab(bed, "mend", edits=2, seed=0, run=tmp_path / tier, probes=tier) for tier in ("light", "default")]
    run = sl.load(tmp_path / "default")
    read = [run.series("drift.ratio", site)[-1] for site in run.sites_of("drift.ratio")]
    assert rows[0].drift_ratio == rows[1].drift_ratio == pytest.approx(max(read), rel=1e-5)


def test_compare_from_the_command_line(tmp_path: Path) -> None:
    rows_file, runs = tmp_path / "out.json", tmp_path / "runs"
    arguments = ["lab", "compare", "--editors", "mend, finetune", "--seeds", "0,1", "--edits", "3"]
    arguments += ["--json", str(rows_file), "--runs", str(runs), "--probes", "light"]
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 0, done.output
    rows = json.loads(rows_file.read_text())
    assert [(row["editor"], row["seed"]) for row in rows] == [
        ("mend", 0), ("mend", 1), ("finetune", 0), ("finetune", 1),
    ]  # fmt: skip
    for row in rows:
        assert list(row)[: len(NAMED)] == NAMED
        assert row["model"] == "blip2-digits"
        assert row["edits"] == 3
        assert row["edits_per_s"] > 0
        assert len(sl.load(row["run"])) == 3
    assert str(runs) in done.output
    for word in ("mend", "finetune", "kept", "drift"):
        assert word in done.output
    again = CliRunner().invoke(cli.app, arguments)
    assert isinstance(again.exception, RunError)
    assert json.loads(rows_file.read_text()) == rows


def test_run_from_the_command_line(tmp_path: Path) -> None:
    done = CliRunner().invoke(
        cli.app, ["lab", "run", "--editor", "mend+clip", "--edits", "2", "--seed", "7", "--run", str(tmp_path / "r")]
    )
    assert done.exit_code == 0, done.output
    run = sl.load(tmp_path / "r")
    assert run.manifest["config"] | {"seed": 7, "edits": 2, "editor": "mend+clip"} == run.manifest["config"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "--editor", "romee"], "did you mean 'rome'"),
        (["run", "--editor", "mend", "--model", "blip2-digit"], "did you mean 'blip2-digits'"),
        (["run", "--editor", "mend", "--text", "x.txt"], "--text is for language models"),
        (["compare", "--editors", "mend,mend"], "given twice"),
        (["compare", "--editors", ","], "no editor given"),
        (["compare", "--seeds", "0,x"], "'x' is no seed"),
        (["compare", "--edits", "2000"], "n=2000 edits"),
        (["compare", "--seeds", "99999999999999999999999"], "is no seed"),
        (["compare", "--editors", "finetune,grace+ball", "--edits", "1"], "GRACE moves no weight"),
        (["compare", "--json", "."], "is a folder"),
        (["run", "--editor", "mend", "--json", "/proc/none/out.json"], "can't be written"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli.app, ["lab", *arguments])
    assert isinstance(done.exception, StabilityLabError), done.output
    assert says in str(done.exception)
    assert "\n" not in str(done.exception)
    assert not list(tmp_path.iterdir())


def record(**fields: str) -> dict[str, str]:
    return {**vars(digits.edit_stream(0, 1)[0]), **fields}


def test_records_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "records.json"
    known = [vars(each) for each in digits.edit_stream(5, 6)]
    file.write_text(json.dumps(known))
    bed = DigitsBed(data=file)
    drawn = [vars(each) for each in bed.stream(0, 6)]
    assert sorted(map(str, drawn)) == sorted(map(str, known))
    assert [vars(each) for each in bed.stream(0, 2)] == drawn[:2]
    assert [vars(each) for each in bed.stream(1, 6)] != drawn
    with pytest.raises(UsageError, match=r"7 edits were asked for; .* holds 6"):
        bed.stream(0, 7)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"image": "val2014/COCO.jpg"}, r"record 1, field 'image': no image 'val2014/COCO.jpg'"),
        ({"src": "which colour is this ?"}, r"record 1, field 'src': the word 'colour'"),
        ({"alt": "seven eight"}, r"record 1, field 'alt': .*not one word"),
        ({"loc": ""}, r"record 1, field 'loc'"),
    ],
)
def test_a_record_that_the_digit_model_cannot_read_is_named(fields: dict[str, str], says: str, tmp_path: Path) -> None:
    file = tmp_path / "records.json"
    file.write_text(json.dumps([record(), record(**fields)]))
    with pytest.raises(RecordError, match=says):
        DigitsBed(data=file)


def test_an_empty_file_of_records(tmp_path: Path) -> None:
    file = tmp_path / "records.json"
    file.write_text("[]")
    with pytest.raises(RecordError, match="holds no record"):
        DigitsBed(data=file)


def test_rows_are_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = Row(
        editor="a", seed=0, edits=1, verdict="stable", onset_edit=None, first_nonfinite_edit=None, efficacy=1.0,
        rephrase=math.nan, image_rephrase=None, locality=1.0, retention=1.0, drift_ratio=math.inf, edits_per_s=2.0,
        model="m", perplexity=None, perplexity_before=None, failed=0, error=None, run="r",
    )  # fmt: skip
    file = tmp_path / "out.json"
    write_rows([row], file)
    first = file.read_text()
    assert json.loads(first)[0]["drift_ratio"] is None

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    linked = tmp_path / "linked.json"
    linked.symlink_to(file)
    write_rows([row], linked)
    assert linked.is_symlink()
    linked.unlink()
    monkeypatch.setattr("stabilitylab.editors.saving.os.replace", full)
    with pytest.raises(OSError, match="No space"):
        write_rows([row, row], file)
    assert file.read_text() == first
    assert list(tmp_path.iterdir()) == [file]


def test_an_editor_of_the_registry_is_an_editor(bed: DigitsBed) -> None:
    assert isinstance(registry.make("mend", bed.load(), bed), Editor)
    assert isinstance(Breaking(), Editor)
