"""What was known of a run's model before edit 1, from the scan in its manifest, and what of it came true."""

from __future__ import annotations

from dataclasses import dataclass

from stabilitylab.analysis.caution import Caution
from stabilitylab.analysis.cautions import cautions
from stabilitylab.analysis.findings import Diagnosis, Link
from stabilitylab.analysis.foretold import foretold, meet
from stabilitylab.record.run import Run
from stabilitylab.record.scanned import scan_from_json
from stabilitylab.reports.scan_words import counts_words
from stabilitylab.reports.text import shorten


@dataclass(frozen=True)
class Known:
    """words: how many warnings. came_true: those that did, with the words that say so; waiting: the others."""

    words: str
    came_true: tuple[tuple[Caution, str], ...]
    waiting: tuple[Caution, ...]


def known_before(run: Run, diagnosis: Diagnosis) -> Known | None:
    """The warnings of the scan that the run was attached with; None where there is none, or none that can be read."""
    told = _warnings(run)
    if told is None:
        return None
    pairs = foretold(told, diagnosis)
    return Known(
        counts_words(told),
        tuple((caution, _when(caution, link)) for caution, link in pairs if link is not None),
        tuple(caution for caution, link in pairs if link is None),
    )


def _warnings(run: Run) -> tuple[Caution, ...] | None:
    if "scan" not in run.manifest:
        return None
    try:
        return cautions(scan_from_json(run.manifest["scan"]))
    except Exception:  # a scan of nonsense may break anything that reckons with it, and must not take the report along
        return None


def _when(caution: Caution, link: Link) -> str:
    at = "" if link.edit is None else f" at edit {link.edit}"
    said = link.site is None or meet(caution.place, link.site)
    return f"came true{at}" if said else f"came true{at}, in {shorten(link.site or '', 60)}"
