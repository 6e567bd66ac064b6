"""What led up to a run's end: the running memory beside a naive one that keeps every row.

What each field means is said by `stabilitylab.analysis.causes.evidence`.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from stabilitylab.analysis.causes.evidence import Evidence, Growth, Learning, Step, Way
from stabilitylab.analysis.columns import Columns
from stabilitylab.analysis.landing import Landing
from stabilitylab.analysis.leadin import LeadIn
from stabilitylab.analysis.restoring import Restoring
from stabilitylab.analysis.steadiness import Steadiness
from stabilitylab.record.readings import EditRow
from tests.synthetic_runs import METRICS, row

LAYERS = ("decoder.layers.1.fc1", "decoder.layers.1.fc2", "decoder.layers.2.fc1")
EDITORS = ("editor.a.u", "editor.a.v")


def loop(seed: int) -> list[EditRow]:
    """Edits whose updates and editor inputs grow, or don't; some fail, some leave a layer alone, some aren't read."""
    rng = np.random.default_rng([6, seed])
    rise, spread = rng.choice([0.0, 0.05, 0.3]), rng.choice([0.05, 0.5])
    drift = dict.fromkeys(LAYERS, 0.0)
    source = dict(zip(LAYERS, rng.choice([0.0, 1.0, 2.0, 3.0, 4.0], 3), strict=True))
    rows = [row(0, {("update.norm", site): 0.0 for site in LAYERS})]
    for edit in range(1, int(rng.integers(6, 45))):
        readings = {}
        for site in LAYERS:
            norm = 0.0 if rng.random() < 0.2 else float(np.exp(rise * edit + spread * rng.standard_normal()))
            first = float(np.exp(rng.standard_normal())) if rng.random() < 0.9 else 0.0
            drift[site] = abs(drift[site] + float(rng.choice([1.0, 1.0, -0.5])) * norm)
            readings |= {
                ("update.norm", site): norm,
                ("update.ratio", site): norm / (20.0 + norm),
                ("drift.norm", site): drift[site],
                ("drift.ratio", site): drift[site] / 20.0,
                ("gradient.norm", site): first,
                ("gradient.norm_last", site): first * float(rng.choice([0.01, 0.05, 0.051, 0.9, 0.995, 1.0, 1.02])),
            }
            if rng.random() < 0.9:
                readings["gradient.source", site] = float(source[site])
            if rng.random() < 0.9:
                readings["weight.norm", site] = float(rng.choice([math.nan, 0.0, 5.0, 20.0]))
        for site in EDITORS:
            if rng.random() < 0.9:
                readings["editor.input_max", site] = float(np.exp(rise * edit + spread * rng.standard_normal()))
        rows.append(row(edit, readings, "failed" if rng.random() < 0.1 else None))
    return rows


def evidence_of(rows: list[EditRow], lead: LeadIn | None = None) -> Evidence:
    columns = Columns(METRICS)
    lead = lead or LeadIn(columns, Restoring(), Steadiness())
    for each in rows:
        lead.observe(columns.flatten(each), alarmed=False, lost=False, nonfinite=False)
    return lead.evidence("stable", (), None, Landing())


def at(each: EditRow, name: str) -> dict[str, float]:
    return {site: float(values[0]) for (metric, site), values in each.readings.items() if metric == name}


def applied(rows: list[EditRow]) -> list[EditRow]:
    return [each for each in rows if each.status == "applied"]


def naive_growth(rows: list[EditRow]) -> Growth | None:
    """The joint growth of the largest input and update over the last 12 or 30 edits, as far as both surely grow."""
    points = []
    for each in applied(rows):
        inputs, updates = at(each, "editor.input_max").values(), at(each, "update.norm").values()
        if inputs and updates and min(max(inputs), max(updates)) > 0:
            points.append((each.edit, math.log(max(inputs)), math.log(max(updates))))
    best: Growth | None = None
    for window in (12, 30):
        edits, *logs = np.array(points[-window:]).T if points else ([],)
        if len(edits) < 5:
            continue
        slopes = [stats.theilslopes(path, edits, alpha=0.9) for path in logs]
        if any(slope.low_slope <= 0 for slope in slopes):
            continue
        span = edits[-1] - edits[0]
        one, other = (math.exp(slope.slope * span) for slope in slopes)
        if best is None or min(one, other) > best.least:
            best = Growth(int(edits[0]), int(edits[-1]), one, other)
    return best


def naive_ways(rows: list[EditRow]) -> list[Way]:
    ways = []
    for site in LAYERS:
        moves = [(each, at(each, "update.norm")[site]) for each in applied(rows) if at(each, "update.norm").get(site)]
        if not moves:
            continue
        norms = [norm for _, norm in moves]
        rates = [norm / gradient if (gradient := at(each, "gradient.norm")[site]) else 0.0 for each, norm in moves]
        ways.append(
            Way(
                site=site,
                edits=len(moves),
                added=sum(norms),
                largest=max(norms),
                drift=at(moves[-1][0], "drift.norm")[site],
                first=norms[0],
                last=norms[-1],
                first_rate=rates[0],
                last_rate=rates[-1],
                stepped=sum(at(each, "gradient.source").get(site) in (1.0, 4.0) for each, _ in moves),
                **norms_of(moves[-1][0], site),
            )
        )
    return ways


def norms_of(each: EditRow, site: str) -> dict[str, float]:
    """The original weight's and the weight's, by what was read of both."""
    norm, ratio = at(each, "weight.norm").get(site, 0.0), at(each, "drift.ratio")[site]
    known = norm > 0 and ratio > 0
    return {"original": at(each, "drift.norm")[site] / ratio if known else 0.0, "norm": norm if known else 0.0}


def naive_learning(rows: list[EditRow]) -> Learning:
    left = []
    for each in applied(rows):
        first, last = at(each, "gradient.norm"), at(each, "gradient.norm_last")
        shares = [last[site] / first[site] for site in LAYERS if first.get(site)]
        left += [statistics.median(shares)] if shares else []
    return Learning(len(left), sum(share <= 0.05 for share in left))


def naive_steps(rows: list[EditRow]) -> list[Step]:
    steps: list[Step] = []
    for each in applied(rows):
        ratios, drifts, norms = at(each, "update.ratio"), at(each, "drift.ratio"), at(each, "update.norm")
        update, drift = max(ratios, key=ratios.__getitem__), max(drifts, key=drifts.__getitem__)
        # Each weight's original norm is 20.
        large = any(norm >= 10.0 for norm in norms.values())
        before = steps[-1] if steps else Step(0, 0.0, "", 0.0, "", 0, 0, 0.0)
        steps.append(
            Step(
                each.edit,
                ratios[update],
                update,
                drifts[drift],
                drift,
                before.number + any(norms.values()),
                before.large + large,
                max(before.largest, ratios[update]),
            )
        )
    return steps


@pytest.mark.parametrize("seed", range(40))
def test_what_is_remembered_is_what_a_naive_look_at_all_rows_finds(seed: int) -> None:
    rows = loop(seed)
    found = evidence_of(rows)
    expected = naive_growth(rows)
    assert (found.growth is None) == (expected is None)
    if found.growth is not None and expected is not None:
        assert (found.growth.first_edit, found.growth.last_edit) == (expected.first_edit, expected.last_edit)
        assert found.growth.input_factor == pytest.approx(expected.input_factor)
        assert found.growth.update_factor == pytest.approx(expected.update_factor)
        assert found.growth.least == min(found.growth.input_factor, found.growth.update_factor)
    ways = {way.site: way for way in found.ways}
    for way in naive_ways(rows):
        assert {name: pytest.approx(value) for name, value in vars(way).items()} == vars(ways.pop(way.site))
    assert not ways
    assert found.learning == naive_learning(rows)
    steps = naive_steps(rows)
    assert found.latest == (steps[-1] if steps else None)
    last = applied(rows)[-1] if applied(rows) else rows[0]
    pairs = [(at(last, "gradient.norm_last")[site], first) for site, first in at(last, "gradient.norm").items()]
    assert found.changes_inside == any(abs(end - first) > 0.01 * abs(first) for end, first in pairs)
    assert found.moved == any(norm for each in rows for norm in at(each, "update.norm").values())
    assert not found.codebook
    assert found.reported


@pytest.mark.parametrize(("lost", "alarmed"), [(9, None), (None, 9), (9, 14), (14, 9)])
def test_the_last_thirty_steps_up_to_the_alarm_or_the_first_fact_are_kept(
    lost: int | None, alarmed: int | None
) -> None:
    from stabilitylab.analysis.findings import Finding

    rows = [each for each in loop(5) if each.status != "failed"]
    assert {2, 9, 10, 14} <= {each.edit for each in rows}
    columns = Columns(METRICS)
    lead = LeadIn(columns, Restoring(), Steadiness())
    for each in rows:
        now = each.edit
        lead.observe(
            columns.flatten(each),
            alarmed=alarmed is not None and now >= alarmed,
            lost=lost is not None and now >= lost,
            nonfinite=False,
        )
    steps = naive_steps(rows)
    for bad in (each.edit for each in rows if each.edit in (2, 9, 10, 14)):
        finding = Finding("drift", "update.norm", LAYERS[0], bad, 1.0, 0.5, "diverging", "")
        kept = lead.evidence("diverging", (finding,), finding, Landing()).steps
        ends = [end for end in sorted(end for end in (lost, alarmed) if end is not None) if end >= bad]
        assert list(kept) == ([step for step in steps if step.edit <= ends[0]] if ends else [])


@pytest.mark.parametrize(
    ("aligned", "way"),
    [
        (0.9, Way("a", 12, 10.0, 2.0, 9.0, 1.0, 1.0, 0.0, 0.0, 0)),
        (0.0, Way("a", 12, 10.0, 5.0, 9.0, 1.0, 1.0, 0.0, 0.0, 0)),  # one of them is half of their sum
        (0.9, Way("a", 12, 10.0, 4.99, 9.0, 1.0, 1.0, 0.0, 0.0, 0)),
    ],
)
def test_a_way_is_that_of_many(aligned: float, way: Way) -> None:
    assert way.aligned == pytest.approx(aligned)


@pytest.mark.parametrize(
    ("inwards", "original", "norm"),
    [(1.0, 12.0, 3.0), (0.0, 12.0, 12.0), (-0.5, 12.0, 16.5), (0.0, 0.0, 0.0)],
)
def test_how_much_of_a_way_made_the_weight_shorter(inwards: float, original: float, norm: float) -> None:
    way = Way("a", 12, 10.0, 2.0, 9.0, 1.0, 1.0, 0.0, 0.0, 0, original, norm)
    assert way.inwards == pytest.approx(inwards)
    assert replace(way, drift=0.0).inwards == 0


@pytest.mark.parametrize("seed", range(5))
def test_whether_a_weight_was_only_scaled_up_is_a_cosine(seed: int) -> None:
    chance = np.random.default_rng(seed)
    original = chance.standard_normal(50)
    moved = chance.uniform(-1, 2) * original + chance.uniform(0, 2) * chance.standard_normal(50)
    drift = float(np.linalg.norm(moved))
    way = Way(
        "a",
        12,
        10.0,
        2.0,
        drift,
        1.0,
        1.0,
        0.0,
        0.0,
        0,
        *(float(np.linalg.norm(w)) for w in (original, original + moved)),
    )
    assert way.outwards == pytest.approx(float(original @ moved) / (drift * way.original))
    assert replace(way, drift=0.0).outwards == 0
    assert replace(way, original=0.0).outwards == 0
    assert replace(way, norm=0.0).outwards == 0
