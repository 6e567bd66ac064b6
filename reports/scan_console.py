"""A scan as a short page for a terminal: warnings first, then what each block of the model can take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from stabilitylab.analysis.blocks import Block, blocks
from stabilitylab.analysis.caution import Caution
from stabilitylab.record.scanned import CapacityScan, Scan
from stabilitylab.reports.scan_words import (
    LOOKS,
    ROOMY,
    bits,
    block_names,
    capacity_share,
    counts_words,
    filled,
    look_of,
    looked_at,
    model_name,
    plain,
    price,
    ranked,
    steps_words,
)
from stabilitylab.reports.text import clean, number, shorten

__all__ = ["plain", "scan_page"]

CAUTIONS_SHOWN: Final = 12
BLOCKS_SHOWN: Final = 16
CAPACITIES_SHOWN: Final = 12
SKIPPED_SHOWN: Final = 4
BAR: Final = 10
"""Columns of a full bar."""


def scan_page(scan: Scan, cautions: Sequence[Caution]) -> RenderableType:
    """What was scanned, what it warns of and what to do, and then the figures; at 80 columns without a broken line."""
    look = look_of(cautions)
    parts: list[RenderableType] = [
        Text.assemble((f"{look.sign} {counts_words(cautions)}", f"bold {look.style}"), f"  {model_name(scan)}"),
        Text("; ".join(_told(name, value) for name, value in looked_at(scan)), style="dim"),
    ]
    parts += [part for caution in cautions[:CAUTIONS_SHOWN] for part in (Text(), _caution(caution))]
    if len(cautions) > CAUTIONS_SHOWN:
        left = cautions[CAUTIONS_SHOWN:]
        parts += [Text(), Text(f"and {counts_words(left)} more: see the page that -o writes", style="dim")]
    if scan.tensors:
        parts += [Text(), *_blocks(blocks(scan, cautions))]
    if scan.precisions:
        parts += [Text(), Text("What a precision would cost", style="bold"), _prices(scan)]
    if scan.capacities:
        parts += [Text(), *_capacities(scan.capacities)]
    if scan.skipped:
        parts += [Text(), Text("Not read", style="bold"), _skipped(scan)]
    return Group(*parts)


def _told(name: str, value: str) -> str:
    return f"{value} to be edited" if name == "To be edited" else value


def _caution(caution: Caution) -> RenderableType:
    look = LOOKS[caution.urgency]
    table = Table.grid(padding=(0, 1))
    table.add_column(width=7, no_wrap=True)
    table.add_column(overflow="fold")
    sign = Text(f"{look.sign} {look.word.upper()}", style=f"bold {look.style}")
    table.add_row(sign, Text(clean(caution.says, 500)))
    if caution.advice:
        table.add_row(Text(), Text.assemble(("→ ", "bold"), clean(caution.advice, 400), style="dim"))
    return table


def _shown(listed: Sequence[Block]) -> list[Block]:
    """In the order of the model: those that are warned of, and else those with least headroom."""
    if len(listed) <= BLOCKS_SHOWN:
        return list(listed)

    def rank(block: Block) -> tuple[int, float]:
        known = block.headroom_bits
        urgency = len(LOOKS) if block.urgency is None else list(LOOKS).index(block.urgency)
        return urgency, math.inf if known is None or math.isnan(known) else known

    kept = {id(block) for block in sorted(listed, key=rank)[:BLOCKS_SHOWN]}
    return [block for block in listed if id(block) in kept]


def _blocks(listed: Sequence[Block]) -> list[RenderableType]:
    kept, names = _shown(listed), block_names([block.name for block in listed], 22)
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim", pad_edge=False)
    table.add_column("", width=1)
    table.add_column("layer", no_wrap=True)
    table.add_column("bits left", no_wrap=True)
    for heading in ("largest", "norm", "NaN, ∞", "0 rows", "outliers"):
        table.add_column(heading, justify="right", no_wrap=True)
    for block in kept:
        look = None if block.urgency is None else LOOKS[block.urgency]
        table.add_row(
            Text("" if look is None else look.sign, style="" if look is None else look.style),
            Text(names[block.name] + (" *" if block.is_edited else "")),
            Text.assemble(
                f"{bits(block.headroom_bits):>5} ",
                (_bar(filled(block.headroom_bits)), "green" if look is None else look.style),
            ),
            *(
                Text("·" if value == 0 and counted else number(value), style="dim" if value == 0 and counted else "")
                for value, counted in (
                    (block.largest, False),
                    (block.norm, False),
                    (block.nonfinite, True),
                    (block.zero_rows, True),
                    (block.outliers, True),
                )
            ),
        )
    left = len(listed) - len(kept)
    foot = f"A full bar: {ROOMY:.0f} bits or more to the dtype’s largest value." + (
        " *: to be edited." if any(block.is_edited for block in kept) else ""
    )
    more = [Text(f"and {number(left)} more: see the page that -o writes", style="dim")] if left else []
    return [Text("What each layer has left", style="bold"), table, *more, Text(foot, style="dim")]


def _bar(share: float, width: int = BAR) -> str:
    """A bar in eighths of a column; something of it is seen where there is anything."""
    eighths = max(round(8 * width * share), 1 if share > 0 else 0)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def _prices(scan: Scan) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for dtype, says in map(price, scan.precisions):
        table.add_row(Text(dtype), Text(says))
    return table


def _capacities(found: Sequence[CapacityScan]) -> list[RenderableType]:
    table = Table.grid(padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column(width=2 * BAR, no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(style="dim", no_wrap=True)
    for each in ranked(found)[:CAPACITIES_SHOWN]:
        table.add_row(
            Text(shorten(each.site, 34)),
            Text(_bar(capacity_share(each.steps, found), 2 * BAR), style="cyan"),
            Text(steps_words(each.steps)),
            Text(f"{steps_words(each.low)} to {steps_words(each.high)}"),
        )
    left = len(found) - CAPACITIES_SHOWN
    more = [Text(f"and {number(left)} more, all of which take more", style="dim")] if left > 0 else []
    title = Text.assemble(
        ("How far a layer can be moved", "bold"), (", in updates of its usual size; logarithmic", "dim")
    )
    return [title, table, *more]


def _skipped(scan: Scan) -> RenderableType:
    said = [Text(f"{shorten(name, 60)}: {clean(why, 200)}") for name, why in list(scan.skipped.items())[:SKIPPED_SHOWN]]
    if len(scan.skipped) > SKIPPED_SHOWN:
        said.append(Text(f"and {number(len(scan.skipped) - SKIPPED_SHOWN)} more", style="dim"))
    return Padding(Group(*said), (0, 0, 0, 2))
