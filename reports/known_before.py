"""What was known of a run's model before edit 1, from the scan in its manifest, and what of it came true."""

from __future__ import annotations

from dataclasses import dataclass

from stabilitylab.analysis.caution import Caution
from stabilitylab.analysis.cautions import cautions
from stabilitylab.analysis.findings import Diagnosis, Link
from stabilitylab.analysis.foretold import foretold, meet
from stabilitylab.record.run import Run
from stabilitylab.record.scanned import scan_from_json
from stabilitylab.reports.scan_words import Told, counts_words
from stabilitylab.reports.text import shorten


@dataclass(frozen=True)
class Known:
    """words: how many warnings. came_true: those that did, those at their own place first; waiting: the others."""

    words: str
    came_true: tuple[Told, ...]
    waiting: tuple[Told, ...]


def known_before(run: Run, diagnosis: Diagnosis) -> Known | None:
    """The warnings of the scan that the run was attached with; None where there is none, or none that can be read."""
    cautioned = _warnings(run)
    if cautioned is None:
        return None
    told = [_told(caution, link) for caution, link in foretold(cautioned, diagnosis)]
    true = sorted((each for each in told if each.came_true), key=lambda each: not each.here)
    return Known(counts_words(cautioned), tuple(true), tuple(each for each in told if not each.came_true))


def _warnings(run: Run) -> tuple[Caution, ...] | None:
    if "scan" not in run.manifest:
        return None
    try:
        return cautions(scan_from_json(run.manifest["scan"]))
    except Exception:  # a scan of nonsense may break anything that reckons with it, and must not take the report along
        return None


def _told(caution: Caution, link: Link | None) -> Told:
    if link is None:
        return Told(caution)
    when = "came true" if link.edit is None else f"came true at edit {link.edit}"
    if not caution.place or link.site is None or meet(caution.place, link.site):
        return Told(caution, when, here=True)
    return Told(caution, f"its cause {when}, in {shorten(link.site, 60)}")
