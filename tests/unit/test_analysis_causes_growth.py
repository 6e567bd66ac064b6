"""Rules of growth, of models that are dead, and of edits that are lost, at their limits."""

from __future__ import annotations

import math
from dataclasses import replace

from stabilitylab.analysis.causes.evidence import Evidence, Growth, Learning, Place
from tests.cause_cases import (
    BAD,
    DIVIDED,
    EMPTY,
    LONE,
    OTHER,
    STEP,
    WAY,
    A,
    B,
    Case,
    M,
    bad,
    check_limits,
    check_words,
    every,
    finding,
    lost,
    noted,
)

CASES = (
    Case(
        "feedback-growth",
        {"growth": Growth(3, 14, 10.0, 12.0), "latest": STEP},
        "high",
        "from edit 3 to 14 the editor's normalised input grew 10-fold and the update it made 12-fold",
        also=[{"growth": Growth(3, 14, 12.0, 10.0)}, {"latest": None}],
        not_with=[{"growth": Growth(3, 14, 9.9, 12.0)}, {"growth": Growth(3, 14, 12.0, 9.9)}],
    ),
    Case(
        "learning-rate-too-high",
        bad()
        | {
            "steps": (replace(STEP, number=5, large=4),),
            "latest": replace(STEP, edit=6, number=5, large=4),
            "learning": Learning(5, 3),
        },
        "medium",
        "4 of 5 edits up to edit 6 each moved a weight by at least half of its original norm, and most edits reach what"
        " they ask for (3 of 5)",
        not_with=[
            {"verdict": "drifting"},
            {"findings": (BAD, LONE)},
            {"reported": True},
            {"steps": ()},
            {"latest": None},
            {"latest": replace(STEP, number=4, large=4)},
            {"latest": replace(STEP, number=5, large=3)},
            {"steps": (replace(STEP, number=5, large=3),)},
            {"learning": Learning(4, 4)},
            {"learning": Learning(6, 3)},
        ],
    ),
    Case(
        "learning-rate-too-high",
        bad()
        | {
            "steps": (replace(STEP, number=5, large=4, rate=0.3),),
            "latest": replace(STEP, edit=20, number=20, large=4),
            "learning": Learning(20, 10),
        },
        "low",
        "4 of 20 edits up to edit 20 each moved a weight by at least half of its original norm, by an optimizer's steps"
        " at a learning rate of 0.3.",
        not_with=[
            {"steps": (replace(STEP, number=5, large=4),)},
            {"steps": (replace(STEP, number=5, large=3, rate=0.3),)},
            {"latest": replace(STEP, number=20, large=3)},
            {"learning": Learning(20, 11)},
            {"reported": True},
        ],
    ),
    Case(
        "learning-rate-too-high",
        bad() | {"steps": (replace(STEP, rate=0.3, rate_factor=3.0, update_factor=9.0),), "latest": STEP},
        "high",
        "the learning rate was 0.3 at edit 5, 3 times that of the first edits, and the largest update 9 times theirs.",
        Place(5, "gradient.learning_rate", A, 0.3),
        not_with=[
            {"verdict": "drifting"},
            {"findings": (BAD, LONE)},
            {"steps": (replace(STEP, rate=0.3, rate_factor=2.9, update_factor=3.0),)},
            {"steps": (replace(STEP, rate=0.3, rate_factor=3.0, update_factor=2.9),)},
            {"steps": (replace(STEP, rate=0.3, rate_factor=3.0, update_factor=9.1),)},
            {"steps": (replace(STEP, rate=None, rate_factor=3.0, update_factor=9.0),)},
        ],
    ),
    Case(
        "weights-decayed",
        noted(finding("weight-shrunk", metric="weight.norm", verdict="drifting"), verdict="drifting")
        | {"ways": (replace(WAY, largest=20.0, drift=79.0),)},
        "medium",
        f"10 edits have worn down the weight of {A}, none of them by more than 20",
        Place(5, "weight.norm", A),
        not_with=[
            {"ways": (replace(WAY, largest=20.1, drift=79.0),)},
            {"ways": (replace(WAY, edits=9, drift=79.0),)},
            {"ways": (replace(WAY, site=B, drift=79.0),)},
            {"findings": ()},
        ],
    ),
    Case(
        "norm-growth",
        bad()
        | {
            "steps": (STEP,),
            "latest": replace(STEP, edit=9, number=14, drift_ratio=0.5, largest=0.25),
            "learning": Learning(20, 1),
        },
        "medium",
        f"14 edits have moved the weight of {B} by 0.5 times its original norm, none of them by more than 0.25",
        also=[{"learning": Learning(0, 0)}, {"ways": (replace(WAY, drift=79.0), OTHER)}],
        not_with=[
            {"verdict": "drifting"},
            {"findings": (BAD, LONE)},
            {"crossed": DIVIDED},
            {"learning": Learning(21, 1)},
            {"steps": (replace(STEP, number=9),)},
            {"steps": (replace(STEP, drift_ratio=0.39),)},
            {"latest": replace(STEP, number=14, drift_ratio=0.49)},
            {"latest": replace(STEP, number=14, drift_ratio=0.5, largest=0.251)},
            {"ways": (WAY, OTHER)},
        ],
    ),
    Case(
        "gradients-not-cleared",
        bad() | {"ways": (WAY, OTHER)},
        "medium",
        f"the first update was 0.5 times its gradient at every layer, as a plain step is, and the last one at {A} is"
        " 1.5 times its own; all 10 point the same way",
        Place(2, "update.norm", A),
        not_with=[
            {"ways": (WAY,)},  # one layer has no rate in common with any other
            {"ways": (replace(WAY, last_rate=1.49), OTHER)},
            {"ways": (WAY, replace(OTHER, first_rate=0.53))},
            {"ways": (replace(WAY, edits=9), OTHER)},
            {"ways": (replace(WAY, stepped=1), OTHER)},
            {"ways": (replace(WAY, drift=79.0), OTHER)},
            {"ways": (replace(WAY, last=1.99), OTHER)},
            {"verdict": "drifting"},
            {"growth": Growth(1, 2, 1.0, 1.0)},
        ],
    ),
    Case(
        "gradients-not-cleared",
        noted(finding("gradients-carried", edit=7, since=4, metric="gradient.carried"), verdict="drifting"),
        "medium",
        "since edit 4 the optimizer steps with gradients that it has stepped with before",
        Place(4, "gradient.carried", A),
        not_with=[{"findings": ()}],
    ),
    Case(
        "update-repeated",
        bad() | {"ways": (replace(WAY, last_rate=1.49), OTHER)},
        "medium",
        f"the 10 updates of {A} all point the same way (80% of their sum is distance), and the last is 2 times the",
        Place(1, "update.norm", A),
        also=[{"ways": (WAY,)}, {"ways": (WAY, replace(OTHER, first_rate=0.53))}],
        not_with=[
            {"ways": (WAY, OTHER)},
            {"ways": (replace(WAY, edits=9),)},
            {"ways": (replace(WAY, stepped=1),)},
            {"ways": (replace(WAY, drift=79.0),)},
            {"ways": (replace(WAY, last=1.99),)},
            {"verdict": "drifting"},
        ],
    ),
    Case(
        "codebook-overreach",
        {"findings": (finding("canary-moved", edit=9, since=7),), "codebook": True},
        "high",
        "since edit 7",
        also=[{"findings": (finding(rule),)} for rule in ("canary-lost", "canary-collapsed", "perplexity-lost")],
        not_with=[{"moved": True}, {"codebook": False}, {"findings": (finding("canary-far"),)}],
    ),
    Case(
        "dead-logits",
        bad(finding("dead"), verdict="collapsed"),
        "high",
        "all logits are equal since edit 5",
        not_with=[{"findings": (finding("dead"), LONE)}, {"first_bad": BAD}, {"first_bad": None}],
    ),
    Case(
        "zero-gradient",
        noted(finding("zero-gradient", edit=8, since=6), verdict="drifting"),
        "high",
        "since edit 6 the loss sends a gradient of exactly 0",
        not_with=[{"verdict": "diverging"}, {"findings": ()}],
    ),
    Case(
        "site-stalled",
        noted(finding("site-stalled")) | {"weights_dtype": "bfloat16"},
        "medium",
        f"{A} is written by each edit and never moves, while other watched layers do, and weights are kept in bfloat16",
        Place(1, "update.norm", A),
        not_with=[{"verdict": "diverging"}, {"findings": ()}],
    ),
    Case("site-stalled", noted(finding("site-stalled")), "low", "while other watched layers do."),
    Case(
        "edits-failing",
        {"landing": lost(failed=9, words="KeyError: x")},
        "high",
        "each of 10 edits since edit 1 raised an exception, mostly: KeyError: x",
        also=[
            {"verdict": "drifting"},
            {"landing": lost(tried=3, lost=3, failed=3)},
            {"landing": lost(tried=13, landed=10, lost=3, failed=3)},
            {"landing": lost(tried=1, lost=1, failed=1)},
            {"landing": lost(tried=10, landed=4, lost=1, failed=6)},
        ],
        not_with=[
            {"verdict": "diverging"},
            {"landing": lost(failed=8)},
            {"landing": lost(tried=13, landed=11, lost=2, failed=2)},
            {"landing": lost(tried=10, landed=5, lost=1, failed=5)},
        ],
    ),
    Case(
        "edits-failing",
        {"landing": lost(tried=1, lost=1, failed=1, words="KeyError: x")},
        "high",
        "the only edit raised an exception: KeyError: x.",
    ),
    Case(
        "others-edited",
        {"landing": lost(answers=2e-4)},
        "high",
        "none of 10 edits moved a watched layer, and the model's answers on the canary are 0.0002 nats from",
        also=[{"verdict": "collapsed"}, {"landing": lost(lost=3, answers=2e-4)}],
        not_with=[
            {"landing": lost(answers=1e-4)},
            {"landing": lost(landed=1, answers=2e-4)},
            {"landing": lost(lost=2, answers=2e-4)},
            {"landing": lost(failed=1, answers=2e-4)},
        ],
    ),
    Case(
        "another-model",
        {"landing": lost(elsewhere=True)},
        "medium",
        "none of 10 edits ran the watched model or moved a watched layer",
        not_with=[
            {"landing": lost(elsewhere=True, answers=2e-4)},
            {"landing": lost(elsewhere=True, landed=1)},
            {"landing": lost(elsewhere=False)},
        ],
    ),
    Case(
        "gradients-skipped",
        {"landing": lost(gradients_bad=9), "findings": (finding("step-skipped", metric="skipped"),)},
        "medium",
        "since edit 1 gradients are not finite, and no edit moves a weight",
        Place(5, "skipped", A),
        not_with=[{"landing": lost(gradients_bad=8)}],
    ),
    Case(
        "clip-overflow",
        {"landing": lost(gradients=9, clipped=9)},
        "high",
        "exactly 0 when the optimizer gets them: a norm that is infinite makes clipping multiply every gradient by 0.",
        not_with=[{"landing": lost(gradients=8, clipped=9)}, {"landing": lost(gradients=9, clipped=8)}],
    ),
    Case(
        "clip-overflow",
        {"landing": lost(gradients=9, clipped=9, huge=9), "weights_dtype": "float16"},
        "high",
        "Their norm over all watched layers is more than float16 holds, 65,504.",
    ),
    Case(
        "clip-overflow",
        {"landing": lost(gradients=9, huge=9), "weights_dtype": "float16"},
        "medium",
        "in edits without effect their norm over all watched layers is more than float16 holds",
        not_with=[{"landing": lost(gradients=9, huge=8)}, {"weights_dtype": "bfloat16"}, {"weights_dtype": None}],
    ),
    Case(
        "edits-undone",
        {"landing": lost(gradients=9, written=9), "changes_inside": True},
        "medium",
        "since edit 1 edits write the watched weights, the gradient changes from pass to pass within them",
        not_with=[
            {"changes_inside": False},
            {"landing": lost(gradients=8, written=9)},
            {"landing": lost(gradients=9, written=8)},
        ],
    ),
    Case(
        "weights-unchanged",
        {"landing": lost()},
        "high",
        "none of 10 edits moved a watched layer.",
        not_with=[
            {"landing": lost(failed=9)},
            {"landing": lost(elsewhere=True)},
            {"landing": lost(gradients_bad=9)},
            {"landing": lost(gradients=9, clipped=9)},
            {"landing": lost(gradients=9, written=9), "changes_inside": True},
            {"landing": lost(gradients=10), "weights_dtype": "bfloat16"},
            {"landing": lost(gap=6)},
            {"verdict": "diverging"},
        ],
    ),
    Case("weights-unchanged", {"landing": lost(tried=12, landed=5, lost=2)}, "medium", "only 5 of 12 edits moved a"),
    Case(
        "weights-unchanged",
        {"landing": lost(tried=30, landed=20, lost=10, since=21)},
        "high",
        "edits moved the watched weights until edit 20, and none since.",
    ),
)


@every(CASES)
def test_it_is_claimed_in_these_words(case: Case) -> None:
    check_words(case)


@every(CASES)
def test_it_is_claimed_at_its_limits_and_not_beyond_them(case: Case) -> None:
    check_limits(case)


def test_the_whole_models_first_bad_reading_names_the_weight_that_was_furthest() -> None:
    moved = replace(BAD, site=M, metric="canary.kl")
    evidence = Evidence(**{**EMPTY, **bad(moved), "steps": (STEP,)})
    assert evidence.furthest == Place(5, "drift.ratio", B, 0.4)
    assert evidence.step == STEP
    for change in (
        {"steps": (replace(STEP, drift_ratio=0.0),)},
        {"steps": ()},
        {"first_bad": BAD},
        {"first_bad": None},
    ):
        assert Evidence(**{**EMPTY, **bad(moved), "steps": (STEP,), **change}).furthest is None
    assert math.isclose(evidence.step.drift_ratio, 0.4)
