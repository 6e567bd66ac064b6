"""What a value that is not finite means: there by design, passing, or here to stay. Only the last is a verdict.

- By design: a logit of −∞ that is there when logits are first read, with all others finite. A token that is never to
  come is masked so. What is computed from it (softmax, KL) is finite.
- Passing: it was seen inside an edit that then moved no weight. A loss scaler that meets an overflow skips the step,
  and so does a loop that checks its loss. The edit is lost, the model is what it was. Where the forward pass itself is
  not finite a second time in a row, and no canary says that the model is sound, it is the model that is not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

import numpy as np

from stabilitylab.analysis.columns import Flat, Schema, kind_of
from stabilitylab.analysis.ledger import Hit
from stabilitylab.analysis.lookup import Lookup
from stabilitylab.analysis.words import number, place_name
from stabilitylab.record.readings import MODEL_SITE

FAMILIES: Final = ("canary", "logits")
_MASKED: Final = frozenset({"nonfinite", "min", "max_abs_last", "max_abs_worst", "nonfinite_passes"})
"""What a masked logit shows in."""
_INSIDE: Final = frozenset({"activation", "attention", "gradient", "logits"})
_FORWARD: Final = frozenset({"activation", "attention", "logits"})
AGAIN: Final = 2


class NonfiniteContext:
    """Follows every row; `excuses` is about the last one."""

    def __init__(self, lookup: Lookup) -> None:
        self._lookup = lookup
        self._designed: set[str] = set()
        self._seen: set[str] = set()
        self._skipped = False
        self._again = 0

    def look(self, row: Flat, any_bad: bool) -> None:
        """Take in a row. any_bad: whether it holds any value that is not finite."""
        self._look_for_design(row)
        self._skipped = any_bad and self._is_skipped(row)
        forward = any_bad and any(
            kind_of(metric) in _FORWARD and not (kind_of(metric) in self._designed and _part(metric) in _MASKED)
            for _, metric in self._bad(row)
        )
        watched = self._lookup.at("canary.nonfinite").size > 0
        self._again = self._again + 1 if self._skipped and forward and not watched else 0

    def is_new(self, schema: Schema) -> bool:
        """Whether rows of these readings may tell what is not finite by design."""
        return any(
            (f"{family}.nonfinite", MODEL_SITE) in schema.position for family in FAMILIES if family not in self._seen
        )

    def pass_over(self) -> None:
        """A row in which all is finite."""
        self._again = 0

    def excuses(self, metric: str, site: str) -> bool:
        """Whether a reading that is not finite is so by design, or passing."""
        kind = kind_of(metric)
        if kind in self._designed and site == MODEL_SITE and _part(metric) in _MASKED:
            return True
        return self._skipped and self._again < AGAIN and (kind in _INSIDE or metric == "editor.input_max")

    def notes(self, row: Flat) -> Iterator[Hit]:
        """What is worth knowing of it, once."""
        for family in FAMILIES:
            at = self._lookup.at(f"{family}.nonfinite")
            if family in self._designed:
                for place, value, metric, _ in self._lookup.new("masked-by-design", row, at):
                    says = f"{value:,.0f} {family} values are −∞ from the start, all others finite: masked by design."
                    yield Hit("masked-by-design", metric, place, value, 0.0, "stable", says)
        found = list(self._bad(row)) if self._skipped else []
        counts = [position for position, metric in found if metric.endswith(".nonfinite")]  # which say most
        bad = np.array(counts or [position for position, _ in found] or self._overflows(row), dtype=np.intp)
        for place, value, metric, site in self._lookup.new("step-skipped", row, self._lookup.earliest(row, bad)):
            says = (
                f"{metric} at {place_name(site)} is {number(value)} at edit {row.edit}, and no weight moved: the step"
            )
            yield Hit("step-skipped", "skipped", place, value, 0.0, "stable", f"{says} was skipped.")

    def _overflows(self, row: Flat) -> list[np.intp]:
        """Positions of gradients that were not finite as they were summed up, in an edit without any other such value:
        its layers' own passes were sound.
        """
        steps = self._lookup.at("gradient.nonfinite_steps")
        overflows = [position for position in steps if row.values[position] > 0]
        return overflows if overflows and self._is_skipped(row) else []

    def _look_for_design(self, row: Flat) -> None:
        for family in FAMILIES:
            count = self._lookup.value(row, f"{family}.nonfinite", MODEL_SITE)
            if count is None or family in self._seen:
                continue
            self._seen.add(family)
            # The largest passes NaN on: where it is finite, all that is not is −∞.
            largest = self._lookup.value(row, f"{family}.max", MODEL_SITE)
            if count > 0 and largest is not None and math.isfinite(largest):
                self._designed.add(family)

    def _is_skipped(self, row: Flat) -> bool:
        """Whether no weight moved, and all that the edit left is finite."""
        updates = self._lookup.at("update.norm")
        if row.edit == 0 or not updates.size or (row.values[updates] != 0).any():
            return False
        return all(kind_of(metric) in _INSIDE or metric == "editor.input_max" for _, metric in self._bad(row))

    def _bad(self, row: Flat) -> Iterator[tuple[np.intp, str]]:
        """(position, metric) of each reading that is not finite, or counts such; masked logits of the canary apart."""
        counted = self._lookup.at("*.nonfinite")
        bad = np.concatenate((counted[row.values[counted] > 0], self._lookup.at("value")))
        for position in bad:
            metric = self._lookup.key(row, position)[0]
            if metric.endswith(".nonfinite") or not row.finite[position]:
                if kind_of(metric) == "canary" and "canary" in self._designed and _part(metric) in _MASKED:
                    continue
                yield position, metric


def _part(metric: str) -> str:
    return metric.partition(".")[2]
