"""The documentation's page of causes, as far as it is made from the rules themselves."""

from __future__ import annotations

from stabilitylab.analysis.causes.precedence import RULES
from stabilitylab.analysis.causes.rule import Rule

MARK = "<!-- From here on made by stabilitylab.reports.causes_page; don't edit. -->\n"


def _section(rule: Rule) -> str:
    return (
        f"### `{rule.name}`\n\n"
        f"*{rule.group[0].upper()}{rule.group[1:]}.* {rule.mechanism}\n\n"
        f"- **What is seen:** {rule.seen}\n"
        f"- **Example:** {rule.example}\n"
        f"- **What to do:** {rule.fix}\n"
    )


def causes_part() -> str:
    """One section per rule, in order of precedence, after the mark."""
    return MARK + "\n" + "\n".join(_section(rule) for rule in RULES)
