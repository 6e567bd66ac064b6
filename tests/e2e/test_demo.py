"""The main job: MEND on BLIP2-OPT, edit after edit, to NaN, seen coming, and nothing changed by watching."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor

import stabilitylab as sl
from stabilitylab.editors.mend import Mend
from stabilitylab.errors import RunError
from stabilitylab.probes import (
    Absorption,
    Codebook,
    HitShare,
    KeyCache,
    NullSpace,
    SideMemory,
    UpdateDenominator,
    ValueClamp,
    ValueRatio,
)
from stabilitylab.record.run import Run
from stabilitylab.testbed import blip2_digits, digits
from stabilitylab.testbed.demo import EDITS_PAST_NAN, run_demo
from stabilitylab.testbed.mend_data import shipped
from tests.loops import hooks_on

pytest.importorskip("sklearn", reason="the demo's digits need scikit-learn: pip install stabilitylab[demo]")


def edited(folder: Path | None) -> tuple[list[Tensor], list[Tensor], int]:
    """Weights, canary logits after each edit, and hooks left, of the demo's own loop with or without a monitor."""
    torch.manual_seed(0)
    model, tokenizer = blip2_digits.load("fp16")
    mend, canary, seen = shipped(Mend, model), blip2_digits.canary(tokenizer), []
    monitor = sl.attach(model, mend.sites, folder, editor=mend, canary=canary, tensorboard=True) if folder else None
    for record in digits.edit_stream(1, 8):
        if monitor is None:
            mend.edit(model, record)
        else:
            with monitor.edit(label=record.src) as edit:
                assert edit.returns(mend.edit(model, record)) is model
        with torch.no_grad():
            seen.append(model(**canary).logits)
    if monitor is not None:
        monitor.close()
    return [tensor.clone() for tensor in model.state_dict().values()], seen, hooks_on(model) + hooks_on(mend)


def test_weights_and_logits_are_bit_identical_with_and_without_the_monitor(tmp_path: Path) -> None:
    plain, watched = edited(None), edited(tmp_path / "run")
    for expected, found in zip(plain[0] + plain[1], watched[0] + watched[1], strict=True):
        assert torch.equal(expected.nan_to_num(7.0), found.nan_to_num(7.0))
    assert plain[2] == watched[2]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, str]:
    printed = io.StringIO()
    out = tmp_path_factory.mktemp("runs") / "demo"
    run = run_demo(out, edits=60, seed=8, precision="fp16", console=Console(file=printed, width=80))
    return run, printed.getvalue()


def test_the_values_reach_nan_by_themselves_and_were_seen_coming(demo: tuple[Run, str]) -> None:
    run, _ = demo
    diagnosis = run.diagnosis()
    first = diagnosis.first_nonfinite_edit
    assert diagnosis.verdict == "non-finite"
    assert first is not None
    assert len(run) == first + EDITS_PAST_NAN
    assert diagnosis.onset_edit is not None
    assert diagnosis.onset_edit < first
    assert diagnosis.alarm_edit is not None
    assert diagnosis.alarm_edit <= first
    assert diagnosis.first_bad_site is not None
    assert run.series("canary.nonfinite")[-1] > 0
    assert run.alarms[-1].verdict == "non-finite"
    assert all(edit.outcome == "committed" for edit in run.edits[1:])


OF_OTHER_EDITORS = (NullSpace, HitShare, ValueRatio, ValueClamp, UpdateDenominator, Codebook, SideMemory, KeyCache)


def test_everything_that_a_mend_run_can_show_was_read(demo: tuple[Run, str]) -> None:
    run, _ = demo
    read = {metric for edit in run.edits for metric, _ in edit.row.readings}
    # One forward and one backward an edit, so nothing of later passes; and what other editors have and MEND has not.
    of_later_passes = {name for name in (metric.name for metric in run.metrics) if name.endswith(("_last", "_worst"))}
    of_others = {metric.name for probe in (Absorption, *OF_OTHER_EDITORS) for metric in probe.metrics}
    # Its gradients are functional: no optimizer steps, nothing is accumulated. And nothing beside its layers is spoilt.
    of_steps = {
        f"gradient.{name}"
        for name in ("norm_stepped", "learning_rate", "ascends", "loss_scale", "nonfinite_steps", "carried")
    }
    of_others |= of_steps | {"state.nonfinite"}
    # No unit of its statistics is without a spread, so none is listed.
    assert not any(run.series("editor.std_zeros", site).any() for site in run.sites_of("editor.std_zeros"))
    assert read == {metric.name for metric in run.metrics} - of_later_passes - of_others - {"editor.zero_units"}
    layers = "language_model.model.decoder.layers"
    assert {note.says for note in run.notes} == {
        f"editor.transforms.256x64 serves {layers}.1.fc1, {layers}.2.fc1",
        f"editor.transforms.64x256 serves {layers}.1.fc2, {layers}.2.fc2",
    }


def test_it_prints_the_verdict_and_where_to_look(demo: tuple[Run, str]) -> None:
    run, printed = demo
    assert "non-finite" in printed
    assert str(run.path / "report.html") in printed
    assert f"tensorboard --logdir {run.path.parent}" in printed
    assert (run.path / "report.html").stat().st_size > 100_000
    assert list(run.path.glob("events.out.tfevents.*"))


def test_what_a_scan_says_beforehand_is_what_the_run_ends_at(demo: tuple[Run, str]) -> None:
    run, _ = demo
    scanned = sl.scan(run.path / "model", editor=run.path / "editor" / "mend.safetensors")
    (told,) = scanned.cautions
    assert (told.rule, told.urgency) == ("float16", "risk")
    assert [each.zero.count for each in scanned.figures.statistics] == [0] * 4  # so what drives it there is the loop
    limits = [link for link in run.diagnosis().causes if link.role == "limit"]
    assert limits
    assert "float16" in limits[0].says
    page = (run.path / "report.html").read_text()
    assert "Known before edit 1" in page
    assert f"came true at edit {limits[0].edit}" in page


def test_it_replaces_an_earlier_demo_and_nothing_else(tmp_path: Path) -> None:
    console = Console(file=io.StringIO())
    for _ in range(2):
        assert len(run_demo(tmp_path / "demo", edits=1, seed=0, precision="fp32", console=console)) == 1
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="is no demo run"):
        run_demo(tmp_path / "mine", edits=1, seed=0, precision="fp32", console=console)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"
