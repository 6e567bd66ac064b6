"""Rules of what a dtype could not hold, at their limits."""

from __future__ import annotations

import math
from dataclasses import replace

from stabilitylab.analysis.causes.evidence import Place
from tests.cause_cases import (
    BAD,
    BF16,
    FATAL,
    FP16,
    FP32,
    LONE,
    NAN,
    A,
    B,
    Case,
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
        "gradient-overflow",
        bad(NAN) | {"fatal": replace(FATAL, no_gradients=True, loss=2.5), "weights_dtype": "float16"},
        "medium",
        "no gradient of edit 5 is finite, while the loss (2.5), the logits and all outputs are",
        not_with=[
            {"weights_dtype": "bfloat16"},
            {"weights_dtype": None},
            {"fatal": replace(FATAL, no_gradients=False, loss=2.5)},
            {"fatal": replace(FATAL, no_gradients=True, loss=None)},
            {"fatal": replace(FATAL, no_gradients=True, loss=math.inf)},
            {"fatal": replace(FATAL, no_gradients=True, loss=2.5, sound_forward=False)},
            {"fatal": replace(FATAL, no_gradients=True, loss=2.5, edit=4)},
        ],
    ),
    Case(
        "gradient-overflow",
        bad(NAN) | {"fatal": replace(FATAL, gradient_overflowed=B), "narrow": True},
        "high",
        f"the gradient of {B} at edit 5 is not finite, while the layer's input and the gradient at its output are:"
        " their product left the range of float16, which ends at 65,504.",
        Place(5, "gradient.norm", B),
        also=[{"narrow": False}],
        not_with=[
            {"fatal": replace(FATAL, gradient_overflowed=None)},
            {"fatal": replace(FATAL, gradient_overflowed=B, sound_forward=False)},
            {"fatal": replace(FATAL, gradient_overflowed=B, edit=6)},
            {"fatal": None},
            {"first_bad": None},
        ],
    ),
    Case(
        "adam-eps-underflow",
        bad(NAN) | {"fatal": FATAL},
        "medium",
        f"the float16 weights of {A} are NaN after edit 5, the first that moved them, whose first outputs and gradients"
        " are all finite, and which began 8 bits from overflow",
        Place(5, "weight.nonfinite", A),
        also=[{"fatal": replace(FATAL, limit=65_504.0 * 1.0009)}],
        not_with=[
            {"fatal": replace(FATAL, edit=6)},
            {"fatal": replace(FATAL, weight=None)},
            {"fatal": replace(FATAL, limit=BF16)},
            {"fatal": replace(FATAL, limit=None)},
            {"fatal": replace(FATAL, limit=65_504.0 * 1.002)},
            {"fatal": replace(FATAL, sound_gradients=False)},
            {"fatal": replace(FATAL, sound_forward=False)},
            {"fatal": replace(FATAL, overflowed=True)},
            {"fatal": replace(FATAL, moved_before=True)},
            {"fatal": replace(FATAL, headroom=7.9)},
            {"fatal": replace(FATAL, headroom=None)},
            {"reported": True},
            {"first_bad": None},
        ],
    ),
    Case(
        "optimiser-nan",
        bad(NAN) | {"fatal": replace(FATAL, limit=BF16)},
        "medium",
        f"the weights of {A} are NaN after edit 5, whose outputs and gradients are all finite: the step itself made",
        Place(5, "weight.nonfinite", A),
        also=[{"fatal": replace(FATAL, sound_gradients=False, gradients_unread=True)}],
        not_with=[
            {"fatal": replace(FATAL, sound_gradients=False)},
            {"fatal": replace(FATAL, sound_forward=False)},
            {"fatal": replace(FATAL, overflowed=True)},
            {"fatal": replace(FATAL, weight=None)},
            {"fatal": replace(FATAL, edit=4)},
            {"fatal": None},
            {"reported": True},
            {"findings": (NAN, LONE)},
            {"first_bad": replace(NAN, edit=0), "fatal": replace(FATAL, edit=0)},
        ],
    ),
    Case(
        "update-absorbed",
        noted(finding("update-swallowed", edit=7, since=5, metric="update.swallowed_share", value=0.93)),
        "high",
        f"since edit 5 the dtype of {A} rounds the edits away: 93% of the entries",
        Place(5, "update.swallowed_share", A),
        not_with=[{"verdict": "diverging"}],
    ),
    Case(
        "update-absorbed",
        {"landing": lost(tried=3, lost=3, gradients=3), "weights_dtype": "bfloat16"},
        "medium",
        "since edit 1 gradients are finite and above zero, and no weight moves: bfloat16 keeps 8 bits",
        also=[
            {"verdict": "drifting"},
            {"changes_inside": True},
            {"landing": lost(gradients=10, written=9), "changes_inside": True},
            {"landing": lost(gradients=10, huge=10)},
            {"landing": lost(gradients=10, huge=8), "weights_dtype": "float16"},
        ],
        not_with=[
            {"weights_dtype": None},
            {"landing": lost(tried=2, lost=2, gradients=2)},
            {"landing": lost(gradients=9)},
            {"landing": lost(gradients=10, gap=6)},
            {"landing": lost(gradients=10, written=10), "changes_inside": True},
            {"landing": lost(gradients=10, huge=9), "weights_dtype": "float16"},
            {"verdict": "diverging"},
        ],
    ),
    Case(
        "dtype-overflow",
        bad(finding("headroom", metric="weight.headroom_bits", value=1.5)) | {"largest_finite": FP16},
        "high",
        f"values at {A} are kept in float16, which ends at 65,504, and had 1.5 bits of headroom left at edit 5",
        Place(5, "weight.headroom_bits", A),
        not_with=[{"largest_finite": BF16}, {"largest_finite": None}, {"first_bad": BAD}],
    ),
    Case(
        "dtype-overflow",
        bad(NAN) | {"fatal": replace(FATAL, overflowed=True, weight=B)},
        "high",
        f"values at {B} are kept in float16, which ends at 65,504, and became infinite at edit 5, whose first outputs",
        Place(5, "weight.max_abs", B),
        not_with=[
            {"fatal": replace(FATAL, overflowed=False, weight=B)},
            {"fatal": replace(FATAL, overflowed=True, sound_forward=False)},
            {"fatal": replace(FATAL, overflowed=True, sound_gradients=False)},
            {"fatal": replace(FATAL, overflowed=True, limit=FP32)},
            {"fatal": replace(FATAL, overflowed=True, edit=4)},
            {"findings": (NAN, LONE)},
        ],
    ),
    Case(
        "dtype-overflow",
        bad(NAN) | {"largest_finite": FP16, "overflowed": True},
        "high",
        "became infinite at edit 5 while all that was read before it in that edit was finite",
        Place(5, "weight.nonfinite", A),
        not_with=[{"overflowed": False}, {"largest_finite": BF16}],
    ),
    Case(
        "dtype-overflow",
        bad(NAN) | {"fatal": replace(FATAL, weight=None, moved_before=True), "weights_dtype": "float16"},
        "medium",
        "the watched layers are kept in float16, which ends at 65,504: at edit 5 the model's outputs are not finite",
        not_with=[
            {"fatal": replace(FATAL, moved_before=True)},
            {"fatal": replace(FATAL, weight=None)},
            {"weights_dtype": "bfloat16"},
        ],
    ),
    Case(
        "float16-limit",
        {"fatal": replace(FATAL, overflowed=True)},
        "high",
        f"the weights of {A} are kept in float16, which ends at 65,504, and became infinite at edit 5.",
        Place(5, "weight.max_abs", A),
        not_with=[
            {"fatal": replace(FATAL, overflowed=True, limit=FP32)},
            {"fatal": replace(FATAL, overflowed=False)},
            {"fatal": replace(FATAL, overflowed=True, weight=None)},
            bad(NAN) | {"fatal": replace(FATAL, overflowed=True)},  # which is said as dtype-overflow
        ],
    ),
)


@every(CASES)
def test_it_is_claimed_in_these_words(case: Case) -> None:
    check_words(case)


@every(CASES)
def test_it_is_claimed_at_its_limits_and_not_beyond_them(case: Case) -> None:
    check_limits(case)
