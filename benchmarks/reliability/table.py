"""The results as a table of 80 columns, and as the part of docs/reliability.md that a run makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from rich import box
from rich.markup import escape
from rich.table import Table

from benchmarks.reliability.promise import Result

WIDTH: Final = 80
MARK: Final = "<!-- From here on made by `python -m benchmarks.reliability --docs`; don't edit. -->\n"
_MET: Final = {True: "yes", False: "no", None: ""}


def table(results: Mapping[str, Sequence[Result]]) -> Table:
    """One line a test, by promise."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, width=WIDTH, title="Reliability", title_justify="left")
    made.add_column("test", ratio=5, overflow="fold")
    made.add_column("goal", ratio=3, overflow="fold")
    made.add_column("measured", ratio=3, overflow="fold")
    made.add_column("met", width=3)
    for promise, found in results.items():
        made.add_section()
        for result in found:
            colour = "red" if result.met is False else "default"
            cells = [f"{promise}: {result.test}", result.goal, result.measured, _MET[result.met]]
            made.add_row(*(escape(cell) for cell in cells), style=colour)
    return made


def breaks(results: Mapping[str, Sequence[Result]]) -> list[str]:
    """What went against a promise, a line each."""
    return [f"{promise}: {said}" for promise, found in results.items() for each in found for said in each.breaks]


def document(results: Mapping[str, Sequence[Result]], seconds: Mapping[str, float]) -> dict[str, Any]:
    """As JSON has it."""
    return {
        promise: {
            "seconds": round(seconds[promise], 1),
            "tests": [
                {
                    "test": each.test,
                    "goal": each.goal,
                    "measured": each.measured,
                    "met": each.met,
                    "tried": each.tried,
                    "breaks": list(each.breaks),
                }
                for each in found
            ],
        }
        for promise, found in results.items()
    }


def page(documents: Sequence[tuple[str, Mapping[str, Any]]], promises: Sequence[str]) -> str:
    """Markdown of one or more runs. documents: (the command that made it, what it wrote), the best last: of each
    promise the last that has it is shown.
    """
    shown = {name: (command, found) for command, found in documents for name in found["promises"]}
    lines = ["| promise | test | goal | measured | met | by |", "|---|---|---|---|---|---|"]
    for promise in promises:
        if promise not in shown:
            lines.append(f"| {promise} | | | not run | | |")
            continue
        command, found = shown[promise]
        for each in found["promises"][promise]["tests"]:
            cells = [promise, each["test"], each["goal"], each["measured"], _MET[each["met"]], f"`{command}`"]
            lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    lines.append("")
    for command, found in documents:
        machine, took = found["machine"], sum(each["seconds"] for each in found["promises"].values())
        lines.append(
            f"`{command}`: {found['when']}, {machine['cpu']}, {machine['cores']} cores (shared with other work),"
            f" Python {machine['python']}, torch {machine['torch']}, seed {found['seed']}; {took / 60:.1f} minutes."
        )
    return "\n".join(lines) + "\n"
