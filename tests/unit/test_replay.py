"""Replay: an edit is made once more, named, tried in wider precisions, and leaves the loop as if it had not been."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import stabilitylab as sl
from stabilitylab.acting import memory
from stabilitylab.errors import UsageError
from stabilitylab.integrations.easyedit import watch
from stabilitylab.record.operations import Operation, Place, Precision
from stabilitylab.record.run import load
from tests.replayed import BAD, make_model, of_replays, overflow, said, watched

# -- what a wider precision says -----------------------------------------------------------------------------------


def cast_down(model: nn.Module, number: int) -> None:
    update = torch.full((4,), 1e5 if number == BAD else 1.0)
    with torch.no_grad():
        model[3].bias += update.half()


def without_a_leaf(model: nn.Module, number: int) -> None:
    """What is learnt is made inside, in torch's default dtype, and autocast narrows what the weights are in."""
    delta = torch.zeros(8, requires_grad=True)
    optimizer = torch.optim.SGD([delta], lr=1e-6)
    with torch.autocast("cpu", torch.float16):
        loss = model[0](delta + (1e4 if number == BAD else 1.0)).mul(1e3).sum()
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        model[0].weight += delta + 1e-8 * loss.detach().to(delta.dtype)


@pytest.mark.parametrize(
    ("apply", "dtype", "operator"),
    [
        (overflow, torch.float16, "aten.mm.default"),
        (cast_down, torch.float16, "aten._to_copy.default"),
        (without_a_leaf, torch.float32, "aten.mul.Tensor"),
        (without_a_leaf, torch.bfloat16, "aten.mul.Tensor"),
    ],
)
def test_what_a_wider_precision_holds_is_a_matter_of_range(
    tmp_path: Path, apply: Callable[[nn.Module, int], object], dtype: torch.dtype, operator: str
) -> None:
    run = watched(tmp_path / "run", apply, dtype)
    (found,) = of_replays(run)
    assert (found.edit, found.operator, found.reach, found.deterministic) == (BAD, operator, "weight", True)
    assert found.place.function == apply.__name__
    assert found.kind == "range"
    (wider,) = found.precisions
    assert wider.finite
    assert wider.error is None
    assert wider.largest is not None
    assert wider.largest > 65504
    assert said(run) == []


def divided_by_nothing(model: nn.Module, number: int) -> None:
    step = torch.zeros(4, dtype=model[3].bias.dtype)
    if number == BAD:
        step = step / step.norm()
    with torch.no_grad():
        model[3].bias += step


@pytest.mark.parametrize(
    ("dtype", "tried"), [(torch.float16, ["float32", "float64"]), (torch.float32, ["float64"]), (torch.float64, [])]
)
def test_what_no_precision_holds_is_the_algebra(tmp_path: Path, dtype: torch.dtype, tried: list[str]) -> None:
    (found,) = of_replays(watched(tmp_path / "run", divided_by_nothing, dtype))
    assert found.operator == "aten.div.Tensor"
    assert [(each.dtype, each.finite, each.error) for each in found.precisions] == [
        (name, False, None) for name in tried
    ]
    assert found.kind == ("algebra" if tried else None)


def test_memory_that_is_shared_is_shared_in_the_wider_precision(tmp_path: Path) -> None:
    """The editor writes through a view: were it another tensor there, the overflow would not come."""
    model = make_model(torch.float16)
    editor = SimpleNamespace(view=model[0].weight.detach()[2:4])

    def apply(number: int) -> None:
        editor.view += 1.0 if number == BAD else 0.0
        with torch.no_grad():
            model[3].bias += (model[0].weight[2:4].sum() > 8) * torch.full((4,), 1e30 if number == BAD else 0.0).half()

    with sl.attach(model, "[03]", tmp_path / "run", editor=editor, replay=True, announce=False) as monitor:
        step = monitor.wrap(apply)
        for number in range(1, BAD + 1):
            step(number)
        assert editor.view.data_ptr() == model[0].weight[2:4].data_ptr()
    (found,) = of_replays(load(tmp_path / "run"))
    assert found.precisions[0].largest is not None
    assert found.precisions[0].largest > 1e29


def test_a_value_that_was_there_before_the_edit_is_not_tried_in_other_precisions(tmp_path: Path) -> None:
    model = make_model(torch.float16)
    spoilt = torch.ones(4, dtype=torch.float16)

    def apply(number: int) -> None:
        with torch.no_grad():
            model[3].bias += spoilt

    with sl.attach(model, "[03]", tmp_path / "run", replay=True, announce=False) as monitor:
        step = monitor.wrap(apply)
        step(1)
        spoilt[0] = torch.nan
        step(2)
    (found,) = of_replays(load(tmp_path / "run"))
    assert (found.made, found.precisions, found.kind) == ("arrived", (), None)


@pytest.mark.parametrize(
    ("tried", "kind"),
    [((), None), ((None,), None), ((True,), "range"), ((False, True), "range"), ((False, None), "algebra")],
)
def test_what_the_record_says_in_one_word(tried: tuple[bool | None, ...], kind: str | None) -> None:
    precisions = tuple(Precision(name, finite) for name, finite in zip(("float32", "float64"), tried, strict=False))
    place = Place()
    operation = Operation(
        1, "replay", "aten.mm.default", "forward", "", place, "producer", "weight", precisions=precisions
    )
    assert operation.kind == kind


# -- what is said of it --------------------------------------------------------------------------------------------


def test_an_editor_that_does_something_else_each_time_is_named(tmp_path: Path) -> None:
    drawn = random.SystemRandom().random  # which no seed repeats

    def apply(model: nn.Module, number: int) -> None:
        with torch.no_grad():
            model[3].bias += torch.tensor(drawn())
            model[0].bias /= 0.0 if number == BAD else 1.0

    run = watched(tmp_path / "run", apply)
    (found,) = of_replays(run)
    assert found.deterministic is False
    assert found.operator == "aten.div_.Tensor"
    assert said(run) == [
        f"edit {BAD} was made once more; it left something else in '3.bias': the editor is not deterministic"
    ]


def test_an_edit_that_fails_is_made_once_more_too_and_its_exception_passes(tmp_path: Path) -> None:
    made: list[int] = []
    model = make_model()

    def apply(number: int) -> None:
        values = torch.zeros(2, 2) / (number - BAD)
        made.append(number)
        if not bool(values.isfinite().all()):
            raise ArithmeticError("not finite")

    with sl.attach(model, "[03]", tmp_path / "run", replay=True, announce=False) as monitor:
        step = monitor.wrap(apply)
        for number in (1, 2):
            step(number)
        with pytest.raises(ArithmeticError, match="not finite") as raised:
            step(BAD)
        assert raised.value.__context__ is None
        with pytest.raises(ArithmeticError):  # one that passes is made once more only once
            step(BAD)
    run = load(tmp_path / "run")
    assert made == [1, 2, BAD, BAD]  # what was appended meanwhile is taken out
    assert [edit.row.status for edit in run.edits[1:]] == ["applied", "applied", "failed", "failed"]
    (found,) = of_replays(run)
    assert (found.edit, found.deterministic) == (BAD, True)
    assert said(run) == []


def test_where_nothing_is_found_it_says_so(tmp_path: Path) -> None:
    def apply(model: nn.Module, number: int) -> None:
        if number == BAD:
            raise ArithmeticError("an error of the loop's own\nin two lines")

    run = watched(tmp_path / "run", apply)
    assert of_replays(run) == []
    assert said(run) == [
        f"edit {BAD} was made once more; no operation was found whose result is not finite; it raised ArithmeticError: "
        "an error of the loop's own"
    ]


def test_a_passing_value_does_not_use_up_the_replay_of_a_lasting_one(tmp_path: Path) -> None:
    def apply(model: nn.Module, number: int) -> None:
        if number in (1, 2):
            raise ArithmeticError
        overflow(model, number)

    run = watched(tmp_path / "run", apply, torch.float16, edits=6)
    assert [note.edit for note in run.notes if note.kind == "replay"] == [1]
    assert [found.edit for found in of_replays(run)] == [BAD]


def test_an_error_of_the_wider_run_is_kept_in_one_line(tmp_path: Path) -> None:
    def apply(model: nn.Module, number: int) -> None:
        if model[0].weight.dtype != torch.float16:
            raise TypeError("only half\nis known")
        overflow(model, number)

    (found,) = of_replays(watched(tmp_path / "run", apply, torch.float16))
    assert found.precisions == tuple(Precision(name, error="TypeError: only half") for name in ("float32", "float64"))
    assert found.kind is None


def test_what_can_not_be_wound_back_is_not_made_once_more(tmp_path: Path) -> None:
    counted = itertools.count(1)

    def apply(model: nn.Module, number: int) -> None:
        overflow(model, next(counted))

    run = watched(tmp_path / "run", apply, torch.float16, edits=3)
    assert of_replays(run) == []
    assert "'outer.counted' can't be wound back" in said(run)[0]
    assert next(counted) == 4


def test_what_is_there_by_design_or_reaches_nothing_is_no_reason(tmp_path: Path) -> None:
    """A mask, 0/0 that is replaced, and a canary whose answer ceases to be finite."""
    model = make_model()
    model.mask = nn.Parameter(torch.full((4, 4), -torch.inf).triu(1))

    def apply(number: int) -> None:
        ratio = torch.zeros(4) / torch.zeros(4)
        with torch.no_grad():
            model[3].bias += torch.where(ratio.isfinite(), ratio, torch.full((4,), 1e-3))
            model[0].weight *= 1000.0 if number == 2 else 1.0

    canary, sites = torch.full((2, 8), 1e36), ["[03]", "mask"]
    with sl.attach(model, sites, tmp_path / "run", canary=canary, replay=True, announce=False) as monitor:
        step = monitor.wrap(apply)
        for number in range(1, 4):
            step(number)
    run = load(tmp_path / "run")
    assert {found.phase for found in run.operations} == {"edit", "canary"}
    assert run.edits[2].row.scalar("canary.nonfinite", "model") != 0
    assert run.edits[0].row.scalar("weight.nonfinite", "mask") == 6
    assert of_replays(run) == []
    assert said(run) == []


# -- memory --------------------------------------------------------------------------------------------------------


def test_what_it_keeps_is_said_at_attach(tmp_path: Path) -> None:
    with sl.attach(nn.Sequential(nn.Linear(2048, 2048)), "0", tmp_path / "run", replay=True):
        pass
    notes = [note for note in load(tmp_path / "run").notes if note.kind == "replay-memory"]
    assert [note.edit for note in notes] == [0]
    assert "is kept, 0.02 GB" in notes[0].says


def test_without_memory_for_the_copy_there_is_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda _: 10)
    with pytest.raises(UsageError, match=r"replay=True keeps a copy.*GB are free; expected more memory"):
        sl.attach(make_model(), "[03]", tmp_path / "run", replay=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("times", [1, 3])
def test_it_is_refused_where_memory_is_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """One copy fits, and not a second; or the second, and then fp32 takes four times as much, fp64 eight."""
    size = sum(each.numel() * 2 for each in make_model().parameters())
    free = [size]

    def apply(model: nn.Module, number: int) -> None:
        overflow(model, number)

    monkeypatch.setattr(memory, "free_memory", lambda _: free[0])
    model = make_model(torch.float16)
    with sl.attach(model, "[03]", tmp_path / "run", replay=True, announce=False) as monitor:
        free[0] = size * times - 1
        step = monitor.wrap(apply)
        for number in range(1, 5):
            step(model, number)
    run = load(tmp_path / "run")
    if times == 1:
        assert of_replays(run) == []
        assert "could not be made once more: it takes about" in said(run)[0]
    else:
        (found,) = of_replays(run)
        assert [(each.dtype, each.finite) for each in found.precisions] == [("float32", None), ("float64", None)]
        assert all("it takes about" in str(each.error) for each in found.precisions)


def test_free_memory_of_this_machine_is_known() -> None:
    free = memory.free_memory(torch.device("cpu"))
    assert free is None or free > 0
    assert memory.free_memory(torch.device("meta")) is None
    assert memory.shortage({torch.device("meta"): 10**15}) is None


# -- autopsy -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("replay", [True, False])
def test_an_autopsy_of_the_edit_that_broke_the_model(tmp_path: Path, replay: bool) -> None:
    model = make_model(torch.float16)
    with sl.attach(model, "[03]", tmp_path / "run", replay=replay, trace=False, announce=False) as monitor:
        for number in range(1, BAD + 1):
            with monitor.edit():
                overflow(model, number)
        left = copy.deepcopy(model.state_dict())
        if not replay:
            with pytest.raises(UsageError, match=r"not finite any more.*expected attach\(\.\.\., replay=True\)"):
                monitor.autopsy(overflow, BAD)
            return
        drawn = torch.get_rng_state()
        found = monitor.autopsy(overflow, BAD)
        assert found is not None
        assert (found.edit, found.operator, found.kind, found.deterministic) == (BAD, "aten.mm.default", "range", True)
        another = monitor.autopsy(overflow, 1)
        assert another is None
        assert torch.equal(drawn, torch.get_rng_state())
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor.view(torch.int16), left[name].view(torch.int16)), name
    run = load(tmp_path / "run")
    assert run.operations == (found,)
    assert "is not deterministic, or the last edit was another one" in said(run)[0]
    assert "no operation was found" in said(run)[1]


def test_an_autopsy_from_the_present_state_while_that_is_finite(tmp_path: Path) -> None:
    model = make_model(torch.float16)
    before = copy.deepcopy(model.state_dict())
    with sl.attach(model, "[03]", tmp_path / "run", announce=False) as monitor:
        found = monitor.autopsy(overflow, BAD)
        with pytest.raises(UsageError, match=r"without monitor\.edit or monitor\.wrap"):
            monitor.autopsy(monitor.wrap(overflow), BAD)
        with monitor.edit():
            overflow(model, 1)
    assert found is not None
    assert (found.phase, found.kind, found.deterministic) == ("replay", "range", None)
    assert found.result is not None
    moved = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert moved in ([], ["0.weight"])
    assert load(tmp_path / "run").edits[-1].edit == 1


def test_an_autopsy_comes_between_edits_and_before_the_end(tmp_path: Path) -> None:
    model = make_model()
    with sl.attach(model, "[03]", tmp_path / "run") as monitor:
        with pytest.raises(UsageError, match="an edit is open"):
            monitor.calibrate(lambda model, number: monitor.autopsy(overflow, 1), range(8), 8)
        with monitor.edit(), pytest.raises(UsageError, match="an edit is open; expected autopsy between edits"):
            monitor.autopsy(overflow, 1)
    with pytest.raises(UsageError, match=r"the monitor is closed; expected autopsy before close\(\)"):
        monitor.autopsy(overflow, 1)


# -- EasyEdit ------------------------------------------------------------------------------------------------------


class Executor:
    """As an EasyEdit executor: what is called for each edit is its method."""

    def __init__(self) -> None:
        self.calls = 0

    def apply_to_model(self, model: nn.Module, tok: object, requests: list[Any], hparams: object) -> Any:
        self.calls += 1
        overflow(model, self.calls)
        return model, {}


@pytest.mark.parametrize("replay", [True, False])
def test_an_easyedit_editor_is_made_once_more_where_it_breaks(tmp_path: Path, replay: bool) -> None:
    executor = Executor()
    editor = SimpleNamespace(model=make_model(torch.float16), apply_algo=executor.apply_to_model)
    with watch(editor, run=tmp_path / "run", sites="[03]", announce=False, replay=replay) as monitor:
        for prompt in "abcd":
            editor.apply_algo(editor.model, None, [{"prompt": prompt}], None)
        assert monitor.edits == 4
    assert executor.calls == 4
    found = of_replays(load(tmp_path / "run"))
    assert [(each.edit, each.kind, each.deterministic) for each in found] == [(BAD, "range", True)] * replay
