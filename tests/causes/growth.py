"""Rules of growth, of models that are dead, and of edits that are lost, at their limits."""

from __future__ import annotations

from dataclasses import replace

from stabilitylab.analysis.causes.evidence import Ascent, Growth, Learning, Place
from tests.causes.case import (
    BAD,
    DIVIDED,
    LONE,
    OTHER,
    STEP,
    WAY,
    A,
    B,
    Case,
    M,
    bad,
    finding,
    lost,
    noted,
)

CANARY = finding("canary-far", metric="canary.kl", site=M)
STEEPER = replace(WAY, added=200.0, first_rate=0.5, last=4.0, last_rate=10.0)
"""Stepped by hand, at a rate that was raised. Its updates don't point one way."""
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
        "learning-rate-too-high",
        bad() | {"steps": (STEP,), "ways": (STEEPER, replace(STEEPER, site=B, last=4.0))},
        "high",
        "the update was 0.5 times its gradient at every layer in the first edit, as a plain step is, and is 10 times it"
        " by now: what the gradient is multiplied with, the learning rate, was raised 20-fold.",
        also=[
            {"ways": (STEEPER, replace(STEEPER, site=B, first_rate=0.52, last_rate=10.4))},
            {"ways": (replace(STEEPER, added=100.0), replace(STEEPER, site=B))},
        ],
        not_with=[
            {"verdict": "drifting"},
            {"findings": (BAD, LONE)},
            {"steps": ()},
            {"steps": (replace(STEP, rate=0.3),)},
            {"ways": (STEEPER,)},
            {"ways": (STEEPER, replace(STEEPER, site=B, stepped=1))},
            {"ways": (STEEPER, replace(STEEPER, site=B, first_rate=0.53))},
            {"ways": (STEEPER, replace(STEEPER, site=B, last_rate=10.6))},
            {"ways": (STEEPER, replace(STEEPER, site=B, last=500.0))},
            {"ways": (replace(STEEPER, last=2.9), replace(STEEPER, site=B, last=2.0))},
            {"ways": tuple(replace(STEEPER, site=site, added=100.0, edits=20) for site in (A, B))},
        ],
    ),
    Case(
        "gradient-ascent",
        bad() | {"ascent": Ascent(known=10, up=8, first_edit=1, first_loss=2.0, last_edit=10, last_loss=4.0)},
        "medium",
        "8 of 10 edits were steps up the model's own loss, which they weigh with less than 0; it was 2 at edit 1 and 4"
        " at edit 10.",
        also=[{"ascent": Ascent(6, 5, 1, 0.0, 6, 0.1)}, {"ascent": Ascent(6, 5, 1, 1.0, 6, 3.0, A)}],
        not_with=[
            {"verdict": "drifting"},
            {"findings": (BAD, LONE)},
            {"ascent": None},
            {"ascent": Ascent(11, 8, 1, 2.0, 10, 4.0)},
            {"ascent": Ascent(4, 4, 1, 2.0, 10, 4.0)},
            {"ascent": Ascent(10, 8, 1, 2.0, 10, 3.9)},
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
        "others-edited",
        bad(CANARY, finding("furthest", metric="drift.ratio"), finding("growth", metric="logits.max", site=M))
        | {"besides": True},
        "low",
        "edits also write parameters that are not watched, and the model's answers leave the original's while no"
        " watched weight shows anything out of the ordinary.",
        not_with=[
            {"besides": False},
            {"verdict": "drifting"},
            {"first_bad": BAD},
            {"findings": (CANARY, finding("drift"))},
            {"findings": (CANARY, finding("level", metric="weight.max_abs"))},
            {"latest": replace(STEP, drift_ratio=0.11)},
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
