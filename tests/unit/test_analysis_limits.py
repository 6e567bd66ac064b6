"""Every limit of the analysis's tables, from both sides: what is said at it, and not just short of it.

The figures are those of the reasons that `stabilitylab.analysis.limits` gives, written out once more, so that a limit
that moves is noticed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest

from stabilitylab.analysis import Diagnosis
from stabilitylab.analysis.limits import LIMITS
from tests.synthetic_runs import diagnose, row

A = "decoder.layers.1.fc1"


@dataclass(frozen=True)
class Pinned:
    """at: the first value that is out of line. short: one that is not quite. times: readings in a row that it takes."""

    rule: str
    metric: str
    at: float
    short: float
    verdict: str = "stable"
    times: int = 1
    start_only: bool = False


KAPPA = 1e7
PINNED = (
    Pinned("canary-lost", "canary.agreement", 0.1, 0.101, "collapsed", 3),
    Pinned("canary-collapsed", "canary.kl", math.log(100) * 1.0001, math.log(100) * 0.999, "collapsed", 3),
    Pinned("canary-moved", "canary.kl", 1.0, 0.999, "drifting", 3),
    Pinned("perplexity-lost", "canary.perplexity_ratio", 100.0, 99.9, "collapsed", 3),
    Pinned("original-lost", "canary.perplexity", 1_000.0, 999.0, start_only=True),
    Pinned("update-swallowed", "update.swallowed_share", 0.9, 0.899, "drifting", 3),
    Pinned("masked-sequence", "attention.masked_sequences", 1.0, 0.0),
    # Kantorovich: cos(u, k) ≥ 2√κ / (1 + κ), for a condition κ of ten million.
    Pinned("denominator-near-zero", "editor.denominator_ratio", 1.999 * KAPPA**-0.5, 2.001 * KAPPA**-0.5, "diverging"),
    Pinned("denominator-negative", "editor.denominator", -1e-9, 0.0),
    Pinned("ill-conditioned", "editor.system_condition", KAPPA, 0.999 * KAPPA),
    Pinned("covariance-singular", "editor.covariance_condition", KAPPA, 0.999 * KAPPA),
    Pinned("nothing-preserved", "editor.null_space_share", 0.99, 0.989),
    Pinned("no-room", "editor.null_space_share", 0.1, 0.101),
    Pinned("key-unreachable", "editor.radius_min", -1e-9, 0.0),
    Pinned("cache-before", "editor.cache_energy", 1e-9, 0.0, start_only=True),
    Pinned("codebook-before", "editor.keys", 1.0, 0.0, start_only=True),
    Pinned("side-memory-before", "editor.side_drift", 1e-9, 0.0, start_only=True),
)
EVERY = pytest.mark.parametrize("limit", PINNED, ids=lambda limit: limit.rule)


def site_of(limit: Pinned) -> str:
    return "model" if limit.metric.startswith("canary.") else A


def run(limit: Pinned, *values: float) -> Diagnosis:
    """From edit 0 on; those that are about edits see a sound model first. nan: nothing was read."""
    key = (limit.metric, site_of(limit))
    return diagnose(row(edit, {} if math.isnan(value) else {key: value}) for edit, value in enumerate(values))


def said(limit: Pinned, diagnosis: Diagnosis) -> list[tuple[int, str]]:
    return [(finding.edit, finding.verdict) for finding in diagnosis.findings if finding.rule == limit.rule]


def test_each_limit_is_written_down_here() -> None:
    assert [limit.rule for limit in LIMITS] == [limit.rule for limit in PINNED]


@EVERY
def test_it_speaks_at_the_limit_and_not_short_of_it(limit: Pinned) -> None:
    before = [] if limit.start_only else [math.nan]
    assert said(limit, run(limit, *before, *[limit.at] * limit.times)) == [
        (len(before) + limit.times - 1, limit.verdict)
    ]
    assert said(limit, run(limit, *before, *[limit.short] * (limit.times + 2))) == []


@EVERY
def test_it_speaks_far_beyond_the_limit_and_is_silent_far_from_it(limit: Pinned) -> None:
    before, apart = [] if limit.start_only else [math.nan], 50.0 * (limit.at - limit.short)
    assert len(said(limit, run(limit, *before, *[limit.at + apart] * limit.times))) == 1
    if limit.short != 0:  # what is none can't be less
        assert said(limit, run(limit, *before, *[limit.short - apart] * limit.times)) == []


@EVERY
def test_it_takes_so_many_readings_in_a_row_and_those_that_are_missing_are_passed_over(limit: Pinned) -> None:
    if limit.times == 1:
        return
    few = [limit.at] * (limit.times - 1)
    assert said(limit, run(limit, math.nan, *few, limit.short, *few)) == []
    (found,) = said(limit, run(limit, math.nan, *few, math.nan, limit.at))
    assert found == (limit.times + 1, limit.verdict)


@EVERY
def test_it_names_the_value_the_limit_the_place_and_since_when(limit: Pinned) -> None:
    before = [] if limit.start_only else [math.nan]
    (found,) = (each for each in run(limit, *before, *[limit.at] * limit.times).findings if each.rule == limit.rule)
    assert (found.metric, found.site, found.value) == (limit.metric, site_of(limit), limit.at)
    between = sorted([limit.at, limit.short])
    assert between[0] <= found.threshold <= between[1]
    first = len(before)
    assert not {"{", "}"} & set(found.says)
    assert ("Since edit" in found.says) == (limit.times > 1)
    if limit.times > 1:
        assert found.since == first
        assert f"ince edit {first} " in found.says
    else:
        assert found.since is None


@EVERY
def test_once_it_was_said_of_a_place_it_is_not_said_again(limit: Pinned) -> None:
    before = [] if limit.start_only else [math.nan]
    assert len(said(limit, run(limit, *before, *[limit.at] * 9))) == 1
    assert len(said(limit, run(limit, *before, *[limit.at] * limit.times, limit.short, *[limit.at] * limit.times))) == 1


@EVERY
def test_what_edits_alone_can_make_is_told_of_edit_zero_only(limit: Pinned) -> None:
    at_start = said(limit, run(limit, limit.at))
    later = said(limit, run(limit, math.nan, *[limit.at] * limit.times))
    if limit.start_only:
        assert (at_start, later) == ([(0, "stable")], [])
    else:
        assert later


@EVERY
def test_each_place_has_its_own_course(limit: Pinned) -> None:
    """Readings out of line in turn, at two layers, are none in a row at either."""
    if limit.metric.startswith("canary.") or limit.times == 1:
        return
    rows = [row(0, {})]
    for edit in range(1, 9):
        values = (limit.at, limit.short) if edit % 2 else (limit.short, limit.at)
        rows.append(row(edit, {(limit.metric, site): value for site, value in zip((A, "b"), values, strict=True)}))
    assert said(limit, diagnose(rows)) == []


@pytest.mark.parametrize(("nats", "spoken"), [(0.1, False), (0.101, True)])
def test_changed_answers_are_ties_while_the_canarys_predictions_are_where_they_were(nats: float, spoken: bool) -> None:
    lost = {("canary.agreement", "model"): 0.05, ("canary.kl", "model"): nats}
    rules = [finding.rule for finding in diagnose([row(0, {}), *(row(edit, lost) for edit in (1, 2, 3))]).findings]
    assert ("canary-lost" in rules) == spoken


@EVERY
def test_all_others_speak_whatever_the_canary_says(limit: Pinned) -> None:
    if limit.metric == "canary.kl":
        return
    still, key = {("canary.kl", "model"): 0.0}, (limit.metric, site_of(limit))
    before = [] if limit.start_only else [row(0, still)]
    rows = [*before, *(row(edit, still | {key: limit.at}) for edit in range(len(before), len(before) + limit.times))]
    assert len(said(limit, diagnose(rows))) == (limit.rule != "canary-lost")
