"""A scan's figures as tables of text: each cell is cleaned, and knows by which number it is sorted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from stabilitylab.analysis.blocks import Block
from stabilitylab.analysis.caution import URGENCIES, Caution, Urgency
from stabilitylab.record.scanned import ActivationScan, MomentScan, RatesScan, Scan, Some, StatisticsScan, TensorScan
from stabilitylab.reports.scan_words import bits, block_names, capacity_share, filled, ranked, steps_words
from stabilitylab.reports.text import clean, number, percent, shorten

ROWS: Final = 400
"""Of a table at most; the most telling are kept."""
NAMED: Final = 4


@dataclass(frozen=True)
class Bar:
    """share: how long, 0 to 1. tone: the urgency in whose colour, or empty. low, high: a whisker."""

    share: float
    tone: str = ""
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Cell:
    """text: cleaned, not escaped. key: the number that it is sorted by, as text; None where it is sorted as text."""

    text: str
    key: str | None = None
    css: str = ""
    bar: Bar | None = None


@dataclass(frozen=True)
class Table:
    """headings: (text, class). rows: as many cells each. left_out: rows that are not there. folded: to be unfolded."""

    anchor: str
    title: str
    about: str
    headings: tuple[tuple[str, str], ...]
    rows: tuple[tuple[Cell, ...], ...]
    left_out: int = 0
    folded: bool = False


def tables(scan: Scan, cautions: Sequence[Caution]) -> tuple[Table, ...]:
    """Those that have rows, but for those of blocks and of precisions."""
    made = (_capacities(scan), _activations(scan), _statistics(scan), _rates(scan), _moments(scan))
    return tuple(table for table in (*made, _tensors(scan, cautions), _skipped(scan)) if table.rows)


def block_table(listed: Sequence[Block]) -> Table:
    """A row for each block of the model, in its order."""
    names = block_names([block.name for block in listed], 60)
    rows = tuple(
        (
            Cell(names[block.name] + (" (to be edited)" if block.is_edited else ""), css="site mono"),
            Cell(block.urgency or "–", _key(_rank(block.urgency)), f"u-{block.urgency}" if block.urgency else ""),
            Cell(
                bits(block.headroom_bits),
                _key(block.headroom_bits),
                "n bar",
                Bar(filled(block.headroom_bits), block.urgency or ""),
            ),
            _number(block.largest),
            _number(block.norm),
            _count(block.nonfinite),
            _count(block.zero_rows),
            _count(block.outliers),
            Cell(clean(", ".join(block.dtypes), 60)),
            _number(block.entries),
        )
        for block in listed
    )
    return _table(
        "layers",
        "What each layer has left",
        "Bits from its largest entry to the largest value of its dtype: each is a doubling. A full bar is 20 bits or"
        " more, a millionfold. Outliers are rows and columns with many times the norm of the median one.",
        "Layer|Warned of|#Headroom, bits|#Largest|#Norm|#NaN, ∞|#Rows of 0|#Outliers|Dtype|#Entries",
        rows,
    )


def _capacities(scan: Scan) -> Table:
    found = scan.capacities
    rows = tuple(
        (
            _name(each.site),
            Cell(
                steps_words(each.steps),
                _key(each.steps),
                "n bar",
                Bar(
                    capacity_share(each.steps, found),
                    low=capacity_share(each.low, found),
                    high=capacity_share(each.high, found),
                ),
            ),
            Cell(f"{steps_words(each.low)} to {steps_words(each.high)}", _key(each.low), "n"),
            _number(each.update_norm),
            _number(each.updates),
        )
        for each in ranked(found)
    )
    lost = "" if scan.lost_nats is None else f", a mean KL of {number(scan.lost_nats)} nats"
    return _table(
        "capacities",
        "How far each layer can be moved",
        f"Along dry edits, in multiples of their update, until the canary is lost{lost}. The bars are logarithmic; the"
        " thin line is from the least to the greatest of the dry edits. ∞: not lost within the most that was tried.",
        "Layer|#Steps (median)|#Least to greatest|#Norm of an update|#Dry edits",
        rows,
    )


def precision_table(scan: Scan) -> Table:
    """A row for each dtype that was tried."""
    rows = tuple(
        (
            _name(each.dtype),
            Cell(bits(each.headroom_bits), _key(each.headroom_bits), "n bar", Bar(filled(each.headroom_bits))),
            Cell(bits(each.activation_headroom_bits), _key(each.activation_headroom_bits), "n"),
            _number(each.overflowing),
            _number(each.vanishing),
            Cell(percent(each.swallowed_share), _key(each.swallowed_share), "n"),
            Cell(percent(each.agreement), _key(each.agreement), "n"),
            _number(each.kl_nats),
        )
        for each in scan.precisions
    )
    return _table(
        "precisions",
        "What a precision would cost",
        "Weights that would not fit or become 0, updates of dry edits that are rounded away when they are added, and"
        " the canary’s answers with all weights rounded.",
        "Dtype|#Headroom, bits|#Activations, bits|#Would not fit|#Become 0|#Rounded away|#Same answers|#KL, nats",
        rows,
    )


def _activations(scan: Scan) -> Table:
    def row(each: ActivationScan) -> tuple[Cell, ...]:
        token = "" if each.token is None else f", token {each.token}"
        dead = "–" if each.dead is None else f"{number(each.dead.count)} of {number(each.units)}"
        return (
            _name(each.layer),
            Cell(clean(each.what, 20)),
            Cell(bits(each.headroom_bits), _key(each.headroom_bits), "n bar", Bar(filled(each.headroom_bits))),
            _number(each.largest),
            _number(each.largest / each.typical if each.largest is not None and each.typical else None),
            Cell(clean(f"unit {each.unit}, row {each.row}, position {each.position}{token}", 100)),
            _count(each.nonfinite),
            Cell(dead, _key(None if each.dead is None else each.dead.count), "n"),
            Cell(clean(each.dtype, 30)),
        )

    return _table(
        "activations",
        "What the canary makes of the layers",
        "The largest activation of each layer, where it stands, and how many times the median it is. The input of a"
        " normalisation ends where its squares do.",
        "Layer|Of|#Headroom, bits|#Largest|#Times the median|Where|#NaN, ∞|#Dead units|Dtype",
        tuple(map(row, sorted(scan.activations, key=lambda each: _room(each.headroom_bits))[:ROWS])),
        len(scan.activations),
    )


def _statistics(scan: Scan) -> Table:
    def row(each: StatisticsScan) -> tuple[Cell, ...]:
        return (
            Cell(f"{clean(each.editor, 40)}: {shorten(each.name, 60)}", css="site"),
            Cell(clean(each.kind, 20) or "both"),
            _number(each.units),
            _number(each.rows),
            _number(each.typical),
            _some(each.zero),
            _some(each.nan),
            _some(each.tiny),
            _number(each.guard),
        )

    return _table(
        "statistics",
        "The editor’s statistics",
        "What its inputs are divided by: u is a layer’s inputs, v the gradients at its outputs. A unit without spread"
        " is divided by the guard alone.",
        "Part|Of|#Units|#Made from rows|#Median spread|No spread|NaN or ∞|Tiny|#Guard",
        tuple(map(row, scan.statistics[:ROWS])),
        len(scan.statistics),
    )


def _rates(scan: Scan) -> Table:
    def row(each: RatesScan) -> tuple[Cell, ...]:
        more = f", and {number(len(each.values) - 12)} more" if len(each.values) > 12 else ""
        return (_name(f"{each.editor}: {each.name}"), Cell(", ".join(map(number, each.values[:12])) + more, css="wide"))

    return _table(
        "rates",
        "Learned edit rates",
        "A step of an edit is multiplied by its layer’s.",
        "Part|Values",
        tuple(map(row, scan.rates[:ROWS])),
        len(scan.rates),
    )


def _moments(scan: Scan) -> Table:
    def row(each: MomentScan) -> tuple[Cell, ...]:
        return (
            _name(each.name),
            Cell(clean(each.what, 20)),
            _number(each.tokens),
            Cell(f"{number(each.rank)} of {number(each.size)}", _key(each.rank), "n"),
            _number(each.condition),
            Cell(f"{number(each.smallest)} to {number(each.largest)}", _key(each.smallest), "n"),
            _some(each.zero_rows),
            _count(each.nonfinite),
            _number(each.asymmetry),
            _number(each.idempotence),
        )

    return _table(
        "moments",
        "Second moments of keys, and projections",
        "ROME, MEMIT and their kin divide by them: what has no full rank lets some directions through undivided.",
        "File|Is|#Tokens|#Rank|#Condition|#Eigenvalues|Rows of 0|#NaN, ∞|#‖C − Cᵀ‖ / ‖C‖|#‖P² − P‖ / ‖P‖",
        tuple(map(row, scan.moments[:ROWS])),
        len(scan.moments),
    )


def _tensors(scan: Scan, cautions: Sequence[Caution]) -> Table:
    places = {caution.place for caution in cautions}

    def telling(each: TensorScan) -> tuple[bool, bool, float]:
        return each.name not in places and each.layer not in places, not each.is_site, _room(each.headroom_bits)

    kept = {id(each) for each in sorted(scan.tensors, key=telling)[:ROWS]}
    decomposed = any(each.spectral_norm is not None for each in scan.tensors)

    def row(each: TensorScan) -> tuple[Cell, ...]:
        spectrum = (each.spectral_norm, each.stable_rank, each.condition) if decomposed else ()
        return (
            _name(each.name),
            Cell(" × ".join(map(number, each.shape[:6])) or "scalar", _key(each.size), "n"),
            Cell(clean(each.dtype, 20)),
            Cell(bits(each.headroom_bits), _key(each.headroom_bits), "n"),
            Cell(f"{number(each.least)} to {number(each.greatest)}", _key(each.largest), "n"),
            _number(each.norm),
            _count(each.nonfinite),
            Cell(_share(each.zeros, each.size), _key(each.zeros), "n"),
            Cell(_share(each.subnormal, each.size), _key(each.subnormal), "n"),
            _some(each.zero_rows),
            _some(each.loud_rows),
            _some(each.loud_columns),
            _number(each.worst_output),
            Cell(bits(each.output_headroom_bits), _key(each.output_headroom_bits), "n"),
            *map(_number, spectrum),
        )

    spectral = "|#Spectral norm|#Stable rank|#Condition" if decomposed else ""
    return _table(
        "tensors",
        "Each tensor",
        "Outlier rows and columns stand with how many times the norm of the median one they have. Largest output: the"
        " most that an input of RMS 1 can make; its bits are those to where its dtype, or its square in the next"
        " normalisation, ends.",
        "Tensor|#Shape|Dtype|#Headroom, bits|#Range|#Norm|#NaN, ∞|#Zeros|#Subnormal|Rows of 0|Outlier rows"
        f"|Outlier columns|#Largest output|#Its bits{spectral}",
        tuple(row(each) for each in scan.tensors if id(each) in kept),
        len(scan.tensors),
        folded=True,
    )


def _skipped(scan: Scan) -> Table:
    listed = list(scan.skipped.items())
    rows = tuple((_name(name), Cell(clean(why, 400), css="wide")) for name, why in listed[:ROWS])
    return _table("skipped", "What was not read", "And why.", "What|Why", rows, len(listed))


def _table(
    anchor: str,
    title: str,
    about: str,
    headings: str,
    rows: tuple[tuple[Cell, ...], ...],
    of: int | None = None,
    *,
    folded: bool = False,
) -> Table:
    """headings: parted by ``|``, ``#`` before one of numbers. of: how many rows there would be."""
    told = tuple((each.removeprefix("#"), "n" if each.startswith("#") else "") for each in headings.split("|"))
    return Table(anchor, title, about, told, rows, 0 if of is None else of - len(rows), folded)


def _key(value: float | None) -> str:
    if value is None or math.isnan(value):
        return ""
    return f"{value:.6g}".replace("inf", "Infinity")


def _rank(urgency: Urgency | None) -> int:
    return len(URGENCIES) if urgency is None else URGENCIES.index(urgency)


def _room(value: float | None) -> float:
    return math.inf if value is None or math.isnan(value) else value


def _name(name: str) -> Cell:
    return Cell(shorten(name, 60) or "(no name)", css="site mono")


def _number(value: float | None) -> Cell:
    is_bad = value is not None and math.isnan(value)
    return Cell(number(value), _key(value), "n bad-value" if is_bad else "n")


def _count(value: int) -> Cell:
    """A number of faults: 0 is nothing to look at."""
    return Cell(number(value) if value else "·", _key(value), "n bad-value" if value else "n muted")


def _share(part: int, whole: int) -> str:
    return percent(part / whole) if part and whole else "·"


def _some(found: Some) -> Cell:
    """``1: unit 17 (0)``, by index and what is striking about it."""
    if not found.count:
        return Cell("·", "0", "muted")
    values = [*found.values[:NAMED], *[None] * NAMED]
    named = [
        f"{index}" if value is None else f"{index} ({number(value)})"
        for index, value in zip(found.first[:NAMED], values, strict=False)
    ]
    more = f", {number(found.count - len(named))} more" if found.count > len(named) > 0 else ""
    return Cell(f"{number(found.count)}: {', '.join(named)}{more}" if named else number(found.count), _key(found.count))
