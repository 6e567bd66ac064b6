"""The tables: one line for each watch, one for each loop that was not named right, one for each cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from rich import box
from rich.table import Table

from benchmarks.detection.scores import Figure
from benchmarks.detection.table import interval
from benchmarks.tracing.scoring import GROUPS, Heard, counts, figures

COLUMNS: Final = ("operator", "line", "direction", "right")
COSTS: Final[Mapping[str, tuple[str, float | None, Callable[[Mapping[str, Any]], Mapping[str, Any] | None]]]] = {
    "noise (A/A)": ("a_a", None, lambda found: found.get("a_a")),
    "a monitor without probes": ("bare", None, lambda found: found.get("bare")),
    "armed and quiet, beside that": ("bare_armed", 1.0, lambda found: found["added"].get("armed and quiet")),
    "traced, beside that": ("bare_traced", 1.1, lambda found: found["added"].get("traced, no probes")),
    "traced in full, beside that": ("bare_ranges", 2.0, lambda found: found["added"].get("traced in full, no probes")),
    "default": ("whole", None, lambda found: found.get("whole")),
    "default, traced": ("traced", None, lambda found: found.get("traced")),
    "traced, beside the default": ("traced", 1.1, lambda found: found["added"].get("traced, default probes")),
}
"""What is told of a workload: (the variant that runs, the goal, where its summary is). A goal of 1 is met where the
interval holds 1, any other where the median is at or below it.
"""


def met(goal: float | None, summary: Mapping[str, Any]) -> bool | None:
    """Whether a cost meets its goal; None where it has none, or is not known well enough."""
    if goal is None or summary["median"] is None:
        return None
    if goal > 1.0:
        return bool(summary["median"] <= goal)
    return None if summary["low"] is None else bool(summary["low"] <= 1.0)


def accuracy(title: str, watches: Mapping[str, Sequence[Heard]]) -> Table:
    """One line for each watch."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    for name in (*COLUMNS, "arrived", "taken in", "healthy", "finite"):
        table.add_column(name, justify="right")
    for watch, heards in watches.items():
        found, of = figures(heards), counts(heards)
        table.add_row(
            watch,
            *(_share(found[name], brief=name != "right") for name in COLUMNS),
            _answers(of.get("arrived")),
            _answers(of.get("optional")),
            *(_claims(of.get(group)) for group in ("no-claim", "finite")),
        )
    table.caption = (
        "right: operator, line and direction, with Wilson's 95 % interval. arrived, taken in: right / silent / wrong. "
        "healthy, finite: loops in which something is named, of all; 0 is right."
    )
    table.caption_justify = "left"
    return table


def _share(figure: Figure, *, brief: bool) -> str:
    if figure.value is None:
        return "–"
    hits = f"{round(figure.value * figure.runs)}/{figure.runs}"
    return hits if brief else f"{hits} [dim]({interval(figure)})[/]"


def _answers(of: Mapping[str, int] | None) -> str:
    if of is None:
        return "–"
    wrong = of.get("wrong", 0) + of.get("partly", 0)
    return f"{of.get('right', 0)} / {of.get('silent', 0)} / {wrong}"


def _claims(of: Mapping[str, int] | None) -> str:
    return "–" if of is None else f"{sum(of.values()) - of.get('silent', 0)}/{sum(of.values())}"


def misses(title: str, heards: Sequence[Heard]) -> Table:
    """One line for each loop of which something else was said than should be."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("loop", "watch", "answer", "named"):
        table.add_column(name, overflow="fold")
    order = list(GROUPS)
    for each in sorted(heards, key=lambda each: (order.index(each.group), each.loop, each.watch)):
        if each.error or not is_well(each):
            said = each.named.says if each.named is not None else each.error or "nothing"
            table.add_row(each.loop, each.watch, each.answer, said.replace("[", r"\["))
    return table


def is_well(heard: Heard) -> bool:
    """Whether nothing is wrong with what was said."""
    return heard.answer == "right" or (heard.answer == "silent" and heard.group in ("no-claim", "finite", "optional"))


def cost(workload: str, found: Mapping[str, Any], *, promised: bool = True) -> Table:
    """What the tracer takes in one workload. promised: whether the goals hold there."""
    table = Table(title=f"{workload}: CPU time", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("")
    for name in ("median", "95 %", "pairs", "goal", "met"):
        table.add_column(name, justify="right")
    for what, (_, wish, summary_in) in COSTS.items():
        goal = wish if promised else None
        summary = summary_in(found)
        if summary is None or summary["median"] is None:
            continue
        ends = "–" if summary["low"] is None else f"{summary['low']:.3f}–{summary['high']:.3f}"
        wished = "" if goal is None else "no more" if goal == 1.0 else f"≤ {goal:.2f}"
        says = {None: "", True: "yes", False: "no"}[met(goal, summary)]
        table.add_row(what, f"{summary['median']:.3f}", ends, str(summary["pairs"]), wished, says)
    return table
