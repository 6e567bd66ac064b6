"""Evidence for the rules of causes, and cases of it: what a rule claims at its limits, and what undoes the claim.

The limits are those that docs/causes.md gives ("How it is seen"); here they are written out once more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from stabilitylab.analysis.causes.evidence import (
    EditorInput,
    Evidence,
    FatalRow,
    Learning,
    Place,
    Step,
    Way,
)
from stabilitylab.analysis.causes.precedence import claims
from stabilitylab.analysis.causes.rule import Cause
from stabilitylab.analysis.findings import Finding
from stabilitylab.analysis.landing import Landing

A, B, U, M = "decoder.layers.1.fc1", "decoder.layers.1.fc2", "editor.mlp.0.u", "model"
FP16, BF16, FP32 = 65_504.0, 3.3895e38, 3.4028e38


def finding(rule: str, edit: int = 5, **more: Any) -> Finding:
    known = {"metric": "update.norm", "site": A, "value": 1.0, "threshold": 0.5, "says": "", "verdict": "diverging"}
    return Finding(rule=rule, edit=edit, **{**known, **more})


BAD = finding("growth")
STEP = Step(edit=5, update_ratio=0.1, update_site=A, drift_ratio=0.4, drift_site=B, number=10, large=0, largest=0.1)
FATAL = FatalRow(
    edit=5,
    bad_inputs=0.0,
    masked_rows=0.0,
    unmasked_before=True,
    masks_before=True,
    sound_forward=True,
    sound_gradients=True,
    no_gradients=False,
    gradients_unread=False,
    later_gradients=False,
    gradient_overflowed=None,
    gradient_is_nan=False,
    lost_before_step=None,
    loss=None,
    loss_weight=None,
    moved_before=False,
    weight=A,
    overflowed=False,
    headroom=8.0,
    limit=FP16,
)
NAN = finding("non-finite", metric="weight.nonfinite", verdict="non-finite", value=9.0)
WAY = Way(
    site=A,
    edits=10,
    added=100.0,
    largest=20.0,
    drift=80.0,
    first=1.0,
    last=2.0,
    first_rate=0.5,
    last_rate=1.5,
    stepped=0,
)
OTHER = replace(WAY, site=B, first_rate=0.525, last_rate=1.6, drift=0.0)
DIVIDED = EditorInput(edit=5, site=U, largest=3.2e5, unit=17, std=0.0, state="frozen", spreadless=False)
SPREADLESS = replace(DIVIDED, spreadless=True)


def lost(**more: Any) -> Landing:
    known = {"tried": 10, "landed": 0, "lost": 10, "since": 1, "first": 1}
    return Landing(**{**known, **more})


EMPTY: dict[str, Any] = {
    "verdict": "stable",
    "findings": (),
    "first_bad": None,
    "crossed": None,
    "divided": None,
    "growth": None,
    "largest_finite": None,
    "narrow": False,
    "overflowed": False,
    "steps": (),
    "latest": None,
    "learning": Learning(0, 0),
    "fatal": None,
    "restored_until": None,
    "forgotten": None,
    "carried": 0,
    "stayed": None,
    "besides": False,
    "moved": False,
    "codebook": False,
    "reported": False,
    "landing": Landing(),
    "weights_dtype": None,
    "changes_inside": False,
    "ways": (),
}
LONE = finding("one-entry", edit=5)
"""An entry that leapt at the first bad edit: no editor's fault."""
Change = dict[str, Any]


def bad(found: Finding = BAD, *more: Finding, verdict: str = "diverging") -> Change:
    return {"first_bad": found, "findings": (found, *more), "verdict": verdict}


def noted(*found: Finding, verdict: str = "stable") -> Change:
    return {"findings": found, "verdict": verdict}


@dataclass(frozen=True)
class Case:
    """evidence: at which `cause` is claimed so surely, with these words, and there. also, not_with: changes of it."""

    cause: str
    evidence: Change
    confidence: str
    words: str
    place: Place | None = None
    also: list[Change] = field(default_factory=list)
    not_with: list[Change] = field(default_factory=list)


def claimed(evidence: Change) -> dict[str, Cause]:
    return claims(Evidence(**{**EMPTY, **evidence}))


def every(cases: Sequence[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=[f"{number}-{case.cause}" for number, case in enumerate(cases)])


def check_words(case: Case) -> None:
    """It is claimed, so surely, in these words and there."""
    found = claimed(case.evidence)[case.cause]
    assert found.confidence == case.confidence
    assert case.words in found.says
    assert found.place == case.place


def check_limits(case: Case) -> None:
    """It is claimed at its limits and not beyond them."""
    for change in case.also:
        assert case.cause in claimed({**case.evidence, **change}), change
    for change in case.not_with:
        found = claimed({**case.evidence, **change}).get(case.cause)
        assert found is None or (found.confidence != case.confidence and case.words not in found.says), change
