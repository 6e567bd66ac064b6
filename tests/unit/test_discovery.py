"""Attached without sites: what can't be compared is named, and not passed over as unmoved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import stabilitylab as sl
from stabilitylab.watching import discovery


class Quantised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)


def test_quantised_and_offloaded_weights_are_named_together(tmp_path: Path) -> None:
    model = nn.Sequential(*[Quantised() for _ in range(3)], nn.Linear(4, 4), nn.Linear(4, 4, device="meta"))
    with sl.attach(model, run=tmp_path / "run", announce=False) as monitor, monitor.edit(), torch.no_grad():
        model[0].weight += 1
    run = sl.load(tmp_path / "run")
    skipped = [note.says for note in run.notes if note.kind == "skipped-site"]
    assert [says.partition(":")[0] for says in skipped] == ["0 and 2 more", "4 and 1 more"]
    assert "int8" in skipped[0]
    assert "meta" in skipped[1]
    assert "0 and 2 more" in run.diagnosis().says


def test_nothing_is_named_where_all_can_be_compared(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model.register_parameter("nothing", nn.Parameter(torch.zeros(0)))
    with sl.attach(model, run=tmp_path / "run", announce=False):
        pass
    assert not [note for note in sl.load(tmp_path / "run").notes if note.kind == "skipped-site"]


def test_where_there_is_no_room_for_copies_checksums_tell_what_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(discovery, "shortage", lambda needed: "it takes about 14 GB of memory (cpu), and 6 GB are free")
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with sl.attach(model, run=tmp_path / "run", announce=False) as monitor:
        for _ in range(2):
            with monitor.edit(), torch.no_grad():
                model[1].weight += 1.0
    run = sl.load(tmp_path / "run")
    assert run.manifest["sites"] == ["1"]
    assert run.series("update.norm", "1")[2] == pytest.approx(4.0)
    assert "no room for a copy" in run.diagnosis().says


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1,), (3,), (7, 5), (1 << 21,)])
def test_a_checksum_sees_any_bit_and_any_exchange(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape).to(dtype)
    was = discovery.checksum(tensor)
    assert discovery.checksum(tensor.clone()) == was
    for place in (0, tensor.numel() // 2, tensor.numel() - 1):
        other = tensor.clone()
        other.view(-1)[place] = (
            torch.nextafter(other.view(-1)[place].double(), torch.tensor(9.0).double()).to(dtype) + 1
        )
        assert discovery.checksum(other) != was
    if tensor.numel() > 1 << 20:
        assert discovery.checksum(tensor.flip(0)) != was


def test_what_stands_still_is_compared_more_and_more_seldom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[int] = []
    model = nn.Sequential(nn.Linear(4, 4))
    with sl.attach(model, run=tmp_path / "run", announce=False) as monitor:
        real = discovery.same_bits
        monkeypatch.setattr(discovery, "same_bits", lambda *two: compared.append(monitor.edits) or real(*two))
        for number in range(1, 13):
            with monitor.edit(), torch.no_grad():
                if number == 11:
                    model.add_module("adapter", nn.Linear(4, 4))
                if number == 12:
                    model.adapter.weight += 1.0
    assert sorted(set(compared)) == [1, 2, 4, 8, 12]
    assert sl.load(tmp_path / "run").manifest["sites"] == ["adapter"]


class Wrapper(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = model


def test_what_a_wrapper_brought_is_found_when_the_wrapper_is_gone(tmp_path: Path) -> None:
    """PEFT's first edit returns a wrapper around the model, EasyEdit's later ones return the model in it."""
    model = nn.Sequential(nn.Linear(4, 4))
    model.requires_grad_(False)
    with sl.attach(model, run=tmp_path / "run", announce=False) as monitor:
        with monitor.edit() as edit:
            model[0].register_module("lora", nn.Linear(4, 4))
            edit.returns(Wrapper(model))
        for _ in range(2):
            with monitor.edit() as edit, torch.no_grad():
                edit.returns(model)[0].get_submodule("lora").weight.add_(1.0)
        assert monitor.sites == ("0.lora",)
    run = sl.load(tmp_path / "run")
    assert [note.kind for note in run.notes].count("brought") == 1
    assert run.series("update.norm", "0.lora")[3] == pytest.approx(4.0)


def test_an_adapter_that_each_edit_brings_and_the_loop_takes_off_is_an_effect(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with sl.attach(model, run=tmp_path / "run", announce=False) as monitor:
        for _ in range(4):
            with monitor.edit():
                model[0].register_module("lora", nn.Linear(4, 4))
            del model[0].lora
    run = sl.load(tmp_path / "run")
    assert [edit.outcome for edit in run.edits[1:]] == ["restored"] * 4
    kinds = [note.kind for note in run.notes]
    assert (kinds.count("brought"), kinds.count("nothing-moved")) == (1, 0)
    assert not run.diagnosis().nothing_lands
