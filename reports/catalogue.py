"""Every metric that probes emit, as a table for the console and as the documentation's page."""

from __future__ import annotations

from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from stabilitylab.record.readings import Metric

Listed = Sequence[tuple[str, Metric]]
"""(tier, metric), in the order in which an edit makes them."""

_INTRODUCTION = """\
# Metrics

Made by `stabilitylab probes --markdown`; don't edit. `light` is measured at `probes="light"` and above, `default` at
`"default"` and above, `deep` at `"deep"` alone, and there at each tenth edit unless a probe is told otherwise.
Phase: `before` the edit, `during` it (by hooks; logits seen then are those of the model before the edit took effect) or
`after` it.
"""


def catalogue_table(listed: Listed) -> Table:
    """One row per metric: name, unit and tier, then what it means with its formula and source."""
    table = Table("metric", "meaning", show_lines=True, padding=(0, 1))
    for tier, metric in listed:
        shape = f"{metric.unit}, {metric.scale}" + (f", {metric.length} values" if metric.length > 1 else "")
        name = f"[bold]{escape(metric.name)}[/]\n{escape(shape)}\n[dim]{tier}, {metric.phase}[/]"
        table.add_row(name, f"{escape(metric.meaning)}\n{escape(metric.formula)}\n[dim]{escape(metric.source)}[/]")
    return table


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def catalogue_page(listed: Listed) -> str:
    """The same as a Markdown page with one table per family."""
    lines = [_INTRODUCTION]
    for family in dict.fromkeys(metric.family for _, metric in listed):
        lines += [f"## {family}", "", "| metric | unit | scale | tier | phase | meaning | formula | source |"]
        lines.append("|---|---|---|---|---|---|---|---|")
        for tier, metric in listed:
            if metric.family == family:
                cells = (metric.unit, metric.scale, tier, metric.phase, metric.meaning, metric.formula, metric.source)
                lines.append(f"| `{metric.name}` | " + " | ".join(map(_cell, cells)) + " |")
        lines.append("")
    return "\n".join(lines)
