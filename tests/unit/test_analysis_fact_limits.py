"""The limits of the hard facts that need more than one metric or edit, from both sides, and what is said there.

A case is one rule: the readings of each edit (edit 0 first) at which it speaks, and readings just short of that. The
figures are those that the modules' headers and docs/causes.md give reasons for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest

from stabilitylab.analysis import Diagnosis, Finding
from stabilitylab.record.readings import Key
from tests.synthetic_runs import diagnose, row

A, B, C, M = "decoder.layers.1.fc1", "decoder.layers.1.fc2", "decoder.layers.2.fc1", "model"
U, V = "editor.mlp.0.u", "editor.mlp.0.v"
Reading = dict[Key, float]


def run(readings: list[Reading]) -> Diagnosis:
    return diagnose(row(edit, each) for edit, each in enumerate(readings))


def of_rule(rule: str, readings: list[Reading]) -> list[Finding]:
    return [finding for finding in run(readings).findings if finding.rule == rule]


@dataclass(frozen=True)
class Case:
    """speaks: at the last edit of these, and not before. words: in its sentence. since: where it says so."""

    rule: str
    verdict: str
    speaks: list[Reading]
    silent: list[list[Reading]]
    words: str
    site: str = A
    since: int | None = None


def bits(*values: float) -> list[Reading]:
    return [{("weight.headroom_bits", A): value} for value in values]


def entry(largest: float, update: float, before: float = 0.5) -> list[Reading]:
    return [
        {("weight.max_abs", A): before, ("update.norm", A): 0.0},
        {("weight.max_abs", A): largest, ("update.norm", A): update},
    ]


def losses(*values: float) -> list[Reading]:
    return [{}, *({("logits.loss", M): value} for value in values)]


def cache(energies: list[float], drifts: list[float] | None = None) -> list[Reading]:
    """Edits that each begin at the original weights, unless `drifts` says otherwise."""
    drifts = drifts or [1.0] * len(energies)
    return [
        {("editor.cache_energy", A): energy, ("update.norm", B): 1.0 if edit else 0.0, ("drift.norm", B): drift}
        for edit, (energy, drift) in enumerate(zip(energies, drifts, strict=True))
    ]


def stalled(edits: int, *, writes: float = 1.0, moved_at: int = 0) -> list[Reading]:
    return [
        {
            ("update.norm", A): float(edit == moved_at > 0),
            ("update.norm", B): 1.0 if edit else 0.0,
            ("update.writes", A): writes if edit else 0.0,
        }
        for edit in range(edits + 1)
    ]


def inputs(*values: float) -> list[Reading]:
    return [{}, *({("editor.input_max", U): value} for value in values)]


def solve(residual: float, condition: float) -> list[Reading]:
    return [{}, {("editor.solve_residual", A): residual, ("editor.system_condition", A): condition}]


def denominators(*values: float) -> list[Reading]:
    return [{}, *({("editor.denominator_ratio", A): value} for value in values)]


def gradients(loss: float, *norms: float) -> list[Reading]:
    return [{}, *({("logits.loss", M): loss + edit / 100, ("gradient.norm", A): n} for edit, n in enumerate(norms))]


def carried(*counts: float) -> list[Reading]:
    return [{}, *({("gradient.carried", A): count} for count in counts)]


def moved(*shares: float, zeros: float = 0.5, source: float = 1.0, norm: float = 1.0) -> list[Reading]:
    """Edits that step with a gradient of which half of the entries are zero."""
    beside = {("gradient.source", A): source, ("gradient.zero_share", A): zeros, ("gradient.norm", A): norm}
    return [{}, *({("update.moved_share", A): share, **beside} for share in shares)]


def put_back(*steps: tuple[float, float]) -> list[Reading]:
    """Per edit how far layer A and layer B are from their originals, after updates of 1 each."""
    return [
        {("update.norm", s): float(edit > 0) for s in (A, B)} | {("drift.norm", A): a, ("drift.norm", B): b}
        for edit, (a, b) in enumerate([(0.0, 0.0), *steps])
    ]


def spreads(*pairs: tuple[float, float]) -> list[Reading]:
    return [{("editor.std_min", U): one, ("editor.std_min", V): other} for one, other in pairs]


def still(*updates: float) -> list[Reading]:
    return [{("update.norm", A): update} for update in (0.0, *updates)]


def codes(source: float) -> list[Reading]:
    return moved(0.05, 0.05, 0.05, source=source)


CASES = (
    Case("headroom", "diverging", bits(9.0, 1.99), [bits(9.0, 2.0)], "1.99 bits (doublings) from"),
    Case("headroom", "diverging", bits(1.5, 0.5), [bits(1.5, 0.51)], "0.5 bits (doublings) from"),
    Case("headroom-before", "stable", bits(1.99), [bits(2.0)], "only 1.99 bits from overflow when first read"),
    Case(
        "one-entry",
        "diverging",
        entry(50.0, 51.0),
        [entry(49.9, 49.9), entry(50.0, 51.1), entry(50.0, 48.9)],
        "from at most 0.5 to 50",
    ),
    Case("one-entry", "diverging", entry(50.0, 49.0), [entry(50.0, 50.0, before=0.51)], "changed one entry of"),
    Case(
        "frozen-loss",
        "stable",
        losses(2.0, 3.0, 3.0, 3.0, 3.0, 3.0),
        [losses(3.0, 3.0, 3.0, 3.0), losses(*[0.01] * 9), losses(*[math.inf] * 9), losses(*[math.nan] * 9)],
        "The loss is 3 to the last bit at every edit since 2",
        site=M,
        since=2,
    ),
    Case(
        "cache-grows",
        "stable",
        cache([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]),
        [
            cache([0.0, 1.0, 2.0, 3.0, 4.0, 5.0]),
            cache([0.0, 1.0, 2.0, 3.0, 3.0, 4.0, 5.0, 6.0, 7.0]),
            cache([0.0, *map(float, range(1, 12))], [0.0, *(edit**0.5 for edit in range(1, 12))]),
        ],
        "grows with each edit, though each begins at the original weights",
        since=2,
    ),
    Case(
        "site-stalled",
        "stable",
        stalled(10),
        [stalled(9), stalled(15, writes=0.0), stalled(15, moved_at=3)],
        f"10 edits wrote {A} and moved nothing there",
        since=1,
    ),
    Case("input-large", "drifting", inputs(100.0), [inputs(99.9)], "100 standard deviations", U),
    Case("input-limit", "diverging", inputs(1_000.0), [inputs(999.0)], "1,000 standard deviations", U),
    Case(
        "solve-failed",
        "drifting",
        solve(0.01, 1e7),
        [solve(0.0099, 1e7), solve(0.01, 9.9e6), solve(0.5, math.nan)],
        "leaves 1% of its right side unanswered, with a system of condition 1e7",
    ),
    Case(
        "denominator-fell",
        "stable",
        denominators(0.5, 0.9, 0.3, 0.6, 0.4, 0.05),
        [denominators(0.5, 0.9, 0.3, 0.6, 0.4, 0.051), denominators(0.5, 0.9, 0.3, 0.6, 0.05)],
        "fell to 0.05 of ‖u‖‖k‖ at edit 6; usual is 0.5",
    ),
    Case(
        "zero-gradient",
        "stable",
        gradients(0.02, 0.0, 0.0, 0.0),
        [
            gradients(0.02, 0.0, 0.0),
            gradients(-0.03, 0.0, 0.0, 0.0),
            gradients(0.02, 0.0, 0.0, 1e-30, 0.0, 0.0),
            gradients(math.inf, *[0.0] * 9),
        ],
        "Since edit 1 the loss",
        since=1,
    ),
    Case(
        "zero-gradient",
        "drifting",
        gradients(0.02, 1.0, 0.0, 0.0, 0.0),
        [gradients(0.02, 1.0, 0.0, 0.0)],
        "though it did before",
        since=2,
    ),
    Case(
        "gradients-carried",
        "stable",
        carried(0.0, 1.0, 1.0, 1.0),
        [carried(1.0, 1.0), carried(1.0, 1.0, 0.0, 1.0, 1.0)],
        "Since edit 2 the optimizer steps at",
        since=2,
    ),
    Case(
        "update-swallowed",
        "stable",
        moved(0.3, 0.05, 0.05, 0.04),
        [
            moved(0.05, 0.05),
            moved(0.051, 0.051, 0.051),
            moved(0.05, 0.05, 0.3, 0.05, 0.05),
            moved(0.0, 0.0, 0.0),
            moved(0.05, 0.05, 0.05, norm=0.0),
            moved(0.05, 0.05, 0.05, norm=math.inf),
            codes(0.0),
            codes(3.0),
        ],
        "92% of the entries that have a gradient",
        since=2,
    ),
    Case("update-swallowed", "stable", codes(2.0), [codes(4.0)], "Since edit 1 the dtype of", since=1),
    Case(
        "not-put-back",
        "diverging",
        put_back(*[(1.0, 1.0 + edit) for edit in range(6)]),
        [put_back(*[(1.0, 1.0 + edit) for edit in range(5)]), put_back(*[(1.0, 1.009)] * 9)],
        "is not put back between edits while another one is: at 5 edits in a row, since edit 2",
        B,
        since=2,
    ),
    Case(
        "statistics-restarted",
        "drifting",
        spreads((0.2, 0.01), (0.2, 0.01), (0.16, 0.0125)),
        [spreads((0.2, 0.01), (0.2, 0.01), (0.161, 0.0125)), spreads((0.2, 0.01), (0.2, 0.01), (0.16, 0.0124))],
        "all jumped at once",
        U,
    ),
    Case("tiny-std", "stable", spreads((9e-7, 1.0)), [spreads((1.1e-6, 1.0)), spreads((1.0, 9e-7))], "", U),
    Case(
        "edits-lost",
        "stable",
        still(1.0, 0.0, 0.0, 0.0),
        [still(1.0, 0.0, 0.0), still(0.0, 0.0, 1.0, 0.0, 0.0)],
        "Edits 2 to 4 had no effect, though edits did before: they did not move the watched site",
        since=2,
    ),
)
EVERY = pytest.mark.parametrize("case", CASES, ids=[f"{case.rule}-{number}" for number, case in enumerate(CASES)])


@EVERY
def test_it_speaks_at_the_limit_and_says_what_it_saw(case: Case) -> None:
    (found,) = of_rule(case.rule, case.speaks)
    assert (found.verdict, found.site, found.edit) == (case.verdict, case.site, len(case.speaks) - 1)
    assert found.since == case.since
    assert case.words in found.says


@EVERY
def test_it_does_not_speak_short_of_it(case: Case) -> None:
    assert of_rule(case.rule, case.speaks[:-1]) == []
    for readings in case.silent:
        assert of_rule(case.rule, readings) == [], readings


@EVERY
def test_it_speaks_once(case: Case) -> None:
    assert len(of_rule(case.rule, [*case.speaks, case.speaks[-1], case.speaks[-1]])) == 1


def test_a_failed_edit_stops_no_count() -> None:
    """What an edit that raised has read says nothing of a loop's gradients and losses, and is passed over."""
    for case in CASES:
        if case.rule in ("frozen-loss", "zero-gradient", "gradients-carried", "update-swallowed"):
            readings = [*case.speaks[:-1], {}, case.speaks[-1]]
            rows = [
                row(edit, each, "failed" if edit == len(readings) - 2 else "applied")
                for edit, each in enumerate(readings)
            ]
            found = [finding.edit for finding in diagnose(rows).findings if finding.rule == case.rule]
            assert found == [len(readings) - 1], case.rule


def size(step: float, kl: float, agreement: float = 1.0) -> Reading:
    """An edit that moves a weight by `step` times its original norm, which is 1, and what the canary says then."""
    return {
        **{("update.norm", A): step, ("drift.norm", A): step, ("drift.ratio", A): step},
        **{("canary.kl", M): kl, ("canary.agreement", M): agreement},
    }


@pytest.mark.parametrize(
    ("kl", "agreement", "verdict"),
    [
        (0.1, 1.0, "drifting"),
        (0.101, 1.0, "diverging"),
        (0.0, 0.9, "drifting"),
        (0.0, 0.899, "diverging"),
    ],
)
def test_a_large_step_is_drift_while_the_canary_holds_still(kl: float, agreement: float, verdict: str) -> None:
    (found,) = of_rule("large-step", [{}, size(0.001, 0.0), size(20.0, kl, agreement)])
    assert found.verdict == verdict


@pytest.mark.parametrize(("wait", "counts"), [(10, True), (11, False)])
def test_a_canary_that_leaves_within_ten_edits_gives_the_step_its_meaning(wait: int, counts: bool) -> None:
    calm = [size(0.001, 0.0)] * (wait - 1)
    found = of_rule("large-step-harmful", [{}, size(20.0, 0.0), *calm, size(0.001, 0.15)])
    assert [(finding.edit, finding.since, finding.verdict) for finding in found] == (
        [(1 + wait, 1, "diverging")] if counts else []
    )
