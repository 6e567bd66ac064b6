"""What is read of a hypernetwork's normaliser, of its rates and of the feedback, against naive float64 code."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stabilitylab.probes.editor_state import EditLearningRates, NormalisedInput, Normaliser
from stabilitylab.probes.feedback import FeedbackPass, FeedbackShare, Gain, History
from stabilitylab.probes.normaliser_pass import LearningRates, NormaliserPass, reduce_normaliser
from tests.numbers import seeds


@given(seed=seeds, tokens=st.integers(1, 12), units=st.integers(1, 20), dead=st.integers(0, 3))
def test_normaliser(seed: int, tokens: int, units: int, dead: int) -> None:
    rng = np.random.default_rng(seed)
    mean, std, entered = rng.normal(size=units), rng.uniform(0.1, 2, size=units), rng.normal(size=(tokens, units))
    std[:dead] = 0
    packed = reduce_normaliser(torch.tensor(mean), torch.tensor(std), [torch.tensor(entered)])
    seen = NormaliserPass.from_host(packed.numpy())
    zeros = np.flatnonzero(std == 0)
    spread = dict(Normaliser().compute(seen))
    assert list(np.atleast_1d(spread.pop("editor.zero_units", []))) == zeros.tolist()
    assert spread == {"editor.std_min": std.min(), "editor.std_zeros": float(zeros.size)}
    normalised = np.abs((entered - mean) / (std + 1e-7))
    readings = NormalisedInput().compute(seen)
    unit = int(np.unravel_index(normalised.argmax(), normalised.shape)[1])
    assert readings["editor.input_max"] == pytest.approx(normalised.max(), rel=1e-12)
    assert (readings["editor.input_unit"], readings["editor.input_unit_std"]) == (unit, std[unit])


def test_padding_rows_do_not_count_and_nan_wins() -> None:
    mean, std = torch.tensor([10.0, 0.0]), torch.tensor([0.1, 1.0])
    padded = NormaliserPass.from_host(reduce_normaliser(mean, std, [torch.tensor([[0.0, 0.0], [10.0, 3.0]])]).numpy())
    assert padded.input_max == pytest.approx(3.0, rel=1e-6)
    broken = NormaliserPass.from_host(reduce_normaliser(mean, std, [torch.tensor([[9.0, math.nan]])]).numpy())
    assert broken.input_max is not None
    assert math.isnan(broken.input_max)
    assert broken.input_unit == 1
    nothing = NormaliserPass.from_host(reduce_normaliser(mean, std, []).numpy())
    assert NormalisedInput().compute(nothing) == {}


def test_learning_rates() -> None:
    rates = np.linspace(0.1, 1.0, 80)
    assert EditLearningRates().compute(LearningRates(rates))["editor.learning_rate"].tolist() == rates[:64].tolist()


def history(values: list[float], every: int = 1) -> History:
    return History(np.array(values), np.arange(len(values), dtype=np.float64) * every)


@given(st.lists(st.floats(1e-30, 1e30), min_size=1, max_size=12))
def test_gain(values: list[float]) -> None:
    readings = Gain().compute(history(values))
    if len(values) == 1:
        assert readings == {}
        return
    recent = np.log(values[-6:])
    assert readings["feedback.gain"] == pytest.approx(np.mean(np.diff(recent)), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("broken", [0.0, math.nan, math.inf])
def test_gain_is_absent_where_a_logarithm_is_not_finite(broken: float) -> None:
    assert Gain().compute(history([1.0, broken])) == {}


@pytest.mark.parametrize("every", [1, 4])
def test_gain_is_per_edit_also_where_not_every_edit_is_read(every: int) -> None:
    gain = Gain().compute(history([2.0 ** (every * k) for k in range(6)], every))["feedback.gain"]
    assert gain == pytest.approx(math.log(2))


def test_share_of_the_feedback() -> None:
    assert FeedbackShare().compute(FeedbackPass.from_host(np.array([4.0, 1.0])))["feedback.share"] == 0.75
    assert FeedbackShare().compute(FeedbackPass(0.0, 1.0)) == {}
    assert FeedbackShare().compute(FeedbackPass(math.nan, 1.0)) == {}
