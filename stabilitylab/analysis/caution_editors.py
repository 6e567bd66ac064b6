"""What a scan's figures of an editor warn of: what it divides by, how fast it writes, what it inverts.

Where the limits come from: ``CONDITION``, ``EVERYTHING``, ``NOTHING`` are those of `analysis.limits`. ``FEW``: a spread
of fewer rows than ten is off by a quarter. ``NO_PROJECTION``: ‖P² − P‖ / ‖P‖ of a projection that was formed in float32
is below 1e-4. ``NOT_SYMMETRIC``: likewise of sums of k kᵀ.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from stabilitylab.analysis.caution import Caution
from stabilitylab.analysis.limits import CONDITION, EVERYTHING, NOTHING
from stabilitylab.analysis.words import listed, number
from stabilitylab.record.scanned import MomentScan, RatesScan, Scan, Some, StatisticsScan

FEW: Final = 10
NO_PROJECTION: Final = 1e-2
NOT_SYMMETRIC: Final = 1e-3
_NAMED: Final = 4
_LEARNING: Final = ("ultraedit", "rledit")
"""How the names of editors begin, or of their classes, whose normaliser is empty before the first edit, and learns in
each."""


def cautions(scan: Scan) -> Iterator[Caution]:
    """All of them."""
    counted: set[tuple[str, str]] = set()
    for statistics in scan.statistics:
        name = (statistics.editor, statistics.name)
        yield from _rows(statistics, again=name in counted)
        counted.add(name)
        if statistics.rows != 0:
            yield from _spreads(statistics)
    for rates in scan.rates:
        yield from _rates(rates)
    for moment in scan.moments:
        if moment.what != "cache":
            yield from _projection(moment) if moment.what == "projection" else _moment(moment)
    yield from _caches([moment for moment in scan.moments if moment.what == "cache"])
    yield from _hypernetwork(scan.editor_nonfinite)


def _place(statistics: StatisticsScan) -> str:
    layers = statistics.layers[:_NAMED]
    return listed_names(layers, len(statistics.layers)) if layers else statistics.name


def listed_names(names: tuple[str, ...], count: int) -> str:
    """``a, b and 3 more``."""
    more = f" and {count - len(names)} more" if count > len(names) else ""
    return f"{', '.join(names)}{more}"


def _units(some: Some) -> str:
    return listed("unit", some.first[:_NAMED], some.count)


_WHAT: Final = {"u": "inputs", "v": "gradients at the output", "": "inputs and gradients"}


def _of(found: StatisticsScan) -> str:
    return f"{found.editor}'s statistics of the {_WHAT[found.kind]}"


def _rows(found: StatisticsScan, *, again: bool) -> Iterator[Caution]:
    """What they were made from. again: it was said of the same normaliser's other part already."""
    if found.rows is None or again:
        return
    place = _place(found)
    if found.rows == 0:
        yield _empty(found, place)
    elif found.rows < FEW:
        few = found.rows <= 1
        yield Caution(
            "spread-of-few-rows",
            "fatal" if few else "risk",
            place,
            f"{found.editor}'s statistics for {place} were made from {number(found.rows)} row{'' if few else 's'}:"
            f" {'one row has no spread' if few else 'a spread of so few is a guess'}.",
            "Gather them over many edits before the first one counts.",
            "normaliser-too-few-rows",
        )


def _spreads(found: StatisticsScan) -> Iterator[Caution]:
    of, place = _of(found), _place(found)
    if found.nan.count or found.nan_means:
        what = "spread" if found.nan.count else "mean"
        count = max(found.nan.count, found.nan_means)
        yield Caution(
            "spread-nan",
            "fatal",
            place,
            f"The {what} of {number(count)} of {number(found.units)} units of {place} is not finite in {of}: whatever"
            " enters there becomes NaN.",
            "Gather the statistics anew; make sure that they were saved, and loaded, with the editor.",
            "normaliser-nan",
        )
    if found.zero.count and found.zero.count == found.units:
        yield Caution(
            "spread-zero",
            "fatal",
            place,
            f"No unit of {place} has any spread in {of}, as if they were made from one row.",
            "Gather them over many edits before the first one counts.",
            "normaliser-too-few-rows",
        )
    elif found.zero.count:
        has = "has" if found.zero.count == 1 else "have"
        its = "its" if found.zero.count == 1 else "their"
        yield Caution(
            "spread-zero",
            "fatal",
            place,
            f"{_units(found.zero).capitalize()} of {place} {has} zero spread in {of}: {its} first non-zero value is"
            f" divided by {number(found.guard)}.{_rounded(found)}",
            "Floor the spreads, at a hundredth of the median one say, or gather the statistics on more text.",
            "normaliser-zero-std",
        )
    if found.tiny.count and found.typical:
        least = min(found.tiny.values)
        has = "has" if found.tiny.count == 1 else "have"
        yield Caution(
            "spread-tiny",
            "risk",
            place,
            f"{_units(found.tiny).capitalize()} of {place} {has} next to no spread in {of}, down to {number(least)}"
            f" where the median is {number(found.typical)}: a usual value there comes out as"
            f" {number(found.typical / (least + found.guard))}.",
            "Floor the spreads, at a hundredth of the median one say, or gather the statistics on more text.",
            "normaliser-zero-std",
        )


def _rounded(found: StatisticsScan) -> str:
    small = "6e-8 is rounded to 0: look at what they were saved from"
    return f" They are kept in float16, where less than {small}." if found.dtype == "float16" else ""


def _empty(found: StatisticsScan, place: str) -> Caution:
    if found.editor.lower().startswith(_LEARNING):
        return Caution(
            "normaliser-empty",
            "note",
            place,
            f"The normaliser of {found.editor} for {place} has seen nothing yet; it learns in each edit.",
            "Make the first batch a large one: one row has no spread, and what it leaves is NaN.",
            "normaliser-too-few-rows",
        )
    return Caution(
        "normaliser-empty",
        "fatal",
        place,
        f"The normaliser of {found.editor} for {place} has seen no row: its spreads mean nothing yet.",
        "Load the statistics that the editor was trained with; make sure that they were saved with it.",
        "normaliser-too-few-rows",
    )


def _rates(found: RatesScan) -> Iterator[Caution]:
    place = f"{found.editor} {found.name}"
    bad = [value for value in found.values if not math.isfinite(value)]
    if bad:
        yield Caution(
            "rate-nan",
            "fatal",
            place,
            f"{number(len(bad))} of {len(found.values)} learned rates of {found.editor} ({found.name}) are not finite.",
            "Train the editor anew, or take an earlier archive.",
            "broken-before",
        )
        return
    lost = [value for value in found.values if value <= 0]
    if lost:
        what = "0" if all(value == 0 for value in lost) else "0 or below"
        yield Caution(
            "rate-lost",
            "risk",
            place,
            f"{number(len(lost))} of {len(found.values)} learned rates of {found.editor} ({found.name}) are {what}:"
            " edits there do nothing, or the opposite.",
            "Train the editor longer, or leave these layers out.",
            "weights-unchanged",
        )


def _hypernetwork(nonfinite: Mapping[str, int]) -> Iterator[Caution]:
    if nonfinite:
        first = next(iter(nonfinite))
        yield Caution(
            "hypernetwork-nan",
            "fatal",
            first,
            f"{number(sum(nonfinite.values()))} entries of the editor's own tensors are not finite, in"
            f" {listed_names(tuple(nonfinite)[:_NAMED], len(nonfinite))}: what it writes is NaN.",
            "Train the editor anew, or take an earlier archive.",
            "broken-before",
        )


def _caches(found: Sequence[MomentScan]) -> Iterator[Caution]:
    """AlphaEdit's sums over the keys that were edited."""
    bad = [cache.name for cache in found if cache.nonfinite]
    used = [cache.name for cache in found if not cache.nonfinite and cache.zero_rows.count < cache.size]
    if bad:
        yield Caution(
            "cache-nan",
            "fatal",
            bad[0],
            f"The cache of edited keys is not finite in {listed_names(tuple(bad[:_NAMED]), len(bad))}: each solve with"
            " it gives NaN.",
            "Set AlphaEdit's cache_c to zeros before the run.",
            "singular-solve",
        )
    if used:
        yield Caution(
            "cache-not-empty",
            "note",
            used[0],
            f"The cache of edited keys holds keys of earlier edits already"
            f" ({listed_names(tuple(used[:_NAMED]), len(used))}): updates are held away from them.",
            "Set AlphaEdit's cache_c to zeros before the run, unless it goes on from those edits on purpose.",
            "cache-leaked",
        )


def _moment(found: MomentScan) -> Iterator[Caution]:
    place, size = found.layer or found.name, found.size
    if found.nonfinite:
        yield Caution(
            "moments-nan",
            "fatal",
            place,
            f"{number(found.nonfinite)} entries of the second moments of {place} are not finite: their inverse is NaN.",
            "Gather them anew.",
            "singular-solve",
        )
        return
    if found.smallest is not None and found.largest is not None and found.smallest < -1e-6 * found.largest:
        yield Caution(
            "moments-negative",
            "fatal",
            place,
            f"The second moments of {place} have a negative eigenvalue, {number(found.smallest)}: they are none.",
            "Gather them anew.",
            "singular-solve",
        )
        return
    if found.asymmetry is not None and found.asymmetry > NOT_SYMMETRIC:
        yield Caution(
            "moments-not-symmetric",
            "risk",
            place,
            f"The second moments of {place} are not symmetric: ‖C − Cᵀ‖ is {found.asymmetry:.0%} of ‖C‖.",
            "Gather them anew.",
            "singular-solve",
        )
    if found.tokens is not None and found.tokens < size:
        yield Caution(
            "moments-of-few-tokens",
            "risk",
            place,
            f"The second moments of {place} were made from {number(found.tokens)} tokens for {number(size)} inputs:"
            " they can't be inverted.",
            "Gather them over ten times as many tokens as there are inputs, or add a ridge.",
            "singular-solve",
        )
    elif found.zero_rows.count:
        yield Caution(
            "moments-zero-rows",
            "risk",
            place,
            f"{_units(found.zero_rows).capitalize()} of {place} {'was' if found.zero_rows.count == 1 else 'were'} 0 in"
            " all text that its second moments are of: they have no inverse.",
            "Gather them over more and other text, or add a ridge.",
            "singular-solve",
        )
    elif found.condition is not None and found.condition >= CONDITION:
        rank = "" if found.rank is None or found.rank == size else f" (rank {number(found.rank)} of {number(size)})"
        yield Caution(
            "moments-singular",
            "risk",
            place,
            f"The second moments of {place} have a condition of {number(found.condition)}{rank}: past 1e7 their inverse"
            " in float32 is noise.",
            "Gather them over more text, add a ridge, or invert them in float64.",
            "singular-solve",
        )


def _projection(found: MomentScan) -> Iterator[Caution]:
    if found.nonfinite or (found.idempotence is not None and found.idempotence > NO_PROJECTION):
        why = "is not finite" if found.nonfinite else f"is none: ‖P² − P‖ is {number(found.idempotence or 0)} of ‖P‖"
        yield Caution(
            "no-projection",
            "fatal",
            found.name,
            f"The projection {found.name} {why}.",
            "Compute it anew, from second moments of this model's layers.",
            "null-space-wrong",
        )
    elif found.rank is not None and not NOTHING < found.rank / found.size < EVERYTHING:
        share = found.rank / found.size
        what = "next to nothing is preserved" if share >= EVERYTHING else "there is little room for an edit"
        yield Caution(
            "projection-extreme",
            "note",
            found.name,
            f"The projection {found.name} leaves {share:.1%} of the input directions free: {what}.",
            "Look at the threshold that it was computed with.",
            "null-space-wrong",
        )
