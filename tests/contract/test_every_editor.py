"""What holds of every editor, found through the registry; on the digit model, whose editors' states are shipped."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stabilitylab as sl
from stabilitylab.editors.base import Editor, Prepared
from stabilitylab.editors.registry import KINDS, make, parse
from stabilitylab.errors import SiteError, UsageError
from stabilitylab.testbed.bed import SCORES
from stabilitylab.testbed.digits_bed import DigitsBed
from stabilitylab.testbed.lab import prepare

NAMES = [kind.name for kind in KINDS]
LIMITED = ["mend+ball", "malmen+clamp", "malmen+ball", "rome+clip"]


@pytest.fixture(scope="module")
def bed() -> DigitsBed:
    return DigitsBed("fp16")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def model(bed: DigitsBed) -> nn.Module:
    return bed.load()


@pytest.fixture
def ready(bed: DigitsBed, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An editor by name that has learned what it must."""
    monkeypatch.setenv("STABILITYLAB_CACHE", str(cache))

    def of(name: str, model: nn.Module) -> Editor:
        editor = make(name, model, bed)
        prepare(editor, model, bed)
        return editor

    return of


def state(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value.nan_to_num(7.0), other[name].nan_to_num(7.0)), name


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


@pytest.mark.parametrize("name", [*NAMES, *LIMITED])
def test_an_edit_is_carried_out_and_leaves_nothing_else_behind(
    name: str, bed: DigitsBed, model: nn.Module, ready: Any
) -> None:
    requests = bed.stream(3, 6)
    editor = ready(name, model)
    originals = bed.originals(model, requests)
    before = state(model)
    flags = {which: parameter.requires_grad for which, parameter in model.named_parameters()}
    random_state = torch.get_rng_state()
    learned = []
    for place, request in enumerate(requests):
        model = editor.edit(model, request)
        learned.append(originals.outcomes(model, [place])[0, SCORES.index("efficacy")])
    assert torch.equal(torch.get_rng_state(), random_state)
    assert hooks(model) == 0
    assert not model.training
    for which, parameter in model.named_parameters():
        assert parameter.grad is None, which
        assert flags.get(which, parameter.requires_grad) == parameter.requires_grad, which
    # A limit may cost success; a bare method must have learned most of what it was told.
    least = 0 if "+" in name else 0.5
    assert float(torch.stack(learned).mean()) >= least, learned
    after = state(model)
    untouched = [which for which in before if not any(which.startswith(f"{site}.") for site in editor.sites)]
    assert untouched
    assert_same({which: before[which] for which in untouched}, {which: after[which] for which in untouched})
    moved = after.keys() != before.keys() or any(
        not torch.equal(before[which], after[which]) for which in before if which not in untouched
    )
    assert moved


@pytest.mark.parametrize("name", NAMES)
def test_watching_it_takes_one_line_and_changes_nothing(name: str, bed: DigitsBed, ready: Any, tmp_path: Path) -> None:
    requests = bed.stream(4, 3)
    bare = bed.load()
    editor = ready(name, bare)
    for request in requests:
        bare = editor.edit(bare, request)
    watched = bed.load()
    editor = ready(name, watched)
    with sl.attach(watched, sites=editor.sites, run=tmp_path / "run", editor=editor, canary=bed.canary()) as monitor:
        for request in requests:
            with monitor.edit(label=bed.label(request)) as edit:
                watched = edit.returns(editor.edit(watched, request))
    assert_same(state(bare), state(watched))
    run = sl.load(tmp_path / "run")
    assert len(run) == len(requests)
    assert not [note for note in run.notes if note.kind == "probe-off"], run.notes
    for site in editor.sites:
        assert site in run.sites_of("drift.ratio"), site


@pytest.mark.parametrize("name", NAMES)
def test_what_it_learned_can_be_saved_and_taken_up_again(
    name: str, bed: DigitsBed, model: nn.Module, ready: Any, tmp_path: Path
) -> None:
    editor = ready(name, model)
    if not isinstance(editor, Prepared):
        assert not hasattr(editor, "prepare")
        return
    written = editor.save(tmp_path)
    assert written == tmp_path / editor.file
    other = make(name, model, bed)
    assert isinstance(other, Prepared)
    with pytest.raises(UsageError, match=editor.file.replace(".", r"\.")):
        other.restore(tmp_path / "nowhere")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / editor.file).write_bytes(written.read_bytes()[:100])
    with pytest.raises(UsageError):
        other.restore(tmp_path / "damaged")
    other.restore(tmp_path)
    request = bed.stream(5, 1)[0]
    one, two = copy.deepcopy(model), copy.deepcopy(model)
    assert_same(state(editor.edit(one, request)), state(other.edit(two, request)))


@pytest.mark.parametrize("name", NAMES)
def test_a_model_without_the_layers_it_edits_is_named(name: str, bed: DigitsBed) -> None:
    with pytest.raises(SiteError, match=r"Sequential has no decoder layers .*its linear layers are '0'"):
        make(name, nn.Sequential(nn.Linear(3, 4)), bed)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("mennd", r"no editor 'mennd'; expected one of finetune, .*; did you mean 'mend'"),
        ("mend+bal", r"no limit 'bal' of 'mend\+bal'; expected mend\+ball, .*did you mean 'ball'"),
        ("mend+ball+ball", "twice"),
        ("", "no editor ''"),
    ],
)
def test_an_unknown_name_lists_the_valid_ones(name: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        parse(name)
