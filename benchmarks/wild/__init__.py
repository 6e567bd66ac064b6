"""Small edit loops that re-create what public bug reports told of, and healthy ones that look alarming.

::

    run, truth = run(by_name("left-padded-row"), Path("runs/wild"))
    truth.causes, truth.edit, truth.sites
"""

from __future__ import annotations

from benchmarks.wild import algebra, growth, healthy, lost, overflow
from benchmarks.wild.case import Case, Edit, Truth, WildLoop, run
from stabilitylab.errors import UsageError, did_you_mean

__all__ = ["CASES", "HEALTHY", "Case", "Edit", "Truth", "WildLoop", "by_name", "run"]

CASES: tuple[Case, ...] = (*lost.CASES, *overflow.CASES, *algebra.CASES, *growth.CASES)
"""Every loop in which something is wrong, by family, and the control."""

HEALTHY: tuple[Case, ...] = healthy.CASES
"""Every loop with nothing wrong."""


def by_name(name: str) -> Case:
    """The case of that name.

    Raises:
        UsageError: there is none.
    """
    found = {case.name: case for case in (*CASES, *HEALTHY)}
    if name not in found:
        raise UsageError(f"no case {name!r}{did_you_mean(name, found)}")
    return found[name]
