"""What a scan's figures of an editor, of dtypes and of trials warn of, at each limit."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from stabilitylab.analysis.cautions import cautions
from stabilitylab.record.scanned import CapacityScan, Some
from tests.caution_cases import (
    CACHE,
    ONE,
    PLACE,
    RATES,
    TWO,
    Case,
    check_limits,
    check_words,
    every,
    moments,
    of_rule,
    precision,
    projection,
    scan_of,
    statistics,
)

CASES = (
    Case(
        "spread-of-few-rows",
        "risk",
        statistics(rows=9.0),
        "MEND's statistics for fc1, fc2 were made from 9 rows: a spread of so few is a guess.",
        PLACE,
        also=[statistics(rows=2.0)],
        silent=[statistics(rows=10.0), statistics(rows=None), statistics(rows=0.0)],
    ),
    Case(
        "spread-of-few-rows",
        "fatal",
        (*statistics(rows=1.0), *statistics(rows=1.0, kind="v")),
        "were made from 1 row: one row has no spread.",
        PLACE,
    ),
    Case(
        "normaliser-empty",
        "fatal",
        statistics(rows=0.0, zero=TWO),
        "The normaliser of MEND for fc1, fc2 has seen no row: its spreads mean nothing yet.",
        PLACE,
        silent=[statistics()],
    ),
    Case(
        "normaliser-empty",
        "note",
        statistics(rows=0.0, editor="UltraEdit", layers=()),
        "The normaliser of UltraEdit for mlp.0 has seen nothing yet; it learns in each edit.",
        "mlp.0",
        also=[statistics(rows=0.0, editor="RLEditTrainer")],
    ),
    Case(
        "spread-nan",
        "fatal",
        statistics(nan=TWO, nan_means=1),
        "The spread of 2 of 256 units of fc1, fc2 is not finite in MEND's statistics of the inputs",
        PLACE,
        silent=[statistics(), statistics(nan=TWO, rows=0.0)],
    ),
    Case(
        "spread-nan",
        "fatal",
        statistics(nan_means=3, kind="v"),
        "The mean of 3 of 256 units of fc1, fc2 is not finite in MEND's statistics of the gradients at the output",
        PLACE,
    ),
    Case(
        "spread-zero",
        "fatal",
        statistics(zero=Some(256, (0,))),
        "No unit of fc1, fc2 has any spread in MEND's statistics of the inputs, as if they were made from one row.",
        PLACE,
        silent=[statistics()],
    ),
    Case(
        "spread-zero",
        "fatal",
        statistics(zero=ONE),
        "Unit 17 of fc1, fc2 has zero spread in MEND's statistics of the inputs: its first non-zero value is divided by"
        " 1e-7.",
        PLACE,
    ),
    Case(
        "spread-zero",
        "fatal",
        statistics(zero=TWO, dtype="float16", kind=""),
        "Units 17 and 80 of fc1, fc2 have zero spread in MEND's statistics of the inputs and gradients: their first"
        " non-zero value is divided by 1e-7. They are kept in float16, where less than 6e-8 is rounded to 0",
        PLACE,
    ),
    Case(
        "spread-tiny",
        "risk",
        statistics(tiny=TWO, guard=0.001),
        "Units 17 and 80 of fc1, fc2 have next to no spread in MEND's statistics of the inputs, down to 0.001 where the"
        " median is 0.5: a usual value there comes out as 250.",
        PLACE,
        silent=[statistics(), statistics(tiny=TWO, typical=None), statistics(tiny=TWO, typical=0.0)],
    ),
    Case("spread-tiny", "risk", statistics(tiny=ONE), "Unit 17 of fc1, fc2 has next to no spread", PLACE),
    Case(
        "rate-nan",
        "fatal",
        (replace(RATES, values=(1e-4, math.nan, math.inf)),),
        "2 of 3 learned rates of MEND (edit_lrs) are not finite.",
        "MEND edit_lrs",
        silent=[(RATES,)],
    ),
    Case(
        "rate-lost",
        "risk",
        (replace(RATES, values=(1e-4, 0.0)),),
        "1 of 2 learned rates of MEND (edit_lrs) are 0: edits there do nothing, or the opposite.",
        "MEND edit_lrs",
        silent=[(RATES,), (replace(RATES, values=(0.0, math.nan)),)],
    ),
    Case("rate-lost", "risk", (replace(RATES, values=(-1e-4, 0.0)),), "are 0 or below:", "MEND edit_lrs"),
    Case(
        "cache-nan",
        "fatal",
        (CACHE, replace(CACHE, name="b", nonfinite=2)),
        "The cache of edited keys is not finite in b: each solve with it gives NaN.",
        "b",
        silent=[(CACHE,)],
    ),
    Case(
        "cache-not-empty",
        "note",
        (CACHE, *(replace(CACHE, name=name, zero_rows=Some(7)) for name in "abcdef")),
        "(a, b, c, d and 2 more): updates are held away from them.",
        "a",
        silent=[(CACHE,), (replace(CACHE, zero_rows=Some(7), nonfinite=1),)],
    ),
    Case(
        "moments-nan",
        "fatal",
        moments(nonfinite=2, smallest=-1.0),
        "2 entries of the second moments of fc2 are not finite: their inverse is NaN.",
        "fc2",
        silent=[moments()],
    ),
    Case(
        "moments-negative",
        "fatal",
        moments(smallest=-1.1e-4, layer=""),
        "The second moments of C have a negative eigenvalue, -0.00011: they are none.",
        "C",
        silent=[moments(smallest=-0.9e-4), moments(smallest=None), moments(smallest=-1.0, largest=None)],
    ),
    Case(
        "moments-not-symmetric",
        "risk",
        moments(asymmetry=0.02),
        "The second moments of fc2 are not symmetric: ‖C − Cᵀ‖ is 2% of ‖C‖.",
        "fc2",
        also=[moments(asymmetry=1.01e-3)],
        silent=[moments(asymmetry=1e-3), moments(asymmetry=None)],
    ),
    Case(
        "moments-of-few-tokens",
        "risk",
        moments(tokens=255.0),
        "The second moments of fc2 were made from 255 tokens for 256 inputs: they can't be inverted.",
        "fc2",
        silent=[moments(tokens=256.0), moments(tokens=None)],
    ),
    Case(
        "moments-zero-rows",
        "risk",
        moments(zero_rows=ONE),
        "Unit 17 of fc2 was 0 in all text that its second moments are of",
        "fc2",
        silent=[moments(), moments(zero_rows=ONE, tokens=255.0)],
    ),
    Case("moments-zero-rows", "risk", moments(zero_rows=TWO), "Units 17 and 80 of fc2 were 0 in all text", "fc2"),
    Case(
        "moments-singular",
        "risk",
        moments(condition=1e7, rank=200),
        "The second moments of fc2 have a condition of 1e7 (rank 200 of 256): past 1e7",
        "fc2",
        silent=[moments(condition=9.9e6), moments(condition=None), moments(condition=1e7, zero_rows=ONE)],
    ),
    Case("moments-singular", "risk", moments(condition=1e7), "have a condition of 1e7: past 1e7 their inverse", "fc2"),
    Case(
        "no-projection",
        "fatal",
        projection(idempotence=0.011),
        "The projection P is none: ‖P² − P‖ is 0.011 of ‖P‖.",
        "P",
        silent=[projection(), projection(idempotence=0.01), projection(idempotence=None)],
    ),
    Case("no-projection", "fatal", projection(nonfinite=1), "The projection P is not finite.", "P"),
    Case(
        "projection-extreme",
        "note",
        projection(rank=99),
        "The projection P leaves 99.0% of the input directions free: next to nothing is preserved.",
        "P",
        silent=[projection(rank=98), projection(rank=11), projection(rank=None), projection(rank=99, nonfinite=1)],
    ),
    Case("projection-extreme", "note", projection(rank=10), "10.0% of the input directions free: there is little", "P"),
    Case(
        "few-steps",
        "risk",
        (CapacityScan("fc2", 2.9, 2.0, 4.0, 1.0, 8),),
        "2.9 times its typical update, along it, makes the canary a lost one at fc2.",
        "fc2",
        silent=[(CapacityScan("fc2", 3.0, 2.0, 4.0, 1.0, 8),), (CapacityScan("fc2", math.inf, 2.0, 4.0, 1.0, 8),)],
    ),
    Case(
        "would-not-fit",
        "risk",
        precision(dtype="float16", overflowing=3),
        "float16 can't hold 3 of the model's 1,000 weights: it ends at 65,504.",
        "",
        silent=[precision()],
    ),
    Case(
        "would-be-swallowed",
        "risk",
        precision(swallowed=90),
        "bfloat16 would round 90% of these updates' entries away.",
        "",
        silent=[precision(swallowed=89), precision(updates=0, swallowed=0), precision(updates=None, swallowed=None)],
    ),
    Case(
        "would-answer-otherwise",
        "risk",
        precision(kl_nats=1.0),
        "Cast to bfloat16, the model's answer to the canary is 1 nats from what it is, before any edit.",
        "",
        silent=[precision(kl_nats=0.99), precision(kl_nats=None)],
    ),
    Case("would-answer-otherwise", "risk", precision(kl_nats=math.nan), "to the canary is not finite, before", ""),
)


@every(CASES)
def test_it_is_warned_of_once_in_these_words(case: Case) -> None:
    check_words(case)


@every(CASES)
def test_it_is_warned_of_at_the_limit_and_not_short_of_it(case: Case) -> None:
    check_limits(case)


@pytest.mark.parametrize(("dtype", "cause"), [("float16", "float16-limit"), ("bfloat16", "")])
def test_only_float16_ends_where_an_answer_that_changes_may_lead(dtype: str, cause: str) -> None:
    (found,) = of_rule("would-answer-otherwise", *precision(dtype=dtype, kl_nats=2.0))
    assert found.cause == cause


def test_an_editor_whose_own_tensors_are_lost() -> None:
    broken = replace(scan_of(), editor_nonfinite=dict.fromkeys("abcdef", 2))
    (found,) = cautions(broken)
    assert (found.rule, found.urgency, found.place) == ("hypernetwork-nan", "fatal", "a")
    assert "12 entries of the editor's own tensors are not finite, in a, b, c, d and 2 more:" in found.says
