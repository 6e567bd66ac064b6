"""The EasyEdit adapter on editors of EasyEdit's shape: `apply_algo`, `restore_after_edit`, hyperparameters."""

from __future__ import annotations

import sys
import types
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import stabilitylab as sl
from stabilitylab.analysis.thresholds import shipped
from stabilitylab.errors import UsageError
from stabilitylab.integrations.easyedit import edited_layers, editors, watch
from stabilitylab.integrations.easyedit.executors import holder_of_state


def make_model() -> nn.Module:
    model = nn.Module()
    model.h = nn.ModuleList([nn.ModuleDict({"c_fc": nn.Linear(4, 8), "c_proj": nn.Linear(8, 4)}) for _ in range(3)])
    model.forward = lambda x: x
    return model


class Executor:
    """As EasyEdit's MEND executor: the algorithm appears in the first call; weights are kept only when asked."""

    def __init__(self, keep: bool) -> None:
        self.keep = keep

    def apply_to_model(self, model: nn.Module, tok: object, requests: list, hparams: object, **_: object) -> tuple:
        weight = model.h[1]["c_fc"].weight
        old = {"h.1.c_fc.weight": weight.detach().clone()} if self.keep else {}
        with torch.no_grad():
            weight.add_(0.1)
        return model, old


@pytest.fixture
def editors_module() -> types.ModuleType:
    """A module that imported `restore_after_edit` by name, as EasyEdit's editor modules do."""
    module = types.ModuleType("fake_easyeditor_editor")
    source = """
def restore_after_edit(editor, edited_model, weights_copy):
    import torch
    for name, value in weights_copy.items():
        with torch.no_grad():
            editor.model.get_parameter(name)[...] = value
    return edited_model

class BaseEditor:
    def __init__(self, model, hparams, executor):
        self.model, self.tok, self.hparams = model, None, hparams
        self.apply_algo = executor.apply_to_model

    def edit(self, prompts, sequential_edit=False, fail=False):
        for prompt in prompts:
            model, weights = self.apply_algo(self.model, self.tok, [{"prompt": prompt}], self.hparams)
            if fail:
                raise RuntimeError("the user's own")
            if not sequential_edit:
                restore_after_edit(self, model, weights)
        return model
"""
    exec(source, vars(module))
    module.BaseEditor.__module__ = module.__name__
    sys.modules[module.__name__] = module
    yield module
    del sys.modules[module.__name__]


MEND = SimpleNamespace(inner_params=["h.1.c_fc.weight"])


@pytest.mark.parametrize(
    ("keep", "sequential", "outcome", "warned"),
    [(True, False, "restored", False), (False, False, "committed", True), (False, True, "committed", False)],
)
def test_each_edit_and_what_became_of_it(
    tmp_path: Path, editors_module: types.ModuleType, keep: bool, sequential: bool, outcome: str, warned: bool
) -> None:
    editor = editors_module.BaseEditor(make_model(), MEND, Executor(keep))
    apply, restore = editor.apply_algo, editors_module.restore_after_edit
    with watch(editor, run=tmp_path / "run") as monitor:
        assert editor.edit(["a", "b"], sequential_edit=sequential) is editor.model
        assert monitor.sites == ("h.1.c_fc",)
    assert editor.apply_algo == apply
    assert editors_module.restore_after_edit is restore
    run = sl.load(tmp_path / "run")
    assert [(edit.label, edit.outcome) for edit in run.edits[1:]] == [("a", outcome), ("b", outcome)]
    said = [note for note in run.notes if note.kind == "not-put-back"]
    assert len(said) == warned  # once, however many edits
    assert ("weights-not-restored" in [link.cause for link in run.diagnosis().causes]) == warned
    if warned:
        assert "keep_original_weight=True" in said[0].says


def test_everything_is_put_back_after_an_exception(tmp_path: Path, editors_module: types.ModuleType) -> None:
    editor = editors_module.BaseEditor(make_model(), MEND, Executor(True))
    apply, restore = editor.apply_algo, editors_module.restore_after_edit
    with pytest.raises(RuntimeError, match="the user's own"), watch(editor, run=tmp_path / "run"):
        editor.edit(["a"], fail=True)
    assert editor.apply_algo == apply
    assert editors_module.restore_after_edit is restore
    assert sl.load(tmp_path / "run").complete


@pytest.mark.parametrize(
    ("hparams", "expected"),
    [
        (MEND, ["h.1.c_fc"]),
        (SimpleNamespace(inner_params=["h[2].c_fc.weight"]), ["h.2.c_fc"]),
        (SimpleNamespace(layers=[0, 2], rewrite_module_tmp="h.{}.c_proj"), ["h.0.c_proj", "h.2.c_proj"]),
        (SimpleNamespace(inner_params=["elsewhere.weight"]), None),
        (SimpleNamespace(), None),
        (None, None),
    ],
)
def test_layers_from_hyperparameters(hparams: object, expected: list[str] | None) -> None:
    assert edited_layers(hparams, make_model()) == expected


def test_an_editor_that_does_not_say_is_watched_by_what_moves(tmp_path: Path, editors_module: types.ModuleType) -> None:
    editor = editors_module.BaseEditor(make_model(), SimpleNamespace(), Executor(False))
    with watch(editor, run=tmp_path / "run") as monitor:
        editor.edit(["a", "b"], sequential_edit=True)
        assert monitor.sites == ("h.1.c_fc",)


@pytest.mark.parametrize("announce", [True, False])
def test_whether_the_alarm_is_said_is_up_to_the_caller(
    tmp_path: Path, editors_module: types.ModuleType, monkeypatch: pytest.MonkeyPatch, announce: bool
) -> None:
    asked: dict[str, object] = {}
    monkeypatch.setattr(
        editors, "attach", lambda *args, **options: asked.update(options) or sl.attach(*args, **options)
    )
    with watch(editors_module.BaseEditor(make_model(), MEND, Executor(False)), run=tmp_path / "run", announce=announce):
        pass
    assert asked["announce"] is announce


def test_what_the_call_says_of_the_loop_is_in_the_manifest(tmp_path: Path, editors_module: types.ModuleType) -> None:
    limits = replace(shipped(), source="a test")
    editor = editors_module.BaseEditor(make_model(), MEND, Executor(False))
    with watch(editor, run=tmp_path / "run", config={"sequential_edit": False}, thresholds=limits):
        editor.edit(["a"])
    run = sl.load(tmp_path / "run")
    assert run.manifest["config"] == {"sequential_edit": False}
    assert run.thresholds == limits


@pytest.mark.parametrize(("moves", "says"), [(True, "weights were moved by then"), (False, "the model is as it was")])
def test_an_edit_that_raised_after_it_moved_weights_did_not_leave_the_model_as_it_was(
    tmp_path: Path, editors_module: types.ModuleType, moves: bool, says: str
) -> None:
    class Raising(Executor):
        def apply_to_model(self, *args: object, **more: object) -> tuple:
            if moves:
                super().apply_to_model(*args, **more)
            raise ValueError("Need to check the matrix P initialization")

    editor = editors_module.BaseEditor(make_model(), MEND, Raising(False))
    with pytest.raises(ValueError, match="matrix P"), watch(editor, run=tmp_path / "run"):
        editor.edit(["a"], sequential_edit=True)
    assert says in sl.load(tmp_path / "run").diagnosis().says


def test_what_is_no_editor_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(UsageError, match="Linear has no 'apply_algo'; expected an EasyEdit editor"),
        watch(nn.Linear(1, 1), run=tmp_path / "run"),
    ):
        pass
    assert not (tmp_path / "run").exists()


def test_state_is_in_the_executor_or_in_the_module_of_a_plain_function(editors_module: types.ModuleType) -> None:
    """AlphaEdit keeps P and cache_c as globals of the module of its `apply_algo`."""
    executor = Executor(True)
    assert holder_of_state(executor.apply_to_model) is executor
    assert holder_of_state(editors_module.restore_after_edit) is editors_module
    editors_module.restore_after_edit.__module__ = "nowhere"
    assert holder_of_state(editors_module.restore_after_edit) is None


def test_the_globals_of_a_methods_module_are_read_from_the_first_edit_on(
    tmp_path: Path, editors_module: types.ModuleType
) -> None:
    source = """
def apply_to_model(model, tok, requests, hparams, **_):
    global P, cache_c
    import torch
    P, cache_c = torch.eye(4)[None] / 2, torch.eye(4)[None]
    with torch.no_grad():
        model.h[1]["c_fc"].weight.add_(0.1)
    return model, {}
"""
    exec(source, vars(editors_module))
    editor = editors_module.BaseEditor(make_model(), MEND, types.SimpleNamespace(apply_to_model=None))
    editor.apply_algo = editors_module.apply_to_model
    with watch(editor, run=tmp_path / "run"):
        editor.edit(["a"], sequential_edit=True)
    run = sl.load(tmp_path / "run")
    assert run.manifest["editor_class"] == editors_module.__name__
    assert run.series("editor.cache_energy", "editor.cache_c.0").tolist()[-1] == 4.0
    assert run.series("editor.null_space_share", "editor.P.0").tolist()[-1] == 0.5


class Normalised(nn.Module):
    """A hypernetwork as far as the probes know one."""

    def __init__(self) -> None:
        super().__init__()
        for name, value in (("u_mean", 0.0), ("u_std", 1.0), ("v_mean", 0.0), ("v_std", 1.0)):
            self.register_buffer(name, torch.full((4,), value))

    def forward(self, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return u + v


class BuildingExecutor(Executor):
    """As EasyEdit's MEND executor: it builds its hypernetwork, and takes its model, in its first call."""

    is_init = False

    def init_model(self, model: nn.Module, tok: object, hparams: object) -> None:
        self.model, self.alg, self.is_init = model, Normalised(), True

    def apply_to_model(self, model: nn.Module, tok: object, requests: list, hparams: object, **more: object) -> tuple:
        if not self.is_init:
            self.init_model(model, tok, hparams)
        self.alg(torch.full((2, 4), 3.0), torch.ones(2, 4))
        return super().apply_to_model(self.model, tok, requests, hparams, **more)


def test_a_hypernetwork_that_is_built_in_the_first_edit_is_seen_in_it(
    tmp_path: Path, editors_module: types.ModuleType
) -> None:
    executor = BuildingExecutor(True)
    editor = editors_module.BaseEditor(make_model(), MEND, executor)
    with watch(editor, run=tmp_path / "run"):
        editor.edit(["a", "b"], sequential_edit=True)
    run = sl.load(tmp_path / "run")
    assert run.series("editor.input_max", "editor.alg.u")[1:] == pytest.approx([3.0, 3.0])
    assert "init_model" not in vars(executor)


@pytest.mark.parametrize("keeps", [True, False])
def test_an_editor_that_is_built_anew_for_each_edit_is_said_once(
    tmp_path: Path, editors_module: types.ModuleType, keeps: bool
) -> None:
    """UltraEdit's executor never remembers that it has built one."""

    class Forgetful(BuildingExecutor):
        def apply_to_model(self, *args: object, **more: object) -> tuple:
            answer = super().apply_to_model(*args, **more)
            self.is_init = keeps
            return answer

    editor = editors_module.BaseEditor(make_model(), MEND, Forgetful(True))
    with watch(editor, run=tmp_path / "run"):
        editor.edit(["a", "b", "c"], sequential_edit=True)
    said = [note.says for note in sl.load(tmp_path / "run").notes if note.kind == "editor-rebuilt"]
    assert len(said) == (not keeps)
    assert keeps or "in edit 2" in said[0]


@pytest.mark.parametrize("how", ["closure", "partial", "wraps", "object", "script"])
def test_the_executor_is_found_behind_a_wrapper_of_the_users(how: str) -> None:
    import functools

    executor = BuildingExecutor(True)
    inner = executor.apply_to_model

    def closure(*args: object, **kwargs: object) -> object:
        return inner(*args, **kwargs)  # type: ignore[arg-type]

    class Timed:
        def __init__(self) -> None:
            self.call = inner

        def __call__(self, *args: object) -> object:
            return self.call(*args)  # type: ignore[arg-type]

    def apply_named_otherwise(*args: object) -> object:
        return args

    script: dict[str, object] = {"inner": inner}
    exec("def timed(*args, **kwargs):\n    return inner(*args, **kwargs)", script)

    wrapped = {
        "script": script["timed"],
        "closure": closure,
        "partial": functools.partial(inner, copy=False),
        "wraps": functools.wraps(inner)(apply_named_otherwise),
        "object": Timed(),
    }[how]
    assert holder_of_state(wrapped) is executor


def test_two_editors_that_share_an_executor_are_told_apart(tmp_path: Path, editors_module: types.ModuleType) -> None:
    executor = BuildingExecutor(True)
    first, second = (editors_module.BaseEditor(make_model(), MEND, executor) for _ in range(2))
    first.edit(["a"])
    with watch(second, run=tmp_path / "run"):
        second.edit(["b"], sequential_edit=True)
    run = sl.load(tmp_path / "run")
    said = [note.says for note in run.notes if note.kind == "other-model"]
    assert len(said) == 1
    assert "edits another model" in said[0]
    assert "edits another model" in run.diagnosis().says


def test_single_edits_of_another_model_are_said_once(tmp_path: Path, editors_module: types.ModuleType) -> None:
    """EasyEdit restores this editor's model then, and the edits stay in the other's."""
    executor = BuildingExecutor(True)
    first, second = (editors_module.BaseEditor(make_model(), MEND, executor) for _ in range(2))
    first.edit(["a"])
    with watch(second, run=tmp_path / "run", announce=False):
        second.edit(["b", "c", "d"])
    kinds = [note.kind for note in sl.load(tmp_path / "run").notes]
    assert (kinds.count("other-model"), kinds.count("not-put-back"), kinds.count("restore")) == (1, 1, 0)


def test_single_or_sequential_is_read_from_the_call_and_said_once(
    tmp_path: Path, editors_module: types.ModuleType
) -> None:
    editor = editors_module.BaseEditor(make_model(), MEND, Executor(False))
    with watch(editor, run=tmp_path / "run"):
        for prompt in "abcd":
            editor.edit([prompt])
        editor.edit(["e"], sequential_edit=True)
        with pytest.raises(TypeError):
            editor.edit()
    assert "edit" not in vars(editor)
    run = sl.load(tmp_path / "run")
    kinds = [note.kind for note in run.notes if note.kind in {"single-edits", "sequential-edits"}]
    assert kinds == ["single-edits", "sequential-edits"]
    assert "weights-not-restored" in [link.cause for link in run.diagnosis().causes]


def test_an_editor_without_a_model_is_refused(tmp_path: Path, editors_module: types.ModuleType) -> None:
    with pytest.raises(UsageError, match="only an API"), watch(editors_module.BaseEditor(None, MEND, Executor(True))):
        pass


class Beside(Executor):
    """Moves a bias beside the weight that the hyperparameters name, as FT does, and a layer that they don't (KN)."""

    def apply_to_model(self, model: nn.Module, tok: object, requests: list, hparams: object, **more: object) -> tuple:
        with torch.no_grad():
            model.h[1]["c_fc"].bias.add_(0.1)
            model.h[0]["c_proj"].weight.add_(0.1)
        return super().apply_to_model(model, tok, requests, hparams, **more)


def test_what_moves_beside_the_named_layers_is_said_once_and_watched_from_then_on(
    tmp_path: Path, editors_module: types.ModuleType
) -> None:
    editor = editors_module.BaseEditor(make_model(), MEND, Beside(False))
    with watch(editor, run=tmp_path / "run") as monitor:
        editor.edit(["a", "b", "c", "d"], sequential_edit=True)
        assert monitor.sites == ("h.1.c_fc", "h.0.c_proj", "h.1.c_fc.bias")
    run = sl.load(tmp_path / "run")
    (said,) = [note.says for note in run.notes if note.kind == "moved-besides"]
    assert "edit 1 also moved h.0.c_proj, h.1.c_fc.bias" in said
    assert run.series("update.norm", "h.0.c_proj")[2:] == pytest.approx([0.1 * 32**0.5] * 3)
    assert run.series("drift.norm", "h.1.c_fc")[-1] == pytest.approx(4 * 0.1 * 32**0.5)  # not counted anew
    assert [edit.outcome for edit in run.edits[1:]] == ["committed"] * 4


def test_what_only_later_edits_move_is_found_too(tmp_path: Path, editors_module: types.ModuleType) -> None:
    """KN's hyperparameters name no layer, and each of its edits moves others."""

    class Wandering(Executor):
        edits = 0

        def apply_to_model(self, model: nn.Module, *_: object, **__: object) -> tuple:
            with torch.no_grad():
                model.h[self.edits % 2]["c_proj"].weight.add_(0.1)
            self.edits += 1
            return model, {}

    editor = editors_module.BaseEditor(make_model(), SimpleNamespace(), Wandering(False))
    with watch(editor, run=tmp_path / "run") as monitor:
        editor.edit(["a", "b", "c", "d"], sequential_edit=True)
        assert monitor.sites == ("h.0.c_proj", "h.1.c_proj")
    run = sl.load(tmp_path / "run")
    assert [note.kind for note in run.notes].count("moved-besides") == 1
    assert run.series("update.norm", "h.1.c_proj")[3:].tolist() == pytest.approx([0.0, 0.1 * 32**0.5])


def test_sites_that_the_user_named_are_all_that_is_watched(tmp_path: Path, editors_module: types.ModuleType) -> None:
    editor = editors_module.BaseEditor(make_model(), MEND, Beside(False))
    with watch(editor, run=tmp_path / "run", sites="h.1.c_fc") as monitor:
        editor.edit(["a", "b"], sequential_edit=True)
        assert monitor.sites == ("h.1.c_fc",)


def test_an_outcome_is_not_judged_by_what_is_watched_only_since_the_edit(
    tmp_path: Path, editors_module: types.ModuleType
) -> None:
    class Kept(Beside):
        def apply_to_model(self, model: nn.Module, *args: object, **more: object) -> tuple:
            old = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
            super().apply_to_model(model, *args, **more)
            return model, old

    editor = editors_module.BaseEditor(make_model(), MEND, Kept(False))
    with watch(editor, run=tmp_path / "run"):
        editor.edit(["a", "b", "c"])
    run = sl.load(tmp_path / "run")
    assert [edit.outcome for edit in run.edits[1:]] == ["restored"] * 3
    assert not [note for note in run.notes if note.kind == "restore"]


class Adapter(nn.Module):
    """In a layer's place, with a value of its own: one row at a time, as GRACE's original ``replace_prompt``."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.value = layer, nn.Parameter(torch.zeros(8))

    @property
    def weight(self) -> torch.Tensor:
        return self.layer.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > 1:
            raise RuntimeError("The size of tensor a must match the size of tensor b")
        return self.layer(x) + self.value


class Wrapping(nn.Module):
    """The model and the adapter in it; it is called by name alone, and has no ``forward`` of its own (GRACE)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        layer = model.h[1]["c_fc"]
        if not isinstance(layer, Adapter):
            model.h[1]["c_fc"] = Adapter(layer)
            self.original_layer = layer

    def __call__(self, **inputs: torch.Tensor) -> torch.Tensor:
        return self.model(**inputs)

    def reset_layer(self) -> None:
        self.model.h[1]["c_fc"] = self.original_layer


def wrapping_editor(editors_module: types.ModuleType) -> types.SimpleNamespace:
    source = """
def restore_after_edit(editor, edited_model, weights_copy):
    weights_copy()
"""
    exec(source, vars(editors_module))

    class Executor:
        def apply_to_model(self, model: nn.Module, tok: object, requests: list, hparams: object) -> tuple:
            wrapped = Wrapping(model)
            with torch.no_grad():
                model.h[1]["c_fc"].value.add_(1.0)
            return wrapped, wrapped.reset_layer

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.h = make_model().h

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.h[1]["c_proj"](self.h[1]["c_fc"](x))

    return editors_module.BaseEditor(Model(), MEND, Executor())


class Uncalled(Wrapping):
    """It can't be called itself (MELO)."""

    __call__ = nn.Module.__call__


def test_the_canary_of_a_wrapper_that_can_t_be_called_is_that_of_the_model_in_it(tmp_path: Path) -> None:
    model = make_model()
    model.forward = lambda x: model.h[1]["c_proj"](model.h[1]["c_fc"](x))
    monitor = sl.attach(model, "h.1.c_fc", tmp_path / "run", canary=torch.randn(3, 4), announce=False)
    with monitor, monitor.edit() as edit, torch.no_grad():
        edit.returns(Uncalled(model)).model.h[1]["c_fc"].value.add_(1.0)
    assert (sl.load(tmp_path / "run").series("canary.kl", None)[1:] > 0).all()


@pytest.mark.parametrize(("sequential", "outcome"), [(False, "restored"), (True, "committed")])
def test_an_adapter_that_a_callable_takes_off_again_is_restored(
    tmp_path: Path, editors_module: types.ModuleType, sequential: bool, outcome: str
) -> None:
    editor = wrapping_editor(editors_module)
    with watch(editor, run=tmp_path / "run", canary={"x": torch.randn(3, 4)}) as monitor:
        editor.edit(["a", "b", "c"], sequential_edit=sequential)
        assert ("h.1.c_fc.value" in monitor.sites) == sequential  # by its name without the wrapper
    run = sl.load(tmp_path / "run")
    assert [edit.outcome for edit in run.edits[1:]] == [outcome] * 3
    kinds = [note.kind for note in run.notes]
    assert kinds.count("brought") == 1
    assert "canary-off" not in kinds
    assert (run.series("canary.kl", None)[1:] > 0).all()


def test_a_template_for_each_of_several_modules_is_read() -> None:
    several = SimpleNamespace(layers=[0, 1], rewrite_module_tmp="h.{}.c_fc", rewrite_module_tmps=["h.{}.c_proj"])
    assert edited_layers(several, make_model()) == ["h.0.c_proj", "h.1.c_proj"]
