"""The page of a scan: one HTML page that needs nothing else, no network and, but for tables that sort, no JavaScript.

Made as the report is, see `stabilitylab.reports.html`: what comes from the model is text, cleaned and escaped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from stabilitylab.analysis.blocks import Block, blocks
from stabilitylab.analysis.caution import URGENCIES, Caution
from stabilitylab.analysis.caution_model import FEW_BITS
from stabilitylab.record.scanned import Scan
from stabilitylab.reports.html import fill, write_pages
from stabilitylab.reports.scan_tables import block_table, precision_table, tables
from stabilitylab.reports.scan_words import (
    LOOKS,
    ROOMY,
    Told,
    bits,
    block_names,
    counts_words,
    filled,
    look_of,
    looked_at,
    model_name,
    plain,
    price,
)
from stabilitylab.reports.text import clean, number

TELLING: Final = 12
"""Warnings that are seen at once; the rest can be unfolded."""
LISTED: Final = 200
LABELLED: Final = 16
"""Columns that have room for their names."""
NAMED: Final = 4


@dataclass(frozen=True)
class Column:
    """A block of the model in the picture of headroom. share: how high, 0 to 1. tone: an urgency, or empty."""

    name: str
    bits: str
    words: str
    share: float
    tone: str
    sign: str


def write_scan(scan: Scan, cautions: Sequence[Caution], out: str | Path) -> Path:
    """Write the page of a scan to `out`, and its data beside it as JSON. Returns `out`.

    Raises RunError when it can't be written there.
    """
    made = plain(scan, cautions)
    beside = Path(out).with_suffix(".json").name
    return write_pages(out, lambda: (page(scan, cautions, beside), made))


def page(scan: Scan, cautions: Sequence[Caution], beside: str = "scan.json") -> str:
    """The page as text. beside: the name of the file of its data."""
    listed = blocks(scan, cautions)
    told = [Told(caution) for caution in cautions[:LISTED]]
    return fill(
        "scan.html.j2",
        "scan.js",
        drawn=False,
        scan=scan,
        name=model_name(scan),
        beside=clean(beside, 80),
        look=look_of(cautions),
        looks=LOOKS,
        counts=counts_words(cautions),
        cautions=cautions,
        first=told[:TELLING],
        more=told[TELLING:],
        cautions_left_out=len(cautions) - len(told),
        columns=_columns(listed),
        labelled=len(listed) <= LABELLED,
        key=_key(listed),
        few=filled(FEW_BITS),
        few_bits=number(FEW_BITS),
        roomy=number(ROOMY),
        facts=looked_at(scan),
        prices=[price(found) for found in scan.precisions],
        precisions=precision_table(scan),
        layers=block_table(listed),
        tables=tables(scan, cautions),
    )


def _columns(listed: Sequence[Block]) -> list[Column]:
    names = block_names([block.name for block in listed], 40)
    made = []
    for block in listed:
        sign = "" if block.urgency is None else LOOKS[block.urgency].sign
        words = f"{names[block.name]}: {bits(block.headroom_bits)} bits" + (
            f", {block.urgency}" if block.urgency else ""
        )
        share = filled(block.headroom_bits)
        made.append(Column(names[block.name], bits(block.headroom_bits), words, share, block.urgency or "", sign))
    return made


def _key(listed: Sequence[Block]) -> list[tuple[str, str]]:
    """(words, tone) of each urgency, naming the blocks that are warned of; and of those that are not."""
    names = block_names([block.name for block in listed], 40)
    key: list[tuple[str, str]] = []
    for urgency in URGENCIES:
        held = [names[block.name] for block in listed if block.urgency == urgency]
        more = f" and {number(len(held) - NAMED)} more" if len(held) > NAMED else ""
        if held:
            key.append((f"{LOOKS[urgency].sign} {urgency}: {', '.join(held[:NAMED])}{more}", urgency))
    calm = sum(block.urgency is None for block in listed)
    return [*key, (f"nothing to warn of: {number(calm)}", "none")] if calm else key
