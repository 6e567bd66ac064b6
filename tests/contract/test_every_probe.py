"""What every probe promises, found through the registry."""

from __future__ import annotations

import inspect
import re
from typing import Any

import numpy as np
import pytest
import torch

from stabilitylab.errors import UsageError
from stabilitylab.probes import ALL, TIERS, catalogue
from stabilitylab.probes.absorption import AbsorptionPass, MovedEntries
from stabilitylab.probes.accumulated_gradient import AccumulatedGradient
from stabilitylab.probes.attention_pass import AttentionPass
from stabilitylab.probes.base import Probe
from stabilitylab.probes.codebook import CodebookHits, CodebookPass
from stabilitylab.probes.feedback import FeedbackPass, History
from stabilitylab.probes.gradient_factors import GradientSize, GradientSpectrum
from stabilitylab.probes.gradient_passes import Alignment, LaterPasses, LaterSpectra
from stabilitylab.probes.input_pass import InputPass
from stabilitylab.probes.linear_solve import CovarianceExtremes, SolveResidual, SystemExtremes
from stabilitylab.probes.logits_pass import CanaryPass, LaterLogits, LogitsPass, LossPass, TextPass
from stabilitylab.probes.mask_pass import MaskPass
from stabilitylab.probes.normaliser_pass import LearningRates, NormaliserPass
from stabilitylab.probes.null_space import KeyCachePass, NullSpacePass
from stabilitylab.probes.output_pass import LaterOutputs, NormInput, OutputPass
from stabilitylab.probes.rank_one import ClampHits, Denominator, TargetValue
from stabilitylab.probes.side_memory import SideMemoryPass
from stabilitylab.probes.state_pass import BadTensor, StatePass
from stabilitylab.probes.top_singular import TopSingular
from stabilitylab.probes.weight_pass import WeightPass, WeightScan, WeightWrites
from stabilitylab.probes.weight_spectrum import WeightSpectrum
from stabilitylab.probes.weight_subspace import LeadingSubspace

SCALES, PHASES = {"log", "linear", "count", "flag"}, {"before", "during", "after"}
NAN = float("nan")
SPECTRA = [
    GradientSpectrum(
        singular_values=values, norm=norm, exact=exact, zero_share=0.25, dead_share=0.0, nonfinite=float(np.isnan(norm))
    )
    for values, norm, exact in (
        (np.array([3.0, 1.0]), np.sqrt(10.0), True),
        (np.zeros(3), 0.0, True),
        (np.full(50, NAN), NAN, True),
        (np.linspace(9, 1, 16), 100.0, False),
    )
]
SIZES = [
    GradientSize(norm=norm, zero_share=0.25, dead_share=0.0, nonfinite=float(np.isnan(norm)))
    for norm in (10.0, 0.0, NAN)
]
EXAMPLES: dict[type[Any], list[Any]] = {
    WeightPass: [
        WeightPass.from_host(np.array(values), torch.float16)
        for values in ([3.0, 2.0, 1.0, 0.5, -1.0, 2.0, 0.0], [0.0] * 7, [NAN, 2.0, NAN, NAN, NAN, NAN, 4.0])
    ],
    WeightWrites: [WeightWrites(0.0), WeightWrites(3.0)],
    WeightSpectrum: [WeightSpectrum(np.array(values)) for values in ([3.0, 1.0], [0.0], [2.0, 0.0], [NAN, NAN])],
    WeightScan: [
        WeightScan.from_scan(np.array(values), torch.float16)
        for values in ([3.0, -1.0, 2.0, 0.0], [0.0] * 4, [NAN, NAN, NAN, 4.0])
    ],
    GradientSize: SIZES,
    GradientSpectrum: SPECTRA,
    AccumulatedGradient: [
        AccumulatedGradient(
            source=source,
            norms=np.array(norms),
            stepped=np.array(stepped),
            scales=np.ones(len(norms)),
            carried=0.0,
            learning_rate=rate,
            ascends=rate == 0.1,
        )
        for source, norms, stepped, rate in (
            (0.0, [], [], NAN),
            (1.0, [3.0, NAN], [1.0, NAN], 0.1),
            (2.0, [0.0], [], NAN),
        )
    ],
    LaterPasses: [LaterPasses(1.0, 0.0), LaterPasses(25.0, 1.0, SIZES[0], SIZES[2])],
    LaterSpectra: [LaterSpectra(1.0, 0.0), LaterSpectra(25.0, 1.0, SPECTRA[0], SPECTRA[2])],
    Alignment: [Alignment(0.5, -1.0), Alignment(None, None), Alignment(NAN, 0.0)],
    MovedEntries: [MovedEntries(3.0, 4.0), MovedEntries(0.0, 8.0)],
    AbsorptionPass: [AbsorptionPass(4.0, 1.0), AbsorptionPass(0.0, 0.0)],
    FeedbackPass: [FeedbackPass(2.0, 1.0), FeedbackPass(0.0, 1.0), FeedbackPass(NAN, 1.0)],
    TopSingular: [TopSingular(2.0, 3.0), TopSingular(0.0, 0.0), TopSingular(NAN, NAN)],
    LeadingSubspace: [LeadingSubspace(np.array(values)) for values in ([1.0, 0.5], [0.0], [NAN])],
    NormInput: [NormInput(2.0, 1e19), NormInput(0.0, 1e19), NormInput(NAN, 1e19)],
    LaterOutputs: [LaterOutputs(1.0, 0.0), LaterOutputs(25.0, 1.0, 3.0, NAN)],
    LaterLogits: [LaterLogits(1.0, 0.0), LaterLogits(25.0, 1.0, 3.0, NAN)],
    LossPass: [LossPass(2.5), LossPass(NAN), LossPass(2.5, 0.1, -1.0), LossPass(2.5, NAN, NAN)],
    TextPass: [TextPass(3.0, 2.0), TextPass(1e4, 2.0), TextPass(NAN, 2.0)],
    OutputPass: [
        OutputPass(1.0, 2.0, 1.0, 2.0, 0.0, 65504.0),
        OutputPass(0.0, 0.0, None, None, 0.0, 65504.0),
        OutputPass(NAN, float("inf"), NAN, NAN, 3.0, 65504.0),
    ],
    LogitsPass: [LogitsPass(-1.0, 1.0, 2.0, 0.5, 0.1, 0.6, 0.0), LogitsPass(*[NAN] * 6, 5.0)],
    CanaryPass: [CanaryPass(-1.0, 1.0, 2.0, 0.5, 0.1, 0.6, 0.0, 1.0, 0.0), CanaryPass(*[0.0] * 7)],
    NormaliserPass: [
        NormaliserPass(0.0, 3.0, 0.0, 3e5, 117.0, 0.0, np.array([17.0, 80.0, 117.0]), 0.0, 500.0, False),
        NormaliserPass(NAN, 0.0, 9.0, None, None, None, np.zeros(0), 1.0, None, False),
        NormaliserPass(0.0, 3.0, 0.0, None, None, None, np.arange(3.0), 1.0, 0.0, True),
    ],
    LearningRates: [LearningRates(np.linspace(0, 1, 100))],
    History: [
        History(np.array(values), np.arange(len(values), dtype=np.float64))
        for values in ([1.0], [1.0, 2.0, 4.0], [0.0, NAN])
    ],
    Denominator: [Denominator(-2.0, 4.0), Denominator(0.0, 0.0), Denominator(NAN, NAN)],
    TargetValue: [TargetValue(8.0, 2.0), TargetValue(1.0, 0.0), TargetValue(NAN, float("inf"))],
    ClampHits: [ClampHits(0.0), ClampHits(25.0)],
    CovarianceExtremes: [CovarianceExtremes(4.0, 2.0), CovarianceExtremes(0.0, 0.0), CovarianceExtremes(NAN, NAN)],
    SystemExtremes: [SystemExtremes(4.0, 2.0), SystemExtremes(1.0, 0.0), SystemExtremes(NAN, NAN)],
    SolveResidual: [SolveResidual(1e-7, 1.0), SolveResidual(1.0, 0.0), SolveResidual(NAN, float("inf"))],
    CodebookPass: [CodebookPass(2.0, 0.5, 1.0, 1.5, 9.0, NAN), CodebookPass(0.0, None, None, None, None, None)],
    CodebookHits: [CodebookHits(1.0, 2.0), CodebookHits(0.0, 0.0)],
    SideMemoryPass: [SideMemoryPass(4.0, 5.0, 1.0, 2.0), SideMemoryPass(0.0, 0.0, 0.0, 0.0)],
    NullSpacePass: [NullSpacePass(0.25), NullSpacePass(NAN)],
    KeyCachePass: [KeyCachePass(0.0), KeyCachePass(1e6)],
    AttentionPass: [
        AttentionPass(*values) for values in ([3.0, 1.2, 8.0, 0.0, 0.0], [0.0, 0.0, 0.0, 8.0, 0.0], [NAN] * 5)
    ],
    StatePass: [StatePass(0.0), StatePass(3.0)],
    BadTensor: [BadTensor(1.0), BadTensor(4096.0)],
    InputPass: [InputPass(3.0), InputPass(0.0)],
    MaskPass: [MaskPass(3.0, 0.0), MaskPass(0.0, 0.0)],
}


@pytest.mark.parametrize("probe", ALL, ids=lambda probe: probe.__name__)
class TestEveryProbe:
    def test_describes_itself(self, probe: type[Probe[Any]]) -> None:
        assert inspect.getdoc(probe)
        assert probe.metrics
        for metric in probe.metrics:
            assert re.fullmatch(r"[a-z]+\.[a-z_]+", metric.name), metric.name
            assert metric.scale in SCALES
            assert metric.phase in PHASES
            assert metric.length >= 1
            assert all([metric.unit, metric.meaning, metric.formula, metric.source])

    def test_computes_only_what_it_describes_and_no_more_values(self, probe: type[Probe[Any]]) -> None:
        described = {metric.name: metric for metric in probe.metrics}
        for seen in EXAMPLES[probe.needs]:
            for name, value in probe().compute(seen).items():
                assert 1 <= np.atleast_1d(value).size <= described[name].length
                assert np.asarray(value).dtype == np.float64

    def test_is_repeatable_and_leaves_what_it_sees_alone(self, probe: type[Probe[Any]]) -> None:
        for seen in EXAMPLES[probe.needs]:
            before = repr(seen)
            first, second = probe().compute(seen), probe().compute(seen)
            assert repr(first) == repr(second)
            assert repr(seen) == before

    def test_holds_no_state_but_its_settings(self, probe: type[Probe[Any]]) -> None:
        instance = probe()
        before = dict(vars(instance))
        for seen in EXAMPLES[probe.needs]:
            instance.compute(seen)
        assert vars(instance) == before

    def test_takes_a_cadence_and_sites(self, probe: type[Probe[Any]]) -> None:
        assert probe.tier in TIERS
        assert probe().every == (10 if probe.tier == "deep" else 1)
        instance = probe(every=3, sites="*.fc[12]")
        assert [edit for edit in range(8) if instance.is_due(edit)] == [0, 3, 6]
        assert (instance.is_for("decoder.0.fc1"), instance.is_for("decoder.0.q")) == (True, False)
        with pytest.raises(UsageError, match="1 or more"):
            probe(every=0)

    def test_touches_no_tensor(self, probe: type[Probe[Any]]) -> None:
        state = torch.get_rng_state()
        for seen in EXAMPLES[probe.needs]:
            assert not any(isinstance(value, torch.Tensor) for value in probe().compute(seen).values())
        assert torch.equal(torch.get_rng_state(), state)


def test_no_metric_is_named_twice() -> None:
    names = [metric.name for metric in catalogue()]
    assert len(names) == len(set(names))


def test_what_a_probe_follows_is_a_metric() -> None:
    names = {metric.name for metric in catalogue()}
    assert {followed for probe in ALL for followed in probe.follows} <= names
