"""Rules of how an update was made, and of where weights came from, at their limits."""

from __future__ import annotations

from dataclasses import replace

from stabilitylab.analysis.causes.evidence import Place
from stabilitylab.analysis.restoring import Forgotten
from tests.causes.case import BAD, FATAL, NAN, A, B, Case, bad, finding, noted

CASES = (
    Case(
        "gradient-lost-before-step",
        bad(NAN) | {"fatal": replace(FATAL, lost_before_step=B)},
        "high",
        f"the gradient of {B} at edit 5 is finite after the backward, and is not when the optimizer steps with it",
        Place(5, "gradient.norm_stepped", B),
        not_with=[
            {"fatal": FATAL},
            {"fatal": None},
            {"fatal": replace(FATAL, lost_before_step=B, edit=6)},
            {"first_bad": None},
        ],
    ),
    Case(
        "unstable-denominator",
        bad(BAD, finding("denominator-near-zero", edit=8, value=0.001)),
        "high",
        f"the update of {A} at edit 8 was divided by a uᵀk of only 0.001 ‖u‖‖k‖: it is 1,000 times",
        Place(8, "update.norm", A),
        also=[{"findings": (BAD, finding("denominator-near-zero", value=0.0))}],
        not_with=[
            {"findings": (BAD, finding("denominator-near-zero", edit=9))},
            {"first_bad": None},
            {"findings": (BAD,)},
        ],
    ),
    Case(
        "unstable-denominator",
        bad(replace(BAD, edit=8), finding("denominator-fell", value=0.01)),
        "medium",
        "fell to 0.01 ‖u‖‖k‖ at edit 5, a tenth of its usual size, and the first bad edit is 8.",
        Place(5, "update.norm", A),
        also=[{"first_bad": BAD}],
        not_with=[{"first_bad": replace(BAD, edit=9)}, {"first_bad": replace(BAD, edit=4)}, {"first_bad": None}],
    ),
    Case(
        "singular-solve",
        noted(finding("solve-failed", value=0.4)),
        "high",
        f"the editor's solve for {A} at edit 5 left 40% of its right side unanswered",
        not_with=[{"findings": ()}],
    ),
    Case(
        "singular-solve",
        bad(BAD, finding("denominator-negative", edit=8, value=-1e4)),
        "medium",
        f"uᵀk of {A} at edit 8 is -10,000: for u = C⁻¹k it is positive",
        Place(8, "update.norm", A),
        not_with=[
            {"findings": (BAD, finding("denominator-negative", edit=8, value=-9_999.0))},
            {"findings": (BAD, finding("denominator-negative", edit=9, value=-1e4))},
            {"first_bad": None},
        ],
    ),
    Case(
        "singular-solve",
        bad(BAD, finding("ill-conditioned", metric="editor.system_condition", value=1e8)),
        "low",
        f"editor.system_condition at {A} is 1e8 at edit 5: past 1e7, what float32 makes of it is noise; the first bad"
        " reading is the weights' own, at edit 5.",
        also=[
            {"findings": (BAD, finding("covariance-singular", edit=4))},
            *(
                {"first_bad": replace(BAD, metric=f"weight.{name}")}
                for name in ("max_abs", "headroom_bits", "nonfinite")
            ),
        ],
        not_with=[
            {"findings": (BAD, finding("ill-conditioned", edit=6))},
            {"first_bad": replace(BAD, metric="canary.kl")},
            {"first_bad": None},
        ],
    ),
    Case(
        "null-space-wrong",
        noted(finding("nothing-preserved", value=0.995), verdict="drifting"),
        "medium",
        "leaves 99.50% of the input directions free: edits are kept away from next to nothing.",
        Place(5, "update.norm", A),
        not_with=[{"verdict": "stable"}, {"findings": ()}],
    ),
    Case(
        "null-space-wrong",
        noted(finding("no-room", value=0.05), finding("edits-lost")),
        "medium",
        "leaves 5.00% of the input directions free: there is little room for an edit.",
        Place(5, "update.norm", A),
        also=[{"findings": (finding("no-room"), finding(rule))} for rule in ("update-swallowed", "clamp-pinned")],
    ),
    Case("null-space-wrong", noted(finding("no-room", value=0.05)), "low", "little room", Place(5, "update.norm", A)),
    Case(
        "target-pinned",
        bad(BAD, finding("clamp-pinned", edit=9, since=5)),
        "medium",
        f"since edit 5 the search for the value to write at {A} ends on its norm clamp",
        Place(5, "update.norm", A),
        also=[{"first_bad": None}],
        not_with=[{"findings": (BAD, finding("clamp-pinned", edit=9, since=6))}, {"findings": (BAD,)}],
    ),
    Case(
        "weights-not-restored",
        {"forgotten": Forgotten(9, B, 4)},
        "high",
        f"{B} is not put back between edits while another layer is: since edit 4",
        Place(4, "drift.norm", B),
        not_with=[{"forgotten": None}],
    ),
    Case("weights-not-restored", {"stayed": 4}, "high", "after edit 4 the edited weights stayed"),
    Case(
        "weights-not-restored",
        {"carried": 3},
        "high",
        "none of the 3 edits after the first began at the original weights",
        also=[{"verdict": "diverging", "carried": 1}],
        not_with=[{"carried": 2}, {"verdict": "drifting", "carried": 2}],
    ),
    Case("weights-not-restored", {"carried": 1, "verdict": "diverging"}, "high", "none of the edit after the first"),
    Case(
        "weights-not-restored",
        bad(BAD, verdict="drifting") | {"restored_until": 4},
        "medium",
        "up to edit 4 each edit began at the original weights, and none did after it",
        also=[{"findings": ()}],
        not_with=[{"restored_until": 5}, {"restored_until": None}, {"verdict": "stable"}],
    ),
    Case(
        "cache-grows",
        noted(finding("cache-grows", edit=9, since=5, metric="editor.cache_energy", value=7.0)),
        "high",
        f"the cache of edited keys at {A} grows with every edit, 7 by edit 9",
        Place(5, "editor.cache_energy", A),
        not_with=[{"findings": ()}],
    ),
    Case(
        "reference-edited",
        noted(finding("codebook-before", edit=0, metric="editor.keys", value=7.0), verdict="drifting"),
        "high",
        f"the model was edited before the run began: editor.keys at {A} is 7 at edit 0.",
        Place(0, "editor.keys", A),
        also=[{"findings": (finding("side-memory-before", edit=0),)}],
        not_with=[{"findings": ()}],
    ),
    Case(
        "reference-edited",
        noted(finding("codebook-before", edit=0), verdict="diverging"),
        "low",
        "was edited before",
        Place(0, "update.norm", A),
    ),
    Case(
        "cache-leaked",
        noted(finding("cache-before", edit=0, metric="editor.cache_energy", value=7.0), verdict="drifting"),
        "medium",
        f"the cache of edited keys at {A} was not empty before the first edit (energy 7)",
        Place(0, "editor.cache_energy", A),
        not_with=[{"findings": ()}],
    ),
    Case(
        "cache-leaked",
        noted(finding("cache-before", edit=0), verdict="diverging"),
        "low",
        "was not empty",
        Place(0, "update.norm", A),
    ),
    Case(
        "broken-before",
        bad(replace(NAN, edit=0)),
        "high",
        f"9 weights of {A} are NaN or infinite before the first edit",
        Place(0, "weight.nonfinite", A),
        also=[{"first_bad": replace(NAN, edit=0, metric="state.nonfinite")}],
        not_with=[{"first_bad": NAN}, {"first_bad": None}, {"first_bad": replace(NAN, edit=0, metric="canary.kl")}],
    ),
    Case(
        "state-spoilt",
        bad(replace(NAN, metric="state.nonfinite", site=B)),
        "high",
        f"9 entries of {B} are NaN or infinite since edit 5, and no watched layer was before it",
        Place(5, "state.nonfinite", B),
        also=[
            {"first_bad": None},
            {"first_bad": replace(NAN, edit=6)},
            {"fatal": replace(FATAL, edit=6)},
            {"fatal": replace(FATAL, weight=None)},
        ],
        not_with=[
            {"first_bad": replace(NAN, edit=4)},
            {"findings": (replace(NAN, metric="state.nonfinite", edit=0),)},
            {"fatal": FATAL},
            {"fatal": replace(FATAL, weight=None, bad_inputs=1.0)},
        ],
    ),
)
