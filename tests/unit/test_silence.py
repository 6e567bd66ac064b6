"""Hooks that never fire, and edits that are made on another model: said, and told apart."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import stabilitylab as sl
from stabilitylab.record.note_kinds import WRITTEN_BESIDES
from tests.loops import CANARY, make_model


def moved(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.0001)


def test_edits_on_another_model(tmp_path: Path) -> None:
    model = make_model()
    other = copy.deepcopy(model)
    with sl.attach(model, "0", tmp_path / "run") as monitor:
        for _ in range(5):
            with monitor.edit():
                other(torch.randn(2, 5, 8))
                moved(other)
    found = sl.load(tmp_path / "run").diagnosis()
    assert (found.cause, found.landed, found.nothing_lands) == ("another-model", "none", True)
    assert not found.unwatched


def edited_copies(tmp_path: Path, *, hand_over: bool) -> sl.Diagnosis:
    model = current = make_model()
    with sl.attach(model, "0", tmp_path / "run", canary=CANARY) as monitor:
        for _ in range(5):
            with monitor.edit() as edit:
                edited = copy.deepcopy(current)
                edited(torch.randn(2, 5, 8))
                moved(edited)
                if hand_over:
                    current = edited
                    edit.returns(edited)
    return sl.load(tmp_path / "run").diagnosis()


def test_copies_that_are_edited_are_another_model_until_they_are_handed_over(tmp_path: Path) -> None:
    lost = edited_copies(tmp_path / "lost", hand_over=False)
    assert (lost.cause, lost.landed) == ("another-model", "none")
    assert not lost.unwatched
    kept = edited_copies(tmp_path / "kept", hand_over=True)
    assert (kept.cause, kept.landed) == ("unknown", "all")


def test_edits_that_move_weights_and_run_nothing_are_not_seen_inside(tmp_path: Path) -> None:
    model = make_model()
    with sl.attach(model, "0", tmp_path / "run") as monitor:
        for _ in range(5):
            with monitor.edit():
                moved(model)
    found = sl.load(tmp_path / "run").diagnosis()
    assert len(found.unwatched) == 1
    assert "no hook" in found.says


def test_a_canary_sees_what_became_of_the_model_all_the_same(tmp_path: Path) -> None:
    model = make_model()
    with sl.attach(model, "0", tmp_path / "run", canary=CANARY) as monitor:
        for _ in range(5):
            with monitor.edit():
                moved(model)
    assert not sl.load(tmp_path / "run").diagnosis().unwatched


def test_one_edit_that_is_heard_is_enough(tmp_path: Path) -> None:
    model = make_model()
    with sl.attach(model, "0", tmp_path / "run") as monitor:
        for edit in range(6):
            with monitor.edit():
                if edit == 1:
                    model(torch.randn(2, 5, 8))
                moved(model)
    assert not sl.load(tmp_path / "run").diagnosis().unwatched


def test_a_loop_that_steps_at_each_fourth_edit_loses_none(tmp_path: Path) -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    with sl.attach(model, "[03]", tmp_path / "run", canary=CANARY) as monitor:
        for edit in range(1, 43):
            with monitor.edit():
                model(torch.randn(2, 5, 8)).pow(2).mean().backward()
                if edit % 4 == 0:
                    optimizer.step()
                    optimizer.zero_grad()
    found = sl.load(tmp_path / "run").diagnosis()
    assert (found.landed, found.nothing_lands) == ("some", False)
    assert not found.causes
    assert not found.findings
    assert "moved a watched layer" not in found.says


def test_one_that_stops_stepping_is_told(tmp_path: Path) -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    with sl.attach(model, "[03]", tmp_path / "run", canary=CANARY) as monitor:
        for edit in range(1, 43):
            with monitor.edit():
                model(torch.randn(2, 5, 8)).pow(2).mean().backward()
                if edit % 4 == 0 and edit < 24:
                    optimizer.step()
                    optimizer.zero_grad()
    found = sl.load(tmp_path / "run").diagnosis()
    assert found.nothing_lands
    assert found.causes


def told_besides(folder: Path, edit: Callable[[nn.Module, int], object]) -> list[str]:
    """What is said of parameters that six edits write beside the first layer's weight."""
    model = make_model()
    with sl.attach(model, "0", folder / "run", announce=False) as monitor:
        for number in range(6):
            with monitor.edit(), torch.no_grad():
                model(torch.randn(2, 5, 8))
                model[0].weight.mul_(1.0001)
                edit(model, number)
    return [note.says for note in sl.load(folder / "run").notes if note.kind == WRITTEN_BESIDES]


def test_parameters_that_edits_write_and_nobody_watches_are_told_once(tmp_path: Path) -> None:
    def times(most: int) -> Callable[[nn.Module, int], object]:
        return lambda model, number: model[3].weight.mul_(1.0001) if number < most else None

    assert told_besides(tmp_path / "3", times(3)) == ["edits also write to 3.weight, which is not watched"]
    assert told_besides(tmp_path / "2", times(2)) == []


def test_what_belongs_to_a_watched_layer_or_only_moves_is_not_told(tmp_path: Path) -> None:
    def moved_in_memory(model: nn.Module, number: int) -> None:
        model[3].weight.data = model[3].weight.data.clone()

    assert told_besides(tmp_path / "bias", lambda model, number: model[0].bias.add_(1e-4)) == []
    assert told_besides(tmp_path / "moved", moved_in_memory) == []
