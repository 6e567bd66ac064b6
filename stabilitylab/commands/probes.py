"""``stabilitylab probes``."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console

from stabilitylab.commands.options import Tier


def probes(
    tier: Annotated[Tier, typer.Option(help="The tier to list; each holds the cheaper ones.")] = Tier.deep,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the page that docs/metrics.md holds.")] = False,
    as_object: Annotated[bool, typer.Option("--json", help="Print a JSON list with an object per metric.")] = False,
) -> None:
    """List what is measured: each metric with its unit, meaning, formula and source."""
    from stabilitylab.probes.registry import probes_of
    from stabilitylab.reports.catalogue import catalogue_page, catalogue_table

    held = [(probe.tier, metric) for probe in probes_of(tier.value) for metric in probe.metrics]
    if as_object:
        listed = [{"tier": tier, **asdict(metric)} for tier, metric in held]
        typer.echo(json.dumps(listed, indent=2, allow_nan=False))
    elif markdown:
        typer.echo(catalogue_page(held), nl=False)
    else:
        Console().print(catalogue_table(held))
