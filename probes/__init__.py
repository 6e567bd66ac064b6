"""Probes: one kind of quantity each, in small classes. `stabilitylab.probes.registry` says how to add one."""

from stabilitylab.probes.registry import *  # noqa: F403  (the registry's __all__: a new probe is listed there alone)
