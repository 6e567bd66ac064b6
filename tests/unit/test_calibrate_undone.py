"""All that a dry edit may change is put back, whatever the editor, or named."""

from __future__ import annotations

import copy
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import stabilitylab as sl
from stabilitylab.editors.alphaedit import AlphaEdit
from stabilitylab.editors.grace import Grace
from stabilitylab.editors.registry import make
from stabilitylab.editors.rome import Rome
from stabilitylab.errors import EditError
from stabilitylab.record.run import load
from stabilitylab.testbed.digits_bed import DigitsBed
from stabilitylab.testbed.lab import prepare
from tests import key_value
from tests.dry_edits import REQUESTS, Model, assert_same, kinds, state
from tests.loops import edit_once, hooks_on, make_model


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
