"""What watching cost, and how often what is dear was measured for it, in the words of every surface."""

from __future__ import annotations

from stabilitylab.record.run import Run
from stabilitylab.reports.text import percent


def cadence(run: Run) -> str:
    """What was measured at some edits only, and for which budget; empty where each was measured in full."""
    budget = run.manifest.get("budget") or {}
    share, every = budget.get("share"), budget.get("every")
    if not isinstance(every, int) or every <= 1:
        return ""
    seldom = f"exact spectra and σ₁ every {every} edits after the first ones, and oftener while weights move"
    return seldom + (f" (budget {percent(share)})" if isinstance(share, float) else "")


def time_in_probes(run: Run) -> str:
    """The share of the edits' time that probes took, and what was left out for that."""
    return "; ".join(filter(None, (percent(run.probe_time_share), cadence(run))))
