"""What watching cost, and how often what is dear was measured for it, in the words of every surface."""

from __future__ import annotations

from stabilitylab.record.run import Run
from stabilitylab.reports.text import percent


def time_in_probes(run: Run) -> str:
    """The share of the edits' time that probes took; under a budget also what that is, and what was left out for it."""
    budget, took = run.manifest.get("budget") or {}, percent(run.probe_time_share)
    share, every = budget.get("share"), budget.get("every")
    if isinstance(every, int) and every > 1:
        seldom = f"exact spectra and σ₁ every {every} edits after the first ones, and oftener while weights move"
        return f"{took}; {seldom}" + (f" (budget {percent(share)})" if isinstance(share, float) else "")
    return took
