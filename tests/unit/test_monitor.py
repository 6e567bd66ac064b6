"""Attaching: it changes nothing, leaves nothing behind, stands in nobody's way and loses nothing."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import stabilitylab as sl
from stabilitylab.errors import RunError, SiteError, UsageError
from stabilitylab.probes import probes_of
from stabilitylab.probes.base import Probe, Readings
from stabilitylab.probes.feedback import FeedbackShare, Gain
from stabilitylab.probes.gradients import Spectrum
from stabilitylab.probes.weight_pass import WeightPass
from stabilitylab.probes.weights import Update
from stabilitylab.record.readings import Metric
from tests.loops import CANARY, edit_once, hooks_on, make_model


@pytest.mark.parametrize("sites", ["[03]", "*", None], ids=str)
def test_a_watched_loop_is_bit_identical_to_an_unwatched_one(tmp_path: Path, sites: str | None) -> None:
    plain, watched = make_model(), make_model()
    torch.manual_seed(5)
    expected = [edit_once(plain) for _ in range(6)]
    torch.manual_seed(5)
    found = []
    with sl.attach(watched, sites, tmp_path / "run", canary=CANARY) as monitor:
        for _ in range(6):
            with monitor.edit():
                found.append(edit_once(watched))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), watched.parameters(), strict=True))
    assert torch.equal(torch.rand(3), (torch.manual_seed(5), [edit_once(plain) for _ in range(6)], torch.rand(3))[2])
    assert [p.requires_grad for p in watched.parameters()] == [True] * 4
    assert all(p.grad is None for p in watched.parameters())
    assert all(module.training for module in watched.modules())
    assert hooks_on(watched) == 0


def test_the_row_of_an_edit_holds_what_a_naive_reader_sees(tmp_path: Path) -> None:
    model = make_model()
    with sl.attach(model, "3", tmp_path / "run", canary=CANARY) as monitor:
        before = [model[3].weight.detach().clone()]
        for edit in range(3):
            with monitor.edit(label=f"edit {edit}"):
                edit_once(model)
            before.append(model[3].weight.detach().clone())
    run = sl.load(tmp_path / "run")
    norms = [0.0] + [(b - a).double().norm().item() for a, b in pairwise(before)]
    np.testing.assert_allclose(run.series("update.norm", "3"), norms, rtol=1e-5)
    drifts = [(w - before[0]).double().norm().item() for w in before]
    np.testing.assert_allclose(run.series("drift.norm", "3"), drifts, rtol=1e-5)
    assert [edit.label for edit in run.edits] == ["", "edit 0", "edit 1", "edit 2"]
    assert [edit.status for edit in run.edits] == ["start", "applied", "applied", "applied"]
    assert [edit.outcome for edit in run.edits] == [None, "committed", "committed", "committed"]
    assert run.present("gradient.norm", "3").tolist() == [False, True, True, True]
    assert run.present("logits.max").tolist() == [False, True, True, True]
    assert run.present("canary.kl").tolist() == [True] * 4
    assert run.series("canary.kl")[0] == 0
    assert run.complete
    assert 0 < run.probe_time_share < 1
    assert run.manifest["sites"] == ["3"]


def test_online_and_offline_diagnoses_are_the_same(tmp_path: Path) -> None:
    model = make_model()
    with sl.attach(model, "[03]", tmp_path / "run", canary=CANARY) as monitor:
        for edit in range(30):
            with monitor.edit():
                edit_once(model, rate=0.01 * 2.0**edit)
            assert monitor.diagnosis() == sl.load(tmp_path / "run").diagnosis()
    assert monitor.diagnosis().verdict != "stable"
    run = sl.load(tmp_path / "run")
    assert run.alarms[-1].verdict == run.diagnosis().verdict


def test_what_became_of_each_edit_is_observed(tmp_path: Path) -> None:
    model = make_model()
    saved = [copy.deepcopy(model.state_dict())]
    with sl.attach(model, "[03]", tmp_path / "run") as monitor:
        with monitor.edit():  # 1: restored to the originals
            edit_once(model)
        model.load_state_dict(saved[0])
        with monitor.edit():  # 2: stays
            edit_once(model)
        saved.append(copy.deepcopy(model.state_dict()))
        with monitor.edit():  # 3: rolled back to what 2 left
            edit_once(model)
        model.load_state_dict(saved[1])
        with monitor.edit():  # 4: followed by a change that no edit made
            edit_once(model)
        with torch.no_grad():
            model[0].weight.mul_(1.5)
        with monitor.edit():  # 5: starts from there
            pass
    run = sl.load(tmp_path / "run")
    outcomes = [edit.outcome for edit in run.edits[1:]]
    assert outcomes == ["restored", "committed", "rolled_back", "committed", "committed"]
    assert run.series("update.norm", "0")[5] == 0
    drift = (saved[1]["3.weight"] - saved[0]["3.weight"]).norm().item()
    assert run.series("drift.norm", "3")[2] == pytest.approx(drift, rel=1e-5)
    assert [note.kind for note in run.notes if note.kind == "restore"] == ["restore"]


def test_the_users_exception_passes_and_the_edit_is_failed(tmp_path: Path) -> None:
    model = make_model()
    with sl.attach(model, "*", tmp_path / "run", canary=CANARY) as monitor:
        with pytest.raises(KeyError, match="mine"), monitor.edit(label="bad"):
            model(torch.randn(1, 2, 8))
            raise KeyError("mine")
        assert hooks_on(model) == 0
        with monitor.edit(label="good"):
            edit_once(model)
    first, second = sl.load(tmp_path / "run").edits[1:]
    assert (first.status, first.row.error, first.outcome) == ("failed", "KeyError: 'mine'", None)
    assert (second.status, second.outcome) == ("applied", "committed")


def test_a_probe_that_breaks_is_switched_off_and_recorded(tmp_path: Path) -> None:
    class Broken(Probe[WeightPass]):
        needs = WeightPass
        metrics: ClassVar = (Metric("broken.value", "1", "linear", "after", "", "", ""),)

        def compute(self, seen: WeightPass) -> Readings:
            raise ArithmeticError("bug of ours")

    model = make_model()
    with sl.attach(model, "3", tmp_path / "run", probes=[Broken(), *probes_of("default")]) as monitor:
        for _ in range(3):
            with monitor.edit():
                edit_once(model)
    run = sl.load(tmp_path / "run")
    notes = [note.says for note in run.notes if note.kind == "probe-off"]
    assert notes == ["probe Broken switched off: ArithmeticError: bug of ours"]
    assert run.present("update.norm", "3").all()


def test_a_run_that_is_resumed_goes_on_in_the_next_free_folder_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(3):
        with sl.attach(make_model(), "3", tmp_path / "run", resume=True) as monitor, monitor.edit():
            pass
        assert monitor.path == tmp_path / ("run", "run-2", "run-3")[number]
        said = [note.says for note in sl.load(monitor.path).notes if note.kind == "resumed"]
        assert all(str(monitor.path) in each and each in caplog.text for each in said)
        assert len(said) == (number > 0)


def test_a_canary_that_breaks_is_switched_off(tmp_path: Path) -> None:
    model = make_model()
    answers = iter([True])

    def canary(model: nn.Module) -> Any:
        return model(CANARY) if next(answers, False) else "no logits"

    with sl.attach(model, "3", tmp_path / "run", canary=canary) as monitor, monitor.edit():
        edit_once(model)
    run = sl.load(tmp_path / "run")
    assert [note.kind for note in run.notes] == ["canary-off"]
    assert run.present("update.norm", "3").all()
    assert "as far as it was watched: canary switched off: ValueError" in run.diagnosis().says
    assert run.diagnosis().to_json() == monitor.diagnosis().to_json()


def test_a_canary_that_can_not_be_run_is_an_error_before_the_first_edit_and_leaves_no_run(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the canary can't be run"):
        sl.attach(make_model(), "3", tmp_path / "run", canary=torch.randn(2, 99))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "canary", [CANARY, lambda model: model(CANARY), {"input": CANARY}, "replay"], ids=["ids", "call", "dict", "replay"]
)
def test_each_form_of_canary(tmp_path: Path, canary: object) -> None:
    model = make_model()
    with sl.attach(model, "3", tmp_path / "run", canary=canary) as monitor:
        for _ in range(2):
            with monitor.edit():
                edit_once(model)
    run = sl.load(tmp_path / "run")
    replay = canary == "replay" if isinstance(canary, str) else False
    assert run.present("canary.max").tolist() == [not replay, True, True]
    if not replay:
        assert run.present("canary.agreement").all()


def test_without_sites_the_first_edit_shows_what_to_watch(tmp_path: Path) -> None:
    model = make_model()
    with sl.attach(model, run=tmp_path / "run") as monitor:
        with monitor.edit():
            model(torch.randn(1, 2, 8))
        assert monitor.sites == ()
        for _ in range(2):
            with monitor.edit(), torch.no_grad():
                model[3].weight += 0.5
    run = sl.load(tmp_path / "run")
    assert run.manifest["sites"] == ["3"]
    np.testing.assert_allclose(run.series("update.norm", "3")[2:], [4.0, 4.0], rtol=1e-6)
    np.testing.assert_allclose(run.series("drift.norm", "3")[2:], [4.0, 8.0], rtol=1e-6)
    assert [(note.kind, note.says) for note in run.notes if note.kind in {"nothing-moved", "sites-discovered"}] == [
        ("nothing-moved", "edit 1 moved no parameter of the model"),
        ("sites-discovered", "edit 2 moved 3; hooks are on them from the next edit on"),
    ]


class Wrapper(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


@pytest.mark.parametrize("replace", [Wrapper, copy.deepcopy], ids=["wrapper", "clone"])
def test_a_model_that_came_back_is_watched_from_then_on(tmp_path: Path, replace: type) -> None:
    model: nn.Module = make_model()
    originals = model
    with sl.attach(model, "3", tmp_path / "run", canary=CANARY) as monitor:
        for _ in range(3):
            with monitor.edit() as edit:
                model = edit.returns(replace(model))
                edit_once(model)
    run = sl.load(tmp_path / "run")
    assert (run.series("update.norm", "3")[1:] > 0).all()
    assert (run.series("gradient.norm", "3")[2:] > 0).all()
    assert hooks_on(model) == hooks_on(originals) == 0


def test_wrap_records_each_call_and_passes_everything_through(tmp_path: Path) -> None:
    model = make_model()

    def apply(model: nn.Module, requests: list[dict], *, rate: float) -> tuple[nn.Module, dict]:
        """Docs."""
        edit_once(model, rate)
        return model, {"requests": requests}

    with sl.attach(model, "3", tmp_path / "run") as monitor:
        watched = monitor.wrap(apply, label=lambda model, requests, rate: requests[0]["prompt"])
        assert watched.__doc__ == "Docs."
        for prompt in ("a", "b"):
            returned, extra = watched(model, [{"prompt": prompt}], rate=0.1)
            assert returned is model
            assert extra == {"requests": [{"prompt": prompt}]}
    assert [edit.label for edit in sl.load(tmp_path / "run").edits] == ["", "a", "b"]


def test_two_monitors_on_one_model_see_the_same(tmp_path: Path) -> None:
    model = make_model()
    with sl.attach(model, "3", tmp_path / "a") as a, sl.attach(model, "3", tmp_path / "b") as b:
        for _ in range(2):
            with a.edit(), b.edit():
                edit_once(model)
    first, second = sl.load(tmp_path / "a"), sl.load(tmp_path / "b")
    for metric in ("update.norm", "gradient.norm", "activation.rms"):
        np.testing.assert_array_equal(first.series(metric, "3"), second.series(metric, "3"))
    assert hooks_on(model) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    model = make_model().to(dtype)
    with sl.attach(model, "[03]", tmp_path / "run") as monitor, monitor.edit():
        gradients = torch.autograd.grad(model(torch.randn(2, 3, 8, dtype=dtype)).sum(), list(model.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter -= gradient
    run = sl.load(tmp_path / "run")
    assert run.present("gradient.norm", "3")[1]
    assert run.series("weight.headroom_bits", "3")[1] < np.log2(torch.finfo(dtype).max) + 8
    assert not run.notes or {note.kind for note in run.notes} == {"logits-lag"}


def test_bad_arguments_are_named_and_write_nothing(tmp_path: Path) -> None:
    model = make_model()
    run = tmp_path / "run"
    with pytest.raises(SiteError, match="matches no layer"):
        sl.attach(model, "decoder.*", run)
    with pytest.raises(UsageError, match="expected a dict of model arguments"):
        sl.attach(model, "3", run, canary="reply")
    with pytest.raises(UsageError, match=r"expected a torch\.nn\.Module"):
        sl.attach("model", "3", run)
    with pytest.raises(UsageError, match="expected 'light', 'default', 'deep' or a list"):
        sl.attach(model, "3", run, probes="lite")
    assert not run.exists()
    with sl.attach(model, "3", run):
        pass
    with pytest.raises(RunError, match="exists; expected a new one"):
        sl.attach(model, "3", run)


def test_edits_do_not_nest_and_end_with_the_run(tmp_path: Path) -> None:
    model = make_model()
    with sl.attach(model, "3", tmp_path / "run") as monitor:
        with pytest.raises(UsageError, match="an edit is open already"), monitor.edit(), monitor.edit():
            pass
        with monitor.edit() as edit, pytest.raises(UsageError, match=r"expected the torch\.nn\.Module"):
            edit.returns((model, {}))
    with pytest.raises(UsageError, match="closed"):
        monitor.edit()
    monitor.close()


def test_a_site_that_disappears_is_named(tmp_path: Path) -> None:
    model = make_model()
    with sl.attach(model, "[03]", tmp_path / "run") as monitor:
        for _ in range(2):
            with monitor.edit():
                model[3] = nn.Identity()
    run = sl.load(tmp_path / "run")
    assert [note.says for note in run.notes if note.kind == "skipped-site"] == ["3: no longer found in Sequential"]
    assert run.present("update.norm", "3").tolist() == [True, False, False]


def test_light_keeps_no_copies_and_says_what_that_costs(tmp_path: Path) -> None:
    model = make_model()
    with sl.attach(model, "[03]", tmp_path / "run", probes="light") as monitor:
        for _ in range(3):
            with monitor.edit():
                edit_once(model)
    run = sl.load(tmp_path / "run")
    assert run.series("weight.norm", "3")[-1] == pytest.approx(model[3].weight.double().norm().item(), rel=1e-6)
    assert not run.sites_of("update.norm")
    assert "no-references" in {note.kind for note in run.notes}
    assert all(edit.outcome is None for edit in run.edits)


def test_a_probe_measures_at_its_cadence_and_its_sites_only(tmp_path: Path) -> None:
    model = make_model()
    probes = [Update(every=2), Spectrum(sites="3", every=3)]
    with sl.attach(model, "[03]", tmp_path / "run", probes=probes) as monitor:
        for _ in range(4):
            before = model[0].weight.detach().clone()
            with monitor.edit():
                edit_once(model)
            moved = (model[0].weight.detach() - before).double().norm().item()
    run = sl.load(tmp_path / "run")
    assert run.present("update.norm", "0").tolist() == [True, False, True, False, True]
    assert run.series("update.norm", "0")[-1] == pytest.approx(moved, rel=1e-5)  # of this edit, not of the last two
    assert run.sites_of("gradient.spectrum") == ("3",)
    assert run.present("gradient.spectrum").tolist() == [False, False, False, True, False]


def test_a_list_of_probes_is_checked(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected instances of Probe"):
        sl.attach(make_model(), "3", tmp_path / "run", probes=[Update])
    with pytest.raises(UsageError, match=r"two probes emit 'update\.norm'"):
        sl.attach(make_model(), "3", tmp_path / "run", probes=[Update(), Update(every=3)])
    assert not (tmp_path / "run").exists()


def test_deep_probes_measure_each_tenth_edit(tmp_path: Path) -> None:
    model = make_model()
    with sl.attach(model, "3", tmp_path / "run", probes="deep") as monitor:
        for _ in range(11):
            with monitor.edit():
                edit_once(model)
            if monitor.edits == 10:
                tenth = np.linalg.cond(model[3].weight.detach().double().numpy())
    run = sl.load(tmp_path / "run")
    assert run.edit_numbers[run.present("weight.condition_number")].tolist() == [0, 10]
    assert run.series("weight.condition_number")[10] == pytest.approx(tenth, rel=1e-5)
    assert run.edit_numbers[run.present("gradient.cosine_previous")].tolist() == [10]
    assert run.present("update.norm").all()
    assert run.present("weight.spectral_norm").all()


def test_gain_counts_edits_and_not_readings(tmp_path: Path) -> None:
    model = make_model()
    with sl.attach(model, "3", tmp_path / "run", probes=[Update(every=2), Gain()]) as monitor:
        for edit in range(1, 15):
            with monitor.edit(), torch.no_grad():
                model[3].weight += 2.0**edit
    run = sl.load(tmp_path / "run")
    # Edit 0 moves nothing: its zero has no logarithm, so there is no gain until it has left the window of six readings.
    assert run.edit_numbers[run.present("feedback.gain")].tolist() == [12, 14]
    np.testing.assert_allclose(run.series("feedback.gain")[[12, 14]], np.log(2), rtol=1e-3)


@pytest.mark.parametrize("tier", ["light", "default", "deep"])
def test_a_loop_under_autocast_is_measured_in_full_precision(tmp_path: Path, tier: str) -> None:
    def play(model: nn.Module, monitor: sl.Monitor | None) -> Tensor:
        torch.manual_seed(5)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for _ in range(11):
                with monitor.edit() if monitor else nullcontext():
                    logits = edit_once(model, rate=1.0)
        return logits

    plain, watched = make_model(), make_model()
    expected = play(plain, None)
    with sl.attach(watched, "[03]", tmp_path / "run", probes=tier, canary=CANARY) as monitor:
        assert torch.equal(play(watched, monitor), expected)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), watched.parameters(), strict=True))
    run = sl.load(tmp_path / "run")
    off = [note.says for note in run.notes if note.kind == "probe-off"]
    # This model's output holds no loss, which the deep tier's share of feedback needs; nothing else may be off.
    assert [says.partition(" switched off")[0] for says in off] == (["feedback"] if tier == "deep" else [])
    assert run.present("weight.norm", "3").all()
    if tier != "light":
        exact = torch.linalg.matrix_norm(watched[3].weight.detach().double(), 2).item()
        assert run.series("weight.spectral_norm", "3")[-1] == pytest.approx(exact, rel=0.01)


def test_one_measurement_that_breaks_takes_no_other_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ArithmeticError("no convergence")

    monkeypatch.setattr("stabilitylab.watching.instruments.weights.start_direction", broken)
    monkeypatch.setattr("stabilitylab.probes.gradient_factors._singular_values", broken)
    model = make_model()
    with sl.attach(model, "3", tmp_path / "run") as monitor:
        for _ in range(2):
            with monitor.edit():
                edit_once(model)
    run = sl.load(tmp_path / "run")
    assert run.present("update.norm", "3").all()
    assert run.present("activation.rms", "3")[1:].all()
    assert not run.sites_of("weight.spectral_norm")
    assert not run.sites_of("gradient.norm")
    assert len([note for note in run.notes if note.kind == "probe-off"]) == 2


def test_the_share_of_feedback_is_of_the_edits_and_not_of_the_loss(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=20, n_positions=8)).eval()
    layer, ids = model.transformer.h[0].mlp.c_fc, torch.arange(8)[None]
    with sl.attach(model, "*.mlp.c_fc", tmp_path / "run", probes=[FeedbackShare(every=1)]) as monitor:
        for _ in range(2):
            with monitor.edit():
                (model(input_ids=ids, labels=ids).loss * 65_536).backward()  # as a gradient scaler does
                with torch.no_grad():
                    layer.weight.mul_(20.0)
    share = sl.load(tmp_path / "run").series("feedback.share")
    assert share[1] == pytest.approx(0, abs=1e-6)
    assert abs(share[2]) > 0.01


def test_a_report_of_another_type_or_for_another_layer_is_said(tmp_path: Path) -> None:
    model = make_model()
    with sl.attach(model, "3", tmp_path / "run") as monitor, monitor.edit() as edit:
        with pytest.raises(UsageError, match=r"got a dict; expected a stabilitylab\.EditorReport"):
            edit.report("3", {"update": 1})
        edit.report("3.weight", sl.EditorReport(update=torch.ones(4, 16)))
        edit_once(model)
    says = [note.says for note in sl.load(tmp_path / "run").notes if note.kind == "skipped-site"]
    assert says == ["3.weight: an update was reported for it, but it is not watched"]


def test_how_many_singular_values_are_kept_is_a_setting(tmp_path: Path) -> None:
    model = make_model()
    with sl.attach(model, "3", tmp_path / "run", probes=[Spectrum(top=2)]) as monitor, monitor.edit():
        edit_once(model)
    (_, edit) = sl.load(tmp_path / "run").edits
    assert edit.row.readings[("gradient.spectrum", "3")].shape == (2,)
    with pytest.raises(UsageError, match="from 1 to 32"):
        Spectrum(top=33)


class CallsWithCache(nn.Module):
    """A model whose call is given an object that it changes, as a key-value cache."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, x: Tensor, cache: list[Tensor]) -> Tensor:
        cache.append(x)
        y: Tensor = self.layer(x)
        return y


def test_a_call_whose_arguments_may_change_is_not_replayed(tmp_path: Path) -> None:
    model, cache = CallsWithCache(), []
    with sl.attach(model, "layer", tmp_path / "run", canary="replay") as monitor, monitor.edit():
        model(torch.randn(2, 8), cache)
    assert len(cache) == 1
    assert "which calling again might change" in "".join(note.says for note in sl.load(tmp_path / "run").notes)
