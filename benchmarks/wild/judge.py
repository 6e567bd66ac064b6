"""Whether what is said of a wild loop is right. The rule, for every case alike:

- A healthy loop: *right*, unless the verdict is ``diverging`` or worse, edits are said to have no effect, or a cause is
  named with more than low confidence: a *false alarm*.
- A fault: *wrong* when another cause is named (first in the chain, with more than low confidence), or when the alarm
  came before the fault struck. *Right* when the cause is named, at an edit within one of the true one, and edits that
  do not land are said not to. For the control, which only must not pass for ordinary, a verdict above ``stable`` is
  right. *Vague* when neither, but trouble is said: a verdict above ``stable``, or edits without effect. Else *silent*.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.wild import by_name
from benchmarks.wild.case import Case, Truth, run
from stabilitylab.analysis.findings import Diagnosis, severity

Answer = Literal["right", "vague", "wrong", "silent", "false alarm"]
CONTROL = "00"
NEAR = 1
"""Edits between the true one and the one that is named."""


@dataclass(frozen=True)
class Heard:
    """A case with its truth, what was said, and whether that is right. canary: whether the loop had one."""

    case: str
    number: str
    reference: str
    healthy: bool
    needs_operation: bool
    canary: bool
    true: str
    edit: int | None
    verdict: str
    landed: str | None
    cause: str
    confidence: str
    chain: tuple[str, ...]
    alarm: int | None
    answer: Answer
    says: str


def hear(job: tuple[str, Path, bool], budget: float | None = None) -> Heard:
    """Go through a case by its name, in a folder of its own, with or without its canary, under that budget."""
    name, runs, canary = job
    case = by_name(name)
    made, truth = run(case, runs / f"{name}{'' if canary else '-no-canary'}", canary=canary, budget=budget)
    return heard(case, truth, made.diagnosis(), canary)


def heard(case: Case, truth: Truth, diagnosis: Diagnosis, canary: bool) -> Heard:
    """What was said of a case beside its truth."""
    return Heard(
        case=case.name,
        number=case.number,
        reference=case.reference,
        healthy=truth.healthy,
        needs_operation=truth.needs_operation,
        canary=canary,
        true=" or ".join(truth.causes),
        edit=truth.edit,
        verdict=diagnosis.verdict,
        landed=diagnosis.landed,
        cause=diagnosis.cause,
        confidence=diagnosis.confidence,
        chain=tuple(f"{link.role}: {link.cause}" for link in diagnosis.causes),
        alarm=diagnosis.alarm_edit,
        answer=answer(case, truth, diagnosis),
        says=diagnosis.says,
    )


def answer(case: Case, truth: Truth, diagnosis: Diagnosis) -> Answer:
    """See the module."""
    named = diagnosis.cause if diagnosis.confidence in {"high", "medium"} else None
    alarmed = severity(diagnosis.verdict) >= severity("diverging")
    if truth.healthy:
        return "false alarm" if alarmed or diagnosis.nothing_lands or named else "right"
    early = truth.edit is not None and diagnosis.alarm_edit is not None and diagnosis.alarm_edit < truth.edit - NEAR
    if early or (named is not None and named not in truth.causes):
        return "wrong"
    trouble = severity(diagnosis.verdict) > severity("stable") or diagnosis.nothing_lands
    if (
        named is not None
        and _at_the_right_edit(truth, diagnosis)
        and (truth.landed != "none" or diagnosis.nothing_lands)
    ):
        return "right"
    if case.number == CONTROL and trouble:
        return "right"
    return "vague" if trouble or named is not None else "silent"


def _at_the_right_edit(truth: Truth, diagnosis: Diagnosis) -> bool:
    said = (diagnosis.first_bad_edit, diagnosis.first_nonfinite_edit, diagnosis.alarm_edit, diagnosis.onset_edit)
    edits = [edit for edit in (*said, *(link.edit for link in diagnosis.causes)) if edit is not None]
    return truth.edit is None or not edits or any(abs(edit - truth.edit) <= NEAR for edit in edits)


def counts(heards: list[Heard]) -> dict[str, dict[str, int]]:
    """How many answers of each kind: faults and healthy loops, with a canary and without."""
    found: dict[str, dict[str, int]] = {}
    for each in heards:
        group = f"{'healthy' if each.healthy else 'faults'}{'' if each.canary else ', no canary'}"
        of = found.setdefault(group, {})
        of[each.answer] = of.get(each.answer, 0) + 1
    return found


def document_of(heards: list[Heard]) -> dict[str, Any]:
    """As JSON has it."""
    return {"counts": counts(heards), "cases": [asdict(each) for each in heards]}
