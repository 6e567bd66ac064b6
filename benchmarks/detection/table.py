"""The detection benchmark's figures as tables that fit 100 columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.detection.scores import Figure
from benchmarks.wild.judge import Heard

Figures = Mapping[str, Figure]

GOALS: Final[dict[str, tuple[str, str, Callable[[float], bool]]]] = {
    "recall": ("recall by the loss of the model", "≥ 95 %", lambda value: value >= 0.95),
    "false_alarm_rate": ("false alarms, healthy runs", "≤ 2 %", lambda value: value <= 0.02),
    "lead_share_exponential": ("lead, exponential growth", "≥ 70 %", lambda value: value >= 0.7),
    "lead_share_super_exponential": ("lead, faster than that", "≥ 50 %", lambda value: value >= 0.5),
    "site_top1": ("first bad site, top 1", "≥ 90 %", lambda value: value >= 0.9),
    "site_top3": ("first bad site, top 3", "≥ 98 %", lambda value: value >= 0.98),
    "cause_macro_f1": ("cause, macro-F1", "≥ 85 %", lambda value: value >= 0.85),
    "unknown_abstains": ("unknown mechanisms: abstains", "≥ 80 %", lambda value: value >= 0.8),
    "forecast_error": ("forecast, median error, expon.", "≤ 20 %", lambda value: value <= 0.2),
    "forecast_coverage": ("forecast, 90 % intervals hold", "≥ 85 %", lambda value: value >= 0.85),
}
"""What is promised: in words, as it is printed, and whether a figure meets it."""
FALSE_ALARMS_AT_MOST: Final = 0.05
"""The upper end of that interval is to be below."""

OTHERS: Final = {
    "lead_share": "lead, both (median beside)",
    "lead_share_nonfinite": "lead on the first non-finite value",
    "lead_share_jump": "lead, jumps that take some edits",
    "recall_exponential": "recall, exponential growth",
    "recall_super_exponential": "recall, faster than that",
    "recall_jump": "recall, jumps",
    "recall_ever": "recall, late alarms too",
    "early_alarms": "alarms before the onset",
    "static_detected": "never lost: trouble is named",
    "healthy_trouble_rate": "healthy: trouble is named",
    "healthy_cause_rate": "healthy: a cause is named",
    "healthy_forecast_rate": "healthy: an end is forecast",
    "site_top1_lost": "top 1, runs that are lost",
    "site_top3_lost": "top 3, runs that are lost",
    "cause_accuracy": "cause, share of runs",
    "forecast_error_all": "forecast error, every course",
    "forecast_spoke": "forecasts given, of those asked",
}
PEER_COLUMNS: Final = ("recall", "false_alarm_rate", "lead_share_exponential", "lead_share_super_exponential")


def percent(share: float | None) -> str:
    """Whole percents, or a dash."""
    return "–" if share is None else f"{share:.0%}"


def interval(figure: Figure) -> str:
    """Its ends."""
    return "" if figure.low is None or figure.high is None else f"{figure.low:.0%} to {figure.high:.0%}"


def _met(name: str, figure: Figure) -> str:
    if figure.value is None:
        return ""
    met = GOALS[name][2](figure.value)
    if name == "false_alarm_rate":
        met = met and figure.high is not None and figure.high <= FALSE_ALARMS_AT_MOST
    return "yes" if met else "no"


def totals(title: str, figures: Figures) -> Table:
    """Goals beside figures, then what has no goal."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("")
    for name in ("goal", "figure", "95 %", "of"):
        table.add_column(name, justify="right")
    table.add_column("met")
    for name, (words, goal, _) in GOALS.items():
        figure = figures[name]
        table.add_row(words, goal, percent(figure.value), interval(figure), str(figure.runs), _met(name, figure))
    table.add_section()
    for name, words in OTHERS.items():
        figure, middle = figures[name], figures.get(f"{name}_median")
        value = percent(figure.value) + (f" ({percent(middle.value)})" if middle is not None else "")
        table.add_row(words, "", value, interval(figure), str(figure.runs), "")
    return table


def peers(title: str, found: Mapping[str, Figures]) -> Table:
    """One row for each watch, ours first."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("")
    for name in ("recall", "false alarms", "lead, expon.", "lead, faster"):
        table.add_column(name, justify="right")
    for watch, figures in found.items():
        cells = [f"{percent(figures[name].value)} [dim]{interval(figures[name])}[/]" for name in PEER_COLUMNS]
        table.add_row(f"{watch.replace('_', ' ')} [dim]({figures['recall'].runs})[/]", *cells)
    return table


def scenarios(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """One row for each scenario: the failing ones, then the healthy loops."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("")
    table.add_column("course")
    for name in ("runs", "lost", "in time", "early", "lead", "top 1", "top 3", "cause", "forecasts"):
        table.add_column(name, justify="right")
    for row in sorted(rows, key=lambda row: row["cause"] is None):
        table.add_row(row["scenario"], *(_healthy(row) if row["cause"] is None else _failing(row)))
    return table


def _failing(row: Mapping[str, Any]) -> list[str]:
    placed, error = row["placed"], row["forecast_error"]
    return [
        row["course"].replace("exponential", "exp"),
        str(row["counted"]),
        str(row["lost"]),
        str(row["in_time"]) if row["lost"] else f"({row['detected']})",
        str(row["early"] or ""),
        percent(row["lead"]),
        f"{row['site_top1']}/{placed}" if placed else "–",
        f"{row['site_top3']}/{placed}" if placed else "–",
        f"{row['cause_right']}/{row['counted']}",
        f"{row['forecasts']}" + ("" if error is None else f" ±{error:.0%}") if row["forecasts"] else "",
    ]


def _healthy(row: Mapping[str, Any]) -> list[str]:
    alarms = f"{row['alarms']} false" if row["alarms"] else "none"
    cause = f"{row['cause_right']}/{row['counted']}"
    return ["healthy", str(row["counted"]), "", alarms, "", "", "", "", cause, str(row["forecasts"] or "")]


def mistakes(confusions: Sequence[tuple[str, str, str, int]], most: int = 30) -> Table:
    """Wrong causes, the most frequent first."""
    table = Table(title="Wrong causes", title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("scenario", "true", "said"):
        table.add_column(name)
    table.add_column("runs", justify="right")
    for scenario, true, said, count in confusions[:most]:
        table.add_row(scenario, true, said, str(count))
    return table


def console() -> Console:
    """As wide as the terminal; 100 columns where it is piped."""
    found = Console()
    return found if found.is_terminal else Console(width=100)


def wild_cases(title: str, cases: Sequence[Heard]) -> Table:
    """One line a case: the truth, what was said, and whether that is right, with a canary and without."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("", "true", "said", "verdict, landed", "answer", "no canary"):
        table.add_column(name, overflow="fold")
    bare = {each.case: each.answer for each in cases if not each.canary}
    for each in cases:
        if each.canary:
            said = "–" if each.confidence == "none" else f"{each.cause} ({each.confidence})"
            needs = " *" if each.needs_operation else ""
            true = (each.true or "healthy") + (f", edit {each.edit}" if each.edit is not None else "") + needs
            table.add_row(
                each.case, true, said, f"{each.verdict}, {each.landed}", each.answer, bare.get(each.case, "–")
            )
    table.caption = "* only the operation itself tells: vague is the best that is expected without a tracer"
    table.caption_justify = "left"
    return table
