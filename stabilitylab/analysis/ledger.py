"""The findings of a run: each claim once, few per kind, in order."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from typing import Final

from stabilitylab.analysis.columns import Columns
from stabilitylab.analysis.findings import Finding, Verdict, severity

KEPT: Final = 3
"""Sites that are reported by name for one rule and group; the others are counted."""

SIZE_RULES: Final = frozenset({"large-step", "jump", "level"})
"""Rules about a size alone, see `stabilitylab.analysis.harm`."""

UNDONE: Final = "-undone"
"""Ends the name of a rule whose claim was about an edit that was put back."""

STEPS: Final = frozenset({"large-step", "large-step-harmful"})
"""Rules whose value is an update's size over its weight's, not the metric's own."""

FURTHEST: Final = "furthest"
"""Says which weight is furthest from its original, where the first bad reading is the whole model's."""

DRIFT_RULES: Final = frozenset(
    {
        "drift",
        "growth",
        "shrink",
        "canary-far",
        "canary-heading",
        FURTHEST,
        *SIZE_RULES,
        *(f"{rule}-harmful" for rule in SIZE_RULES),
        *(f"{rule}{UNDONE}" for rule in SIZE_RULES),
    }
)
"""Rules that compare a series with its own baseline, with what healthy runs show, or with others; all others are hard
facts."""


@dataclass(frozen=True)
class Hit:
    """A rule's claim about one reading. group: hits of one rule and group at one site are the same claim."""

    rule: str
    group: str
    place: int
    value: float
    threshold: float
    verdict: Verdict
    says: str
    since: int | None = None
    usual: float | None = None
    forecast: float | None = None


@dataclass
class _Group:
    kept: list[tuple[tuple[int, ...], Finding]] = field(default_factory=list)
    sites: dict[str, tuple[int, Hit]] = field(default_factory=dict)
    """By site: the edit, and what was claimed of it then."""


class Ledger:
    """Takes hits edit by edit; keeps the first sites of each rule and group, and counts the rest."""

    def __init__(self, columns: Columns) -> None:
        self._columns = columns
        self._groups: dict[tuple[str, str], _Group] = {}
        self.worst: Verdict = "stable"

    def add(self, edit: int, hits: Iterable[Hit]) -> None:
        """Book the hits of one edit."""
        for hit in sorted(hits, key=lambda hit: self._columns.order(hit.place)):
            metric, site = self._columns.keys[hit.place]
            group = self._groups.setdefault((hit.rule, hit.group), _Group())
            if site in group.sites:
                continue
            group.sites[site] = edit, hit
            if severity(hit.verdict) > severity(self.worst):
                self.worst = hit.verdict
            if len(group.kept) < KEPT:
                finding = Finding(
                    rule=hit.rule,
                    metric=metric,
                    site=site,
                    edit=edit,
                    value=hit.value,
                    threshold=hit.threshold,
                    says=hit.says,
                    verdict=hit.verdict,
                    since=hit.since,
                    usual=hit.usual,
                    forecast=hit.forecast,
                )
                group.kept.append(((edit, *self._columns.order(hit.place)), finding))

    def put_back(self, edits: Collection[int], rules: Collection[str] | None = None) -> list[Hit]:
        """These edits were undone: all that was claimed of them, by these rules or by any, counts as drift at most.

        Returns the claims that counted for more.
        """
        undone = [
            (edit, hit, key, site)
            for key, group in self._groups.items()
            if rules is None or key[0] in rules
            for site, (edit, hit) in group.sites.items()
            if edit in edits and severity(hit.verdict) > severity("drifting")
        ]
        for _, _, key, site in undone:
            group = self._groups[key]
            del group.sites[site]
            group.kept = [(order, finding) for order, finding in group.kept if finding.site != site]
        left = [hit.verdict for group in self._groups.values() for _, hit in group.sites.values()]
        self.worst = max(left, key=severity, default="stable")
        for edit, hit, _, _ in sorted(undone, key=lambda item: item[0]):
            says = f"{hit.says} It was put back before the next edit."
            self.add(edit, [replace(hit, rule=f"{hit.rule}{UNDONE}", verdict="drifting", says=says)])
        return [hit for _, hit, _, _ in undone]

    def withdraw(self, rule: str) -> list[Hit]:
        """What this rule claimed, and counts for nothing, was seen to mean nothing. Returns the claims."""
        gone = [key for key in self._groups if key[0] == rule]
        return [hit for key in gone for _, hit in self._groups.pop(key).sites.values()]

    def has_hard_fact(self) -> bool:
        """Whether any finding that is ``diverging`` or worse is a hard fact."""
        bad = self.first_bad()
        return bad is not None and bad.rule not in DRIFT_RULES

    def first_bad(self) -> Finding | None:
        """The earliest hard fact that is ``diverging`` or worse, by the edit it is about and then by dataflow.

        Without one, the earliest drift alarm, by the edit at which it was raised. None when there is neither.
        """
        bad = [
            (order, finding)
            for group in self._groups.values()
            for order, finding in group.kept
            if severity(finding.verdict) >= severity("diverging")
        ]
        hard = [((finding.start, *order[1:]), finding) for order, finding in bad if finding.rule not in DRIFT_RULES]
        chosen = hard or bad
        return min(chosen, key=lambda item: item[0])[1] if chosen else None

    def findings(self) -> tuple[Finding, ...]:
        """All kept findings in order of edit, then of dataflow; the last of a group says how many more there are."""
        listed = []
        for group in self._groups.values():
            kept = list(group.kept)
            more = len(group.sites) - len(kept)
            if more:
                order, last = kept[-1]
                says = f"{last.says} (And at {more} more site{'s' if more > 1 else ''}.)"
                kept[-1] = (order, replace(last, says=says, more_sites=more))
            listed += kept
        return tuple(finding for _, finding in sorted(listed, key=lambda item: item[0]))
