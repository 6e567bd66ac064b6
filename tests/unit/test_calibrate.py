"""`Monitor.calibrate`: dry edits are measured, undone bit by bit, and leave the run as it would be without them."""

from __future__ import annotations

import copy
import io
import random
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

import stabilitylab as sl
from stabilitylab.editors.alphaedit import AlphaEdit
from stabilitylab.editors.grace import Grace
from stabilitylab.editors.registry import make
from stabilitylab.editors.rome import Rome
from stabilitylab.errors import EditError, UsageError
from stabilitylab.record.readings import MODEL_SITE
from stabilitylab.record.run import Run, load
from stabilitylab.testbed.digits_bed import DigitsBed
from stabilitylab.testbed.lab import prepare
from stabilitylab.watching.instruments.transfer import Shipment
from stabilitylab.watching.snapshot import RandomStates, take
from tests import key_value
from tests.loops import CANARY, edit_once, hooks_on, make_model

REQUESTS = [f"request {number}" for number in range(30)]


def edit(model: nn.Module, request: object) -> None:
    edit_once(model, rate=0.01)


def state(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


def assert_same(model: nn.Module, before: dict[str, Tensor]) -> None:
    now = model.state_dict()
    assert list(now) == list(before)
    for name, tensor in now.items():
        assert tensor.numpy().tobytes() == before[name].numpy().tobytes(), name


def kinds(run: Run) -> list[str]:
    return [note.kind for note in run.notes]


# -- a run with dry edits ---------------------------------------------------------------------------------------------


def watched(folder: Path, calibrated: bool, sites: str | None, canary: Any = CANARY) -> tuple[nn.Module, sl.Monitor]:
    torch.manual_seed(3)
    model = make_model()
    with sl.attach(model, sites, folder, canary=canary) as monitor:
        if calibrated:
            monitor.calibrate(edit, REQUESTS, 12)
        for request in REQUESTS[:10]:
            with monitor.edit(label=request):
                edit(model, request)
    return model, monitor


@pytest.mark.parametrize("sites", ["[03]", None])
def test_the_runs_own_rows_are_bit_identical_to_those_of_a_run_without(tmp_path: Path, sites: str | None) -> None:
    with_it, _ = watched(tmp_path / "with", True, sites)
    without, _ = watched(tmp_path / "without", False, sites)
    assert_same(with_it, without.state_dict())
    one, other = load(tmp_path / "with"), load(tmp_path / "without")
    assert (len(one.dry_edits), len(other.dry_edits)) == (12, 0)
    assert one.sites == other.sites
    for left, right in zip(one.edits, other.edits, strict=True):
        assert (left.label, left.status, left.outcome) == (right.label, right.status, right.outcome)
        assert left.row.readings.keys() == right.row.readings.keys()
        for key, values in left.row.readings.items():
            assert values.tobytes() == right.row.readings[key].tobytes(), (left.edit, key)


def test_rows_that_are_read_one_edit_late_as_on_an_accelerator_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched(tmp_path / "at once", True, "[03]")
    monkeypatch.setattr(Shipment, "is_here", property(lambda _: False))
    watched(tmp_path / "late", True, "[03]")
    one, other = load(tmp_path / "at once"), load(tmp_path / "late")
    assert len(one.dry_edits) == len(other.dry_edits) == 12
    for left, right in zip(one.dry_edits, other.dry_edits, strict=True):
        assert left.readings.keys() == right.readings.keys()
        for key, values in left.readings.items():
            assert values.tobytes() == right.readings[key].tobytes(), (left.edit, key)


@pytest.mark.parametrize("sites", ["[03]", None])
def test_each_dry_edit_is_measured_from_the_same_state(tmp_path: Path, sites: str | None) -> None:
    watched(tmp_path / "run", True, sites, canary=sl.Canary(CANARY, every=50))
    run = load(tmp_path / "run")
    assert [row.edit for row in run.dry_edits] == list(range(1, 13))
    for row in run.dry_edits:
        assert row.status == "applied"
        moved, away = row.scalar("update.norm", "3"), row.scalar("drift.norm", "3")
        assert moved is not None
        assert moved == away > 0
        assert row.scalar("canary.max", MODEL_SITE) is not None
    assert run.dry_edits[0].readings[("update.norm", "3")] != run.dry_edits[1].readings[("update.norm", "3")]
    hooked = [row for row in run.dry_edits if ("gradient.norm", "3") in row.readings]
    assert len(hooked) == 12 - (sites is None)


def test_the_baseline_is_that_of_the_dry_edits_online_and_offline(tmp_path: Path) -> None:
    model = make_model()
    with sl.attach(model, "[03]", tmp_path / "run", canary=CANARY) as monitor:
        assert monitor.diagnosis().baseline == "none yet"
        monitor.calibrate(edit, REQUESTS)
        assert monitor.diagnosis().baseline == "20 dry edits"
        assert load(tmp_path / "run").diagnosis() == monitor.diagnosis()
        for number in range(6):
            with monitor.edit():
                edit_once(model, rate=0.01 * 30.0**number)
            assert load(tmp_path / "run").diagnosis() == monitor.diagnosis()
    said = monitor.diagnosis()
    assert said.baseline == "20 dry edits"
    assert {"jump", "growth", "drift"} & {finding.rule for finding in said.findings}, "without them, it has no baseline"
    run = load(tmp_path / "run")
    assert kinds(run).count("calibrated") == 1
    assert "20 dry edits in " in next(note.says for note in run.notes if note.kind == "calibrated")


def test_what_breaks_in_a_dry_edit_is_said(tmp_path: Path) -> None:
    sound = iter(range(2))  # at attach, and before the first dry edit

    def canary(model: nn.Module) -> Any:
        return "no logits" if next(sound, None) is None else model(torch.ones(1, 8))

    with sl.attach(make_model(), "[03]", tmp_path / "run", canary=sl.Canary(canary)) as monitor:
        monitor.calibrate(edit, REQUESTS)
    assert any(note.says.startswith("in the dry edits, ") for note in load(tmp_path / "run").notes)


# -- everything is put back -------------------------------------------------------------------------------------------


class Model(nn.Module):
    """With a buffer, tied weights, a NaN and a frozen parameter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.fc = nn.Linear(8, 8)
        self.tied = nn.Linear(8, 8)
        self.tied.weight = self.fc.weight
        self.head = nn.Linear(8, 4)
        self.frozen = nn.Parameter(torch.tensor([1.0, -0.0, float("nan")]), requires_grad=False)
        self.register_buffer("seen", torch.zeros(3, dtype=torch.long))
        self.names = {"of": ["a", "b"]}
        self.head.weight.grad = torch.full((4, 8), 2.0)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.tied(self.fc(x)))
        return out


class Editor:
    """Does to a model and to itself all that an editor may do."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.cache = torch.ones(4, 4)
        self.array = np.arange(4.0)
        self.history: list[Tensor] = []
        self.counts = {"edits": 0}
        self.draws = np.random.default_rng(3)
        self.optimiser = torch.optim.Adam(model.head.parameters(), lr=0.01)

    def edit(self, model: Model, request: object) -> Model:
        self.optimiser.zero_grad()
        model(torch.randn(5, 8)).pow(2).mean().backward()
        self.optimiser.step()
        with torch.no_grad():
            model.fc.weight += random.random() + np.random.rand() + float(self.draws.random())  # noqa: NPY002
            model.frozen.copy_(torch.tensor([2.0, 0.0, 1.0]))
            model.seen += 1
            self.cache += model.head.weight @ model.head.weight.T
        model.head.weight.data = model.head.weight.data.double().float()
        model.frozen.requires_grad_(True)
        model.fc.bias.grad = torch.ones(8)
        model.eval()
        model.names["of"].append("c")
        model.head = nn.Sequential(model.head, nn.Identity())
        model.register_buffer("new", torch.zeros(1))
        model.register_forward_hook(lambda *_: None)
        del model.tied
        model.tied = nn.Linear(8, 8)
        self.array += 1
        self.history.append(self.cache.clone())
        self.counts["edits"] += 1
        self.last = request
        return model


def everything(model: Model, editor: Editor) -> dict[str, Any]:
    names = {name: id(module) for name, module in model.named_modules(remove_duplicate=False)}
    return {
        "modules": names,
        "modes": {name: module.training for name, module in model.named_modules(remove_duplicate=False)},
        "parameters": {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)},
        "places": {name: p.data_ptr() for name, p in model.named_parameters(remove_duplicate=False)},
        "bits": {name: t.numpy().tobytes() for name, t in model.state_dict().items()},
        "requires": {name: p.requires_grad for name, p in model.named_parameters()},
        "grads": {name: None if p.grad is None else p.grad.numpy().tobytes() for name, p in model.named_parameters()},
        "names": copy.deepcopy(model.names),
        "hooks": hooks_on(model),
        "editor": (editor.cache.numpy().tobytes(), editor.array.tobytes(), len(editor.history), dict(editor.counts)),
        "attributes": set(editor.__dict__),
        "optimiser": {id(p): str(held) for p, held in editor.optimiser.state.items()},
        "draws": editor.draws.bit_generator.state,
        "random": (random.getstate(), torch.get_rng_state().numpy().tobytes(), str(np.random.get_state())),  # noqa: NPY002
    }


@pytest.mark.parametrize("given", ["editor=", "a bound method alone", "both"])
def test_all_that_an_editor_may_change_is_put_back(tmp_path: Path, given: str) -> None:
    model = Model()
    editor = Editor(model)
    before = everything(model, editor)
    apply: Callable[..., object] = editor.edit
    if given == "editor=":

        def apply(model: Model, request: object) -> object:
            return editor.edit(model, request)

    attached = None if given == "a bound method alone" else editor
    with sl.attach(model, "fc", tmp_path / "run", editor=attached) as monitor:
        monitor.calibrate(apply, REQUESTS, 8)
        assert everything(model, editor) == before
        assert editor.optimiser.param_groups[0]["params"][0] is model.head.weight
    assert len(load(tmp_path / "run").dry_edits) == 8


def test_what_an_optimiser_has_gathered_is_put_back_in_place(tmp_path: Path) -> None:
    model = make_model()
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)

    def step(model: nn.Module, request: object) -> None:
        optimiser.zero_grad()
        model(torch.randn(2, 8)).pow(2).mean().backward()
        optimiser.step()

    step(model, "before")
    moment = optimiser.state[model[0].weight]["exp_avg"]
    before = moment.clone()
    with sl.attach(model, "[03]", tmp_path / "run", editor=optimiser) as monitor:
        monitor.calibrate(step, REQUESTS, 8)
    assert optimiser.state[model[0].weight]["exp_avg"] is moment
    assert torch.equal(moment, before)
    assert float(optimiser.state[model[0].weight]["step"]) == 1.0


def test_a_clone_that_comes_back_is_measured_and_not_edited_on(tmp_path: Path) -> None:
    model = make_model()
    before = state(model)

    def on_a_clone(model: nn.Module, request: object) -> tuple[nn.Module, str]:
        clone = copy.deepcopy(model)
        edit_once(clone)
        return clone, "more"

    with sl.attach(model, "[03]", tmp_path / "run") as monitor:
        monitor.calibrate(on_a_clone, REQUESTS, 8)
        with monitor.edit():
            edit_once(model)
    run = load(tmp_path / "run")
    for row in run.dry_edits:
        assert row.scalar("update.norm", "0") == row.scalar("drift.norm", "0") != 0
    assert run.series("update.norm", "0")[-1] > 0
    assert not torch.equal(model.state_dict()["0.weight"], before["0.weight"])


def test_what_can_not_be_put_back_is_named_and_all_else_is_put_back(tmp_path: Path) -> None:
    class Stuck(list[Any]):
        def clear(self) -> None:
            raise RuntimeError("stuck")

    model = nn.Sequential(nn.Linear(4, 4))
    model.kept = Stuck([1])
    before = state(model)

    def apply(model: Any, request: object) -> None:
        with torch.no_grad():
            model[0].weight += 1
        model.kept.append(2)

    with sl.attach(model, "0", tmp_path / "run") as monitor:
        with pytest.raises(EditError, match=r"dry edit 1 can't be undone: 'kept' could not be put back") as raised:
            monitor.calibrate(apply, REQUESTS)
        assert "\n" not in str(raised.value)
        assert_same(model, before)
    run = load(tmp_path / "run")
    assert run.dry_edits == ()
    assert "calibrated" not in kinds(run)


@pytest.mark.parametrize("error", [RuntimeError("no such fact"), KeyboardInterrupt()])
def test_what_apply_raises_passes_when_everything_is_put_back(tmp_path: Path, error: BaseException) -> None:
    model = Model()
    editor = Editor(model)
    before = everything(model, editor)

    def fails(model: Model, request: str) -> None:
        editor.edit(model, request)
        if request == REQUESTS[9]:
            raise error

    with sl.attach(model, "fc", tmp_path / "run", editor=editor) as monitor:
        threads = threading.active_count()
        with pytest.raises(type(error)) as raised:
            monitor.calibrate(fails, REQUESTS)
        assert raised.value is error
        assert everything(model, editor) == before
        assert threading.active_count() == threads
        assert monitor.diagnosis().baseline == "none yet"
        assert load(tmp_path / "run").dry_edits == ()
        monitor.calibrate(editor.edit, REQUESTS, 8)  # what was wrong may be mended
    run = load(tmp_path / "run")
    assert len(run.dry_edits) == 8
    assert len(run.edits) == 1


# -- editors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mend", "mend+ball"])
def test_mend_in_half_precision_is_undone_in_the_middle_of_its_work(tmp_path: Path, name: str) -> None:
    bed = DigitsBed("fp16")
    model, requests = bed.load(), bed.stream(3, 10)
    editor = make(name, model, bed)
    prepare(editor, model, bed)
    editor.edit(model, requests[0])
    twin = copy.deepcopy((model, editor))
    before, drawn = state(model), torch.get_rng_state()
    with sl.attach(model, editor.sites, tmp_path / "run", editor=editor, canary=bed.canary()) as monitor:
        monitor.calibrate(editor.edit, requests[1:], 8)
    assert_same(model, before)
    assert torch.equal(drawn, torch.get_rng_state())
    assert_same(editor.edit(model, requests[9]), twin[1].edit(twin[0], requests[9]).state_dict())


def test_alphaedits_cache_is_as_before(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = key_value.llama()
    editor = AlphaEdit.for_model(model, locate=key_value.locate, layers=[1, 2])
    editor.prepare(model, key_value.Texts(), seed=0)
    requests = key_value.requests(9)
    editor.edit(model, requests[0])
    cache, before = editor.cache_c, state(model)
    assert cache is not None
    bits = cache.clone()
    with sl.attach(model, list(editor.sites), tmp_path / "run", editor=editor) as monitor:
        monitor.calibrate(editor.edit, requests[1:], 8)
    assert editor.cache_c is cache
    assert torch.equal(cache, bits)
    assert bits.count_nonzero() > 0
    assert_same(model, before)
    updates = [row.scalar("update.norm", editor.sites[0]) for row in load(tmp_path / "run").dry_edits]
    assert len(updates) == 8
    assert all(update is not None and update > 0 for update in updates)


def test_rome_is_undone(tmp_path: Path) -> None:
    model = key_value.gpt2()
    editor = Rome.for_model(model, locate=key_value.locate, layer=1)
    editor.prepare(model, key_value.Texts(), seed=0)
    before = state(model)
    with sl.attach(model, None, tmp_path / "run", editor=editor) as monitor:
        monitor.calibrate(editor.edit, key_value.requests(8), 8)
        assert monitor.sites == ()
    assert_same(model, before)
    assert model.training
    found = load(tmp_path / "run").dry_edits
    assert {site for row in found for metric, site in row.readings if metric == "update.norm"} == set(editor.sites)


def test_a_module_that_grace_swaps_in_is_taken_out(tmp_path: Path) -> None:
    model = key_value.llama()
    editor = Grace.for_model(model, batch_of=lambda request: first_row(key_value.locate(request).batch), steps=2)
    site = editor.sites[0]
    layer, before = model.get_submodule(site), state(model)
    with sl.attach(model, site, tmp_path / "run", editor=editor) as monitor:
        monitor.calibrate(editor.edit, key_value.requests(8), 8)
        assert model.get_submodule(site) is layer
        assert_same(model, before)
        with monitor.edit() as step:
            step.returns(editor.edit(model, key_value.requests(9)[8]))
    run = load(tmp_path / "run")
    assert [row.scalar("editor.keys", site) for row in run.dry_edits] == [1.0] * 8
    assert run.edits[-1].row.scalar("editor.keys", site) == 1.0


def first_row(batch: Any) -> dict[str, Tensor]:
    return {name: tensor[:1] for name, tensor in batch.items()}


# -- errors -----------------------------------------------------------------------------------------------------------


def test_it_comes_once_before_the_first_edit(tmp_path: Path) -> None:
    model = make_model()
    with sl.attach(model, "[03]", tmp_path / "late") as monitor:
        with monitor.edit(), pytest.raises(UsageError, match="an edit is open; expected calibrate once, before"):
            monitor.calibrate(edit, REQUESTS)
        with pytest.raises(UsageError, match="1 edit was made already"):
            monitor.calibrate(edit, REQUESTS)
    with pytest.raises(UsageError, match="the monitor is closed"):
        monitor.calibrate(edit, REQUESTS)
    with sl.attach(model, "[03]", tmp_path / "twice") as monitor:
        monitor.calibrate(edit, REQUESTS, 8)
        with pytest.raises(UsageError, match="dry edits were made already"):
            monitor.calibrate(edit, REQUESTS, 8)
    assert len(load(tmp_path / "twice").dry_edits) == 8


@pytest.mark.parametrize("n", [7, 0, -1, True, 8.0, "20"])
def test_too_few_dry_edits_make_no_baseline(tmp_path: Path, n: Any) -> None:
    with (
        sl.attach(make_model(), "[03]", tmp_path / "run") as monitor,
        pytest.raises(UsageError, match="expected a whole number of dry edits, 8 or more"),
    ):
        monitor.calibrate(edit, REQUESTS, n)


def test_too_few_requests(tmp_path: Path) -> None:
    called: list[object] = []

    def apply(model: nn.Module, request: object) -> None:
        called.append(request)
        edit(model, request)

    with sl.attach(make_model(), "[03]", tmp_path / "run") as monitor:
        with pytest.raises(UsageError, match="got 7 requests; expected 8 or more"):
            monitor.calibrate(apply, REQUESTS[:7])
        monitor.calibrate(apply, iter(REQUESTS[:9]))
    assert called == REQUESTS[:9]


def test_an_apply_that_is_wrapped_would_write_rows_of_the_run(tmp_path: Path) -> None:
    with sl.attach(make_model(), "[03]", tmp_path / "run") as monitor:
        with pytest.raises(UsageError, match=r"without monitor\.edit or monitor\.wrap"):
            monitor.calibrate(monitor.wrap(edit), REQUESTS)
        with pytest.raises(UsageError, match="an edit is open"):
            monitor.calibrate(lambda model, request: monitor.calibrate(edit, REQUESTS), REQUESTS)
    assert len(load(tmp_path / "run")) == 0


def test_without_sites_something_must_move(tmp_path: Path) -> None:
    with sl.attach(make_model(), None, tmp_path / "run") as monitor:
        with pytest.raises(EditError, match=r"none of 20 dry edits moved a parameter.*or attach\(sites=\.\.\.\)"):
            monitor.calibrate(lambda model, request: model(CANARY), REQUESTS)
        assert load(tmp_path / "run").dry_edits == ()


@pytest.mark.parametrize("where", ["model", "editor"])
def test_what_can_not_be_copied_is_named_before_anything_is_touched(tmp_path: Path, where: str) -> None:
    model, called = make_model(), []
    sparse = torch.eye(3).to_sparse()
    editor = nn.Module()
    (model if where == "model" else editor).register_buffer("odd", sparse)
    with (
        sl.attach(model, "[03]", tmp_path / "run", editor=editor) as monitor,
        pytest.raises(UsageError, match=r"odd' can't be kept and put back: it is torch.sparse_coo"),
    ):
        monitor.calibrate(lambda *_: called.append(1), REQUESTS)
    assert not called


# -- the bar ----------------------------------------------------------------------------------------------------------


def test_a_bar_is_shown_only_where_a_person_watches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    with sl.attach(make_model(), "[03]", tmp_path / "piped") as monitor:
        monitor.calibrate(edit, REQUESTS, 8)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setenv("TERM", "xterm")
    with sl.attach(make_model(), "[03]", tmp_path / "seen") as monitor:
        monitor.calibrate(edit, REQUESTS, 8)
    assert "8/8" in terminal.getvalue()


# -- the snapshot by itself -------------------------------------------------------------------------------------------


def test_a_snapshot_names_what_differs() -> None:
    model = Model()
    snapshot = take({"": model})
    assert snapshot.differences() == []
    with torch.no_grad():
        model.fc.weight[0, 0] += 1
        model.frozen[1] = 0.0  # it was -0.0
    model.seen = model.seen.clone()  # the same bits in another tensor: who holds the old one would see no change
    assert set(snapshot.differences()) == {"", "fc.weight", "frozen"}
    assert snapshot.put_back() == []
    assert model.tied.weight is model.fc.weight


class PlusOne(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight + 1


OTHER_WAYS: dict[str, Callable[[nn.Module], object]] = {
    "cast": lambda model: model.half(),
    "moved": lambda model: model.to("meta"),
    "parametrised": lambda model: register_parametrization(model[0], "weight", PlusOne()),
    "overridden": lambda model: setattr(model[0], "forward", lambda x: x),
    "replaced": lambda model: setattr(model[0], "weight", nn.Parameter(torch.zeros(16, 8))),
    "given other memory": lambda model: setattr(model[0].weight, "data", torch.zeros(2, 2)),
}


@pytest.mark.parametrize("how", OTHER_WAYS)
def test_other_ways_to_change_a_layer_are_undone(how: str) -> None:
    model = make_model().eval()
    before, parameters, said = state(model), list(model.parameters()), model(CANARY)
    snapshot = take({"": model})
    OTHER_WAYS[how](model)
    assert snapshot.differences()
    assert snapshot.put_back() == []
    assert_same(model, before)
    assert all(now is then for now, then in zip(model.parameters(), parameters, strict=True))
    assert type(model[0]) is nn.Linear
    assert torch.equal(model(CANARY), said)


def test_each_generator_goes_on_from_where_it_was() -> None:
    own: list[Any] = [np.random.default_rng(1), random.Random(2), np.random.RandomState(3), torch.Generator()]

    def draw() -> list[float]:
        first = [random.random(), np.random.rand(), float(torch.rand(()))]  # noqa: NPY002
        return [*first, own[0].random(), own[1].random(), own[2].rand(), float(torch.rand((), generator=own[3]))]

    states = RandomStates(own)
    first = draw()
    assert first != draw()
    states.put_back()
    assert draw() == first
