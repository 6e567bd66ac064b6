"""The story of a run that goes wrong, on real loops: what it once said of the causes it goes on saying."""

from __future__ import annotations

from contextlib import suppress
from itertools import islice, pairwise
from pathlib import Path

import pytest

import stabilitylab as sl
from benchmarks.zoo import by_name
from stabilitylab.analysis.causes.precedence import RULES
from stabilitylab.analysis.findings import Diagnosis
from stabilitylab.record.run import analyzer_of

ORDER = [rule.name for rule in RULES]


def told(folder: Path, scenario: str, edits: int, **variant: object) -> list[Diagnosis]:
    """What was said after each edit, from edit 0 on."""
    loop = by_name(scenario).make(0, **variant)
    with sl.attach(
        loop.model, loop.sites, folder, canary=loop.canary, editor=loop.editor, announce=False, trace=False
    ) as monitor:
        for step in islice(loop.steps, edits):
            with monitor.edit(), suppress(ArithmeticError, RuntimeError, ValueError):
                step.apply(loop.model)
    run = sl.load(folder)
    analyzer, said = analyzer_of(run.metrics, run.manifest, run.thresholds), []
    for edit in run.edits:
        analyzer.observe(edit.row)
        said.append(analyzer.diagnosis())
    return said


@pytest.mark.parametrize(
    ("scenario", "edits", "variant"),
    [("learning-rate-too-high", 45, {"rate": 0.1}), ("mend-feedback-fp16", 40, {}), ("slow-norm-growth", 45, {})],
)
def test_what_was_claimed_after_the_alarm_is_never_taken_back(
    tmp_path: Path, scenario: str, edits: int, variant: dict[str, float]
) -> None:
    said = told(tmp_path / "run", scenario, edits, **variant)
    alarmed = [each for each in said if each.alarm_edit is not None]
    assert alarmed, "the loop is sound, and tells nothing of this"
    named = [each for each in alarmed if each.confidence in ("high", "medium")]
    assert named
    for before, after in pairwise(alarmed):
        assert {link.cause for link in before.causes} <= {link.cause for link in after.causes}
        if before.confidence in ("high", "medium"):
            assert after.confidence in ("high", "medium")
            # Another may come to the front, where it is what explains the others.
            assert ORDER.index(after.cause) <= ORDER.index(before.cause)
