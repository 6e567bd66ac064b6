"""The failure zoo: real edit loops on small real models, each with one known mechanism, and loops that are healthy.

::

    outcome = run(by_name("mend-feedback-fp16"), seed=0, folder=Path("runs/zoo"))
    outcome.truth.cause, outcome.truth.first_bad_edit, outcome.truth.site
"""

from __future__ import annotations

from benchmarks.zoo import (
    algebra,
    dtypes,
    feedback,
    healthy,
    held_out_faults,
    held_out_healthy,
    held_out_unknown,
    held_out_updates,
    inputs,
    normaliser,
    provenance,
    unknown,
)
from benchmarks.zoo.scenario import Outcome, Scenario, State, Truth, run
from benchmarks.zoo.words import HELD_OUT_SEEDS
from stabilitylab.errors import UsageError, did_you_mean

__all__ = ["HEALTHY", "HELD_OUT_SEEDS", "SCENARIOS", "Outcome", "Scenario", "State", "Truth", "by_name", "run"]

SCENARIOS: tuple[Scenario, ...] = (
    *provenance.SCENARIOS,
    *inputs.SCENARIOS,
    *normaliser.SCENARIOS,
    *algebra.SCENARIOS,
    *dtypes.SCENARIOS,
    *feedback.SCENARIOS,
    *held_out_updates.SCENARIOS,
    *held_out_faults.SCENARIOS,
    *unknown.SCENARIOS,
    *held_out_unknown.SCENARIOS,
)
"""Every failure, by family; the mechanisms that no rule is to know come last."""

HEALTHY: tuple[Scenario, ...] = (*healthy.HEALTHY, *held_out_healthy.HEALTHY)
"""Every loop with nothing wrong."""


def by_name(name: str) -> Scenario:
    """The scenario of that name, failing or healthy.

    Raises:
        UsageError: there is none.
    """
    found = {scenario.name: scenario for scenario in (*SCENARIOS, *HEALTHY)}
    if name not in found:
        raise UsageError(f"no scenario {name!r}{did_you_mean(name, found)}")
    return found[name]
