"""Which of an editor's state is read, when, and at which site."""

from __future__ import annotations

import functools
import types
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stabilitylab.probes.base import Probe
from stabilitylab.probes.codebook import Codebook, CodebookHits, CodebookPass, HitShare
from stabilitylab.probes.editor_state import EditLearningRates, NormalisedInput
from stabilitylab.probes.linear_solve import (
    CovarianceCondition,
    CovarianceExtremes,
    SolveResidual,
    SystemCondition,
    SystemExtremes,
    SystemResidual,
)
from stabilitylab.probes.normaliser_pass import LearningRates, NormaliserPass
from stabilitylab.probes.null_space import KeyCache, KeyCachePass, NullSpace, NullSpacePass
from stabilitylab.probes.rank_one import (
    ClampHits,
    Denominator,
    TargetValue,
    UpdateDenominator,
    ValueClamp,
    ValueRatio,
)
from stabilitylab.probes.side_memory import SideMemory, SideMemoryPass
from stabilitylab.record.readings import Rebuild
from stabilitylab.watching.editor_report import EditorReport
from stabilitylab.watching.hooks import Capture
from stabilitylab.watching.instruments import editor as editor_instrument
from stabilitylab.watching.instruments.bench import Bench, NoteTaker
from stabilitylab.watching.instruments.editor import EditorInstrument
from stabilitylab.watching.walking import named_modules_of
from tests.editor_fakes import Executor, GRACEAdapter, Malmen, WISEAdapter, Wrapper, model

PROBES: tuple[Probe[Any], ...] = tuple(
    functools.partial(probe, every=1)()
    for probe in (
        NormalisedInput,
        EditLearningRates,
        Codebook,
        HitShare,
        SideMemory,
        NullSpace,
        KeyCache,
        UpdateDenominator,
        ValueRatio,
        ValueClamp,
        CovarianceCondition,
        SystemCondition,
        SystemResidual,
    )
)


class RecordingBench(Bench):
    """A bench that rebuilds at once what is handed over."""

    def __init__(self, probes: tuple[Probe[Any], ...], note: NoteTaker) -> None:
        super().__init__(probes, note)
        self.seen: dict[tuple[type[Any], str], Any] = {}

    def add(self, site: str, packed: Tensor, rebuild: Rebuild[Any]) -> None:
        assert (packed.dim(), packed.dtype) == (1, torch.float64)
        seen = rebuild(packed.numpy())
        self.seen[type(seen), site] = seen


class Workplace:
    """A bench, an instrument on it, and the notes that it made."""

    def __init__(self, editor: object = None, probes: tuple[Probe[Any], ...] = PROBES) -> None:
        self.notes: list[tuple[str, str]] = []
        self.bench = RecordingBench(probes, lambda kind, says: self.notes.append((kind, says)))
        self.instrument = EditorInstrument(self.bench, editor)

    def read(
        self, whole: nn.Module, capture: Capture | None = None, **reports: EditorReport
    ) -> dict[tuple[type[Any], str], Any]:
        self.instrument.after(named_modules_of(whole), capture, reports)
        return self.taken()

    def taken(self) -> dict[tuple[type[Any], str], Any]:
        seen, self.bench.seen = self.bench.seen, {}
        return seen


def test_malmen() -> None:
    algorithm = Malmen(model())
    net = algorithm.net["(4, 8)"]
    net.normalizer.std.fill_(0.5)
    place = Workplace(Executor(algorithm))
    with Capture(SimpleNamespace()) as capture:
        place.instrument.watch(capture, algorithm.model, named_modules_of(algorithm.model))
        net(torch.ones(3, 4), torch.full((3, 8), 2.0))
        net(torch.ones(1, 4), torch.zeros(1, 8))
    found = place.read(algorithm.model, capture)
    keys = found[NormaliserPass, "editor.alg.net.(4, 8).normalizer.u"]
    gradients = found[NormaliserPass, "editor.alg.net.(4, 8).normalizer.v"]
    assert (keys.input_max, gradients.input_max) == (pytest.approx(2.0, rel=1e-6), pytest.approx(4.0, rel=1e-6))
    assert found[NormaliserPass, "editor.alg.net.(8, 4).normalizer.u"].input_max is None
    assert found[LearningRates, "editor.alg.net.(4, 8)"].rates.tolist() == pytest.approx([1e-3, 1e-3])
    assert not net.normalizer._forward_pre_hooks
    assert not place.notes


def test_without_an_editor_nothing_is_read() -> None:
    assert Workplace().read(model()) == {}


def test_a_codebook_is_asked_once_and_before_the_edit_changes_it() -> None:
    whole = model()
    adapter = whole["h"][1]["fc"] = GRACEAdapter(whole["h"][1]["fc"])
    place = Workplace()
    assert place.read(whole) == {}
    adapter.add_key(torch.zeros(1, 4))
    for value, hits in ((0.1, 1.0), (5.0, 0.0)):
        query = torch.full((1, 2, 4), value)
        with Capture(SimpleNamespace()) as capture:
            place.instrument.watch(capture, whole, named_modules_of(whole))
            adapter(query)
            adapter.add_key(query[:, -1])
            adapter(query)
        found = place.read(whole, capture)
        assert found[CodebookHits, "h.1.fc"] == CodebookHits(hits, 1.0)
        adapter(query)  # between edits nobody asks
        assert place.taken() == {}
    assert found[CodebookPass, "h.1.fc"].keys == 3
    assert not adapter._forward_pre_hooks


@pytest.mark.parametrize("kind", [GRACEAdapter, WISEAdapter])
@pytest.mark.parametrize("wrapped_first", [False, True])
def test_a_layer_keeps_its_name_when_the_model_is_wrapped(kind: type[nn.Module], wrapped_first: bool) -> None:
    whole, place = model(), Workplace()
    assert place.read(Wrapper(whole) if wrapped_first else whole) == {}
    adapter = whole["h"][0]["fc"] = kind(whole["h"][0]["fc"])
    if isinstance(adapter, GRACEAdapter):
        adapter.add_key(torch.zeros(1, 4))
    expected = {"model.h.0.fc" if wrapped_first else "h.0.fc"}
    for now in (Wrapper(whole), whole, Wrapper(Wrapper(whole))):
        assert {site for _, site in place.read(now)} == expected


def test_a_side_memory() -> None:
    whole = model()
    adapter = whole["h"][0]["fc"] = WISEAdapter(whole["h"][0]["fc"])
    with torch.no_grad():
        adapter.new_weight += 0.5
    adapter.memory_weight.append(adapter.new_weight.detach() + 0.5)
    seen = Workplace().read(whole)[SideMemoryPass, "h.0.fc"]
    assert (seen.drift, seen.stored) == (pytest.approx(32**0.5, rel=1e-6), 1.0)


def test_the_globals_of_alphaedit() -> None:
    main = types.ModuleType("AlphaEdit_main")
    main.P, main.cache_c = torch.stack([torch.eye(4), torch.diag(torch.tensor([1.0, 0, 0, 0]))]), torch.eye(4)
    main.COV_CACHE = {("gpt2", "h.0.fc"): torch.diag(torch.tensor([4.0, 1.0]))}
    found = Workplace(main).read(model())
    assert found == {
        (NullSpacePass, "editor.P.0"): NullSpacePass(1.0),
        (NullSpacePass, "editor.P.1"): NullSpacePass(0.25),
        (KeyCachePass, "editor.cache_c"): KeyCachePass(4.0),
        (CovarianceExtremes, "h.0.fc"): CovarianceExtremes(4.0, 1.0),
    }


def test_what_is_reported() -> None:
    report = EditorReport(
        key=torch.tensor([1.0, 0.0]),
        direction=torch.tensor([0.0, 2.0]),
        initial_value=torch.ones(4),
        target_value=torch.full((4,), 3.0),
        clamp_hits=torch.tensor(5),
        covariance=torch.eye(2),
        system=torch.diag(torch.tensor([2.0, 1.0])),
        solution=torch.ones(2, 3),
        right_side=torch.zeros(2, 3),
    )
    assert Workplace().read(model(), fc=report) == {
        (Denominator, "fc"): Denominator(0.0, 2.0),
        (TargetValue, "fc"): TargetValue(6.0, 2.0),
        (ClampHits, "fc"): ClampHits(5.0),
        (CovarianceExtremes, "fc"): CovarianceExtremes(1.0, 1.0),
        (SystemExtremes, "fc"): SystemExtremes(2.0, 1.0),
        (SolveResidual, "fc"): SolveResidual(pytest.approx(15**0.5), 0.0),
    }


def test_half_a_report_is_no_measurement() -> None:
    half = EditorReport(key=torch.ones(2), target_value=torch.ones(2), solution=torch.ones(2))
    assert Workplace().read(model(), fc=half) == {}


def test_a_report_of_the_editor_is_read_once_and_the_loop_has_the_last_word() -> None:
    editor = SimpleNamespace(reports={"fc": EditorReport(clamp_hits=1.0), "other": EditorReport(clamp_hits=2.0)})
    place = Workplace(editor)
    found = place.read(model(), fc=EditorReport(clamp_hits=9.0))
    assert found == {(ClampHits, "fc"): ClampHits(9.0), (ClampHits, "other"): ClampHits(2.0)}
    assert place.read(model()) == {}
    editor.reports = {"fc": EditorReport(clamp_hits=3.0)}
    assert place.read(model()) == {(ClampHits, "fc"): ClampHits(3.0)}


def test_what_no_probe_needs_here_is_not_reduced() -> None:
    whole = model()
    whole["h"][0]["fc"] = WISEAdapter(whole["h"][0]["fc"])
    place = Workplace(probes=(ValueClamp(sites="*.fc"), Codebook()))
    report = EditorReport(clamp_hits=1.0, key=torch.ones(2), direction=torch.ones(2))
    place.instrument.after(named_modules_of(whole), None, {"h.0.fc": report, "h.0.proj": report})
    assert place.taken() == {(ClampHits, "h.0.fc"): ClampHits(1.0)}


def test_what_breaks_is_switched_off_where_it_broke() -> None:
    place = Workplace()
    wrong = EditorReport(key=torch.ones(2), direction=torch.ones(3), clamp_hits=1.0)
    right = EditorReport(key=torch.ones(2), direction=torch.ones(2))
    for _ in range(2):
        found = place.read(model(), wrong=wrong, right=right)
        assert set(found) == {(ClampHits, "wrong"), (Denominator, "right")}
    ((kind, says),) = place.notes
    assert kind == "probe-off"
    assert says.startswith("Denominator of wrong switched off: ValueError: vectors of shapes [2] and [3]")


def test_a_matrix_that_would_take_too_long_is_left_out_and_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(editor_instrument, "WIDEST_ON_CPU", 2)
    place = Workplace()
    report = EditorReport(system=torch.eye(3), covariance=torch.eye(2))
    for _ in range(2):
        assert set(place.read(model(), fc=report)) == {(CovarianceExtremes, "fc")}
    assert place.notes == [("skipped", "condition of the system at fc: 3×3 on a CPU would take too long; at most 2")]


def test_nothing_that_is_read_is_changed() -> None:
    values = {name: torch.rand(3, 3) for name in ("key", "direction", "system", "solution", "right_side", "covariance")}
    before = {name: value.clone() for name, value in values.items()}
    whole, state = model(), torch.get_rng_state()
    Workplace().read(whole, fc=EditorReport(**values))
    assert all(torch.equal(values[name], value) for name, value in before.items())
    assert torch.equal(torch.get_rng_state(), state)
