"""The tables of docs/zoo.md, from the scenarios themselves."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.zoo import HEALTHY, SCENARIOS
from benchmarks.zoo.scenario import Scenario

MARK = "<!-- From here on made by benchmarks.zoo.page; don't edit. -->\n"


def tables() -> str:
    """Markdown: the failing loops and the healthy ones, each with those that are held out apart."""
    seen, held_out = ([each for each in SCENARIOS if each.held_out is wanted] for wanted in (False, True))
    well, well_held_out = ([each for each in HEALTHY if each.held_out is wanted] for wanted in (False, True))
    return "\n".join(
        [
            "## Failing loops",
            "",
            *_failing(seen),
            "",
            'Mechanisms 1 to 20 are those that the project saw in the wild, 21 to 23 ways of growth. "No rule": no rule'
            ' of the analyzer is to know it, and "unknown" is the right answer.',
            "",
            "### Held out",
            "",
            "Other editors, models and parameters within the same mechanisms, and mechanisms of their own. No rule and"
            " no limit was set with these: `python -m benchmarks.detection` measures on them.",
            "",
            *_failing(held_out),
            "",
            "## Healthy loops",
            "",
            "Of 120 edits; any alarm of `diverging` or worse is a false one.",
            "",
            *_healthy(well),
            "",
            "### Held out",
            "",
            *_healthy(well_held_out),
            "",
        ]
    )


def _failing(scenarios: Sequence[Scenario]) -> list[str]:
    rows = [
        (
            f"`{each.name}`",
            "–" if each.mechanism is None else str(each.mechanism),
            each.summary,
            each.editor,
            each.model,
            f"`{each.cause}`" if each.known else f"`{each.cause}` (no rule)",
            each.course,
        )
        for each in scenarios
    ]
    return _table(("scenario", "mechanism", "what happens", "editor", "model", "cause", "course"), rows)


def _healthy(loops: Sequence[Scenario]) -> list[str]:
    rows = [(f"`{each.name}`", each.editor, each.model, each.summary) for each in loops]
    return _table(("loop", "editor", "model", "what happens"), rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]
