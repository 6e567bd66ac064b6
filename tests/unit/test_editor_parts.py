"""What is found inside editors of EasyEdit's shape: the attribute names are those of its source."""

from __future__ import annotations

import types
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from stabilitylab.watching import editor_parts as parts
from stabilitylab.watching.editor_report import EditorReport
from stabilitylab.watching.walking import named_modules_of
from tests.editor_fakes import (
    Executor,
    GRACEAdapter,
    GradientTransform,
    Malmen,
    RunningMeanStd,
    WISEAdapter,
    Wrapper,
    model,
)

# -- normalisers and learning rates -----------------------------------------------------------------------------------


def test_normalisers_of_mend() -> None:
    algorithm = nn.Module()
    algorithm.mend = nn.ModuleDict({"(4, 8)": GradientTransform(4, 8)})
    assert set(parts.find_normalisers(algorithm)) == {"mend.(4, 8)"}
    found = parts.find_normalisers(Executor(algorithm))
    transform = algorithm.mend["(4, 8)"]
    assert found["alg.mend.(4, 8)"].module is transform
    u, v = found["alg.mend.(4, 8)"].statistics
    assert (u.kind, u.std, v.kind, v.mean) == ("u", transform.u_std, "v", transform.v_mean)
    calls = [(torch.ones(3, 4), torch.zeros(3, 8)), (torch.ones(2, 4),)]
    assert [entered.shape for entered, _ in u.entered(calls)] == [(3, 4), (2, 4)]
    assert [entered.shape for entered, _ in v.entered(calls)] == [(3, 8)]


def test_a_normaliser_that_is_switched_off_is_not_one() -> None:
    algorithm = nn.Module()
    algorithm.mend = GradientTransform(4, 8, norm=False)
    assert parts.find_normalisers(algorithm) == {}


def test_the_normaliser_of_malmen_is_parted_into_keys_and_gradients() -> None:
    found = parts.find_normalisers(Executor(Malmen(model())))
    assert set(found) == {"alg.net.(4, 8).normalizer", "alg.net.(8, 4).normalizer"}
    u, v = found["alg.net.(4, 8).normalizer"].statistics
    assert (u.kind, u.std.numel(), v.kind, v.std.numel()) == ("u", 4, "v", 8)
    assert u.guard == v.guard == torch.finfo(torch.float32).eps
    entered = torch.arange(24.0).reshape(2, 12)
    assert torch.equal(u.entered([(entered,)])[0][0], entered[:, :4])
    assert torch.equal(v.entered([(entered,)])[0][0], entered[:, 4:])


def test_a_running_normaliser_without_an_owner_is_whole() -> None:
    ultra = nn.Module()
    ultra.lifelong_normalizer = nn.ModuleDict({"(4, 8)": RunningMeanStd(12)})
    ((name, found),) = parts.find_normalisers(ultra).items()
    assert name == "lifelong_normalizer.(4, 8)"
    assert [(kind.kind, kind.std.numel()) for kind in found.statistics] == [("", 12)]


def test_rows_are_counted_where_the_normaliser_counts_them() -> None:
    transform = GradientTransform(4, 8)
    for training in (True, False):
        transform.train(training)
        (found,) = parts.find_normalisers(nn.ModuleDict({"a": transform})).values()
        assert [(kind.rows is transform.k, kind.learns) for kind in found.statistics] == [(True, training)] * 2
    del transform.k
    (found,) = parts.find_normalisers(nn.ModuleDict({"a": transform})).values()
    assert [kind.rows for kind in found.statistics] == [None, None]
    running = RunningMeanStd(6)
    running.n += 40
    (found,) = parts.find_normalisers(nn.ModuleDict({"a": running})).values()
    assert [(kind.rows.tolist(), kind.learns) for kind in found.statistics if kind.rows is not None] == [([40], True)]
    running.n = torch.ones(6)  # a count for each unit is not one count
    (found,) = parts.find_normalisers(nn.ModuleDict({"a": running})).values()
    assert [kind.rows for kind in found.statistics] == [None]


def test_a_normaliser_without_units_is_left_out() -> None:
    assert parts.find_normalisers(nn.ModuleDict({"a": RunningMeanStd(0), "b": GradientTransform(0, 0)})) == {}


def test_learning_rates() -> None:
    mend = nn.Module()
    mend.edit_lrs = nn.Parameter(torch.tensor([0.1, 0.2]))
    assert parts.find_learning_rates(Executor(mend))[""].tolist() == pytest.approx([0.1, 0.2])
    listed = SimpleNamespace(edit_lrs=nn.ParameterList([torch.tensor(0.3), torch.tensor([0.4])]))
    assert parts.find_learning_rates(listed)[""].tolist() == pytest.approx([0.3, 0.4])
    malmen = parts.find_learning_rates(Executor(Malmen(model())))
    assert {name: rates.tolist() for name, rates in malmen.items()} == {
        "alg.net.(4, 8)": pytest.approx([1e-3, 1e-3]),
        "alg.net.(8, 4)": pytest.approx([1e-4]),
    }


@pytest.mark.parametrize("editor", [None, object(), nn.Linear(2, 2), Executor(None), lambda: None])
def test_an_editor_without_state_has_none(editor: object) -> None:
    finders = (
        parts.find_normalisers,
        parts.find_learning_rates,
        parts.find_projections,
        parts.find_key_caches,
        parts.find_covariances,
        parts.find_reports,
    )
    assert [find(editor) for find in finders] == [{}] * len(finders)


# -- AlphaEdit, MEMIT, reports ----------------------------------------------------------------------------------------


def test_the_globals_of_a_python_module() -> None:
    main = types.ModuleType("AlphaEdit_main")
    main.P, main.cache_c = torch.stack([torch.eye(3), torch.zeros(3, 3)]), torch.ones(2, 3, 3)
    main.COV_CACHE = {("gpt2", "h.0.fc"): torch.eye(2), "h.1.fc": torch.ones(2, 2), "none": None}
    assert set(parts.find_projections(main)) == {"P.0", "P.1"}
    assert torch.equal(parts.find_projections(main)["P.0"], torch.eye(3))
    assert set(parts.find_key_caches(main)) == {"cache_c.0", "cache_c.1"}
    assert set(parts.find_covariances(main)) == {"h.0.fc", "h.1.fc"}
    main.P = torch.eye(3)
    assert set(parts.find_projections(main)) == {"P"}


@pytest.mark.parametrize("value", [torch.ones(3), torch.ones(2, 3), torch.ones(0, 3, 3), 1.0, None])
def test_what_is_no_stack_of_square_matrices_is_not_a_projection(value: object) -> None:
    assert parts.find_projections(SimpleNamespace(P=value)) == {}


def test_reports_of_an_editor() -> None:
    report = EditorReport(key=torch.ones(2))
    assert parts.find_reports(SimpleNamespace(reports={"h.0.fc": report, "h.1.fc": "other"})) == {"h.0.fc": report}
    assert parts.find_reports(SimpleNamespace(reports=[report])) == {}


def test_later_fields_of_a_report_win() -> None:
    key, direction = torch.ones(2), torch.zeros(2)
    both = EditorReport(key=direction, clamp_hits=3).with_later(EditorReport(key=key, direction=direction))
    assert (both.key, both.direction, both.clamp_hits, both.update) == (key, direction, 3, None)


# -- adapters in the model --------------------------------------------------------------------------------------------


def test_codebooks() -> None:
    whole = model()
    adapter = whole["h"][1]["fc"] = GRACEAdapter(whole["h"][1]["fc"])
    assert parts.find_codebooks(named_modules_of(whole)) == {}
    adapter.add_key(torch.ones(1, 4))
    (book,) = parts.find_codebooks(named_modules_of(whole)).values()
    assert (book.keys.shape, book.values.shape, book.radii.shape, book.token) == ((1, 4), (1, 8), (1,), -1)
    adapter.add_key(torch.zeros(1, 4))
    adapter.key_id = torch.tensor(3)
    ((name, book),) = parts.find_codebooks(named_modules_of(Wrapper(whole))).items()
    assert name == "model.h.1.fc"
    assert (book.keys.shape, book.radii.shape, int(book.token)) == ((2, 4), (2,), 3)


def test_side_memories() -> None:
    whole = model()
    adapter = whole["h"][0]["fc"] = WISEAdapter(whole["h"][0]["fc"])
    ((name, memory),) = parts.find_side_memories(named_modules_of(Wrapper(whole))).items()
    assert name == "model.h.0.fc"
    assert memory.original is adapter.original_layer.weight
    assert [id(side) for side in memory.sides] == [id(adapter.new_weight), id(adapter.layer.weight)]
    adapter.memory_weight += [torch.zeros(8, 4), torch.ones(8, 4), torch.ones(2)]
    (memory,) = parts.find_side_memories(named_modules_of(whole)).values()
    assert memory.stored == 3
    assert len(memory.sides) == 2  # the last that was stored has another shape
    del adapter.memory_weight[-1]
    (memory,) = parts.find_side_memories(named_modules_of(whole)).values()
    assert memory.sides[1] is adapter.memory_weight[-1]


def test_ordinary_modules_are_no_adapters() -> None:
    assert parts.find_codebooks(named_modules_of(nn.ParameterDict({"values_": torch.ones(2)}))) == {}
    assert parts.find_side_memories(named_modules_of(Wrapper(model()))) == {}
