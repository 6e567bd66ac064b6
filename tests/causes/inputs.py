"""Rules of what went in: labels, masks, a normaliser's statistics, at their limits."""

from __future__ import annotations

import math
from dataclasses import replace

from stabilitylab.analysis.causes.evidence import Place
from tests.causes.case import (
    BAD,
    BF16,
    DIVIDED,
    FATAL,
    NAN,
    SPREADLESS,
    A,
    B,
    Case,
    M,
    U,
    bad,
    finding,
)

CASES = (
    Case(
        "labels-ignored",
        bad(finding("labels-masked"), verdict="non-finite"),
        "high",
        "the loss of edit 5 is NaN while every logit is finite",
        not_with=[{"first_bad": NAN}, {"first_bad": None}],
    ),
    Case(
        "masked-row",
        bad(replace(NAN, metric="activation")) | {"fatal": replace(FATAL, masked_rows=3.0)},
        "medium",
        "3 rows of edit 5's attention mask see no real token, as in no edit before, and activation",
        also=[
            {"first_bad": replace(NAN, metric=kind)} for kind in ("attention.max_abs", "logits.max", "gradient.norm")
        ],
        not_with=[
            {"fatal": FATAL},
            {"fatal": replace(FATAL, masked_rows=3.0, unmasked_before=False)},
            {"fatal": replace(FATAL, masked_rows=3.0, edit=4)},
            {"first_bad": NAN},
            {"first_bad": replace(NAN, metric="activation", verdict="diverging")},
            {"fatal": None},
        ],
    ),
    Case(
        "masked-row",
        bad(replace(NAN, metric="activation")) | {"fatal": replace(FATAL, masked_rows=3.0, masks_before=False)},
        "low",
        "see no real token, and activation",
    ),
    Case(
        "loss-not-finite",
        bad(NAN) | {"fatal": replace(FATAL, no_gradients=True, limit=BF16, sound_gradients=False)},
        "medium",
        "the loss of edit 5 sends NaN or infinity to the watched layers, while their outputs and the logits are all",
        Place(5, "weight.nonfinite", A),
        also=[
            {"fatal": replace(FATAL, later_gradients=True, limit=BF16)},
            {"fatal": replace(FATAL, no_gradients=True, weight=None)},
        ],
        not_with=[
            {"fatal": replace(FATAL, sound_gradients=False)},
            {"fatal": replace(FATAL, no_gradients=True, sound_forward=False)},
            {"fatal": replace(FATAL, no_gradients=True, loss=math.inf)},
            {"fatal": replace(FATAL, no_gradients=True, edit=4)},
            {"first_bad": replace(NAN, verdict="diverging")},
            {"fatal": None},
        ],
    ),
    Case(
        "loss-not-finite",
        bad(NAN) | {"fatal": replace(FATAL, no_gradients=True, loss=2.5), "weights_dtype": None},
        "low",
        "no gradient of edit 5 is finite, while the outputs, the logits and the model's own loss (2.5) are",
        Place(5, "weight.nonfinite", A),
        not_with=[
            {"weights_dtype": "float16"},
            {"fatal": replace(FATAL, later_gradients=True, loss=2.5)},
            {"fatal": replace(FATAL, no_gradients=True, loss=math.nan)},
        ],
    ),
    Case(
        "loss-not-finite",
        bad(NAN) | {"fatal": replace(FATAL, no_gradients=True, loss=2.5, loss_weight=math.inf), "weights_dtype": None},
        "high",
        "the model's own loss of edit 5 is finite (2.5), and its weight in what was differentiated is infinite",
        Place(5, "weight.nonfinite", A),
        not_with=[
            {"weights_dtype": "float16"},
            {"fatal": replace(FATAL, no_gradients=True, loss=math.nan, loss_weight=math.inf)},
            {"fatal": replace(FATAL, loss=2.5, loss_weight=math.inf)},
        ],
    ),
    Case(
        "loss-not-finite",
        bad(NAN) | {"fatal": replace(FATAL, gradient_overflowed=B, gradient_is_nan=True)},
        "medium",
        f"the gradient of {B} at edit 5 is NaN, while the layer's input and the gradient at its output are finite: the"
        " NaN reaches the weight on another way than through its layer.",
        Place(5, "gradient.norm", B),
        not_with=[
            {"narrow": True},
            {"fatal": replace(FATAL, gradient_overflowed=B)},
            {"fatal": replace(FATAL, gradient_overflowed=None, gradient_is_nan=True)},
            {"fatal": replace(FATAL, gradient_overflowed=B, gradient_is_nan=True, sound_forward=False)},
            {"fatal": replace(FATAL, gradient_overflowed=B, gradient_is_nan=True, edit=4)},
        ],
    ),
    Case(
        "learning-rate-not-finite",
        bad(replace(NAN, metric="gradient.learning_rate", value=math.nan)) | {"fatal": FATAL},
        "high",
        "the optimizer stepped with a learning rate that is NaN at edit 5, whose outputs and gradients are all finite",
        Place(5, "gradient.learning_rate", A),
        not_with=[
            {"fatal": replace(FATAL, sound_gradients=False)},
            {"fatal": replace(FATAL, sound_forward=False)},
            {"fatal": replace(FATAL, edit=6)},
            {"fatal": None},
            {"first_bad": NAN},
            {"first_bad": replace(NAN, metric="gradient.learning_rate", verdict="diverging")},
        ],
    ),
    Case(
        "input-not-finite",
        bad(replace(NAN, metric="activation.nonfinite")) | {"fatal": replace(FATAL, bad_inputs=3.0)},
        "high",
        "3 entries of what the model was called with in edit 5 were NaN or +∞ already",
        Place(5, "inputs.bad_entries", M, 3.0),
        not_with=[
            {"fatal": FATAL},
            {"fatal": replace(FATAL, bad_inputs=3.0, edit=4)},
            {"first_bad": NAN},
            {"first_bad": None},
        ],
    ),
    Case(
        "normaliser-too-few-rows",
        bad(replace(NAN, metric="editor.nonfinite", site=U), finding("one-row", site=U)),
        "high",
        f"the editor's normaliser at {U} was made from one row by edit 5, and a spread needs two: its std is NaN",
        Place(5, "editor.nonfinite", U),
        not_with=[
            {"findings": (NAN, finding("one-row", site=U, edit=4))},
            {"findings": (NAN, finding("one-row", site=B))},
            {"first_bad": NAN},
        ],
    ),
    Case(
        "normaliser-too-few-rows",
        {"divided": SPREADLESS, "findings": (finding("spreadless", site=U),)},
        "medium",
        "its std is 0 at every unit, and a normalised input reached 3.2e5 at edit 5.",
        Place(5, "editor.input_max", U),
        not_with=[{"divided": DIVIDED}, {"findings": ()}, {"divided": None}],
    ),
    Case(
        "normaliser-nan",
        bad(replace(NAN, metric="editor.nonfinite", site=U)),
        "high",
        f"9 statistics of the editor's normaliser at {U} are NaN or infinite at edit 5, and were finite until then",
        also=[{"first_bad": replace(NAN, metric="editor.nonfinite", site=U, edit=edit)} for edit in (0, 1, 2)],
        not_with=[
            {"first_bad": NAN},
            {"first_bad": None},
            {"findings": (NAN, finding("no-row", site=U))},
        ],
    ),
    Case(
        "normaliser-nan",
        bad(replace(NAN, metric="editor.nonfinite", site=U), finding("one-row-update", site=U)),
        "high",
        "is NaN at every unit from edit 5 on, while its means are finite",
    ),
    Case(
        "normaliser-nan",
        bad(replace(NAN, metric="editor.nonfinite", site=U), finding("one-row-update", site=U, edit=4)),
        "high",
        "and were finite until then",
    ),
    Case(
        "normaliser-nan",
        bad(replace(NAN, metric="editor.nonfinite", site=U, edit=0)),
        "high",
        "before the first edit: never loaded",
    ),
    Case(
        "normaliser-nan", bad(replace(NAN, metric="editor.nonfinite", site=U, edit=1)), "high", "by the end of edit 1"
    ),
    Case(
        "normaliser-zero-std",
        {"divided": DIVIDED},
        "high",
        f"unit 17 of the editor's frozen normaliser at {U} was divided by a std of 0: its normalised input reached",
        Place(5, "editor.input_max", U),
        also=[
            {"divided": replace(DIVIDED, unit=None, state="")},
            {"divided": SPREADLESS},
            {"findings": (finding("one-row", site=U),)},
        ],
        not_with=[
            {"divided": None},
            {"divided": replace(DIVIDED, std=None)},
            {"divided": SPREADLESS, "findings": (finding("one-row", site=U),)},
        ],
    ),
    Case(
        "statistics-restarted",
        bad(BAD, finding("statistics-restarted", metric="editor.std_min", site=U, value=0.4, threshold=0.2)),
        "medium",
        f"began anew at edit 5: at {U} the smallest std was 0.2 and is 0.4, and all the others jumped with it.",
        Place(5, "editor.std_min", U),
        not_with=[{"findings": (replace(BAD, edit=4), finding("statistics-restarted"))}, {"findings": (BAD,)}],
    ),
    Case(
        "statistics-restarted",
        bad(BAD, finding("statistics-restarted", metric="editor.seen_rows", site=U, value=3.0, threshold=90.0)),
        "medium",
        "they had seen 90 rows, and have now seen 3.",
        Place(5, "editor.seen_rows", U),
    ),
)
