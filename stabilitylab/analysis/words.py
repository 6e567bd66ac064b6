"""Numbers and names as they stand in a sentence."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from stabilitylab.record.readings import MODEL_SITE


def number(value: float) -> str:
    """A value for a reader: ``300``, ``0.032``, ``3.2e5``, ``NaN``, ``infinite``."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "infinite" if value > 0 else "minus infinity"
    if value == int(value) and abs(value) < 1e5:
        return f"{int(value):,}"
    return re.sub(r"e([+-])0*(\d)", lambda match: f"e{match[1].strip('+')}{match[2]}", f"{value:.3g}")


def listed(what: str, indices: Sequence[float], count: int) -> str:
    """Some of `count` things by their index: ``unit 17``, ``units 17 and 80``, ``units 17, 80 and 3 more``."""
    names = [f"{index:.0f}" for index in indices]
    names += [f"{count - len(names)} more"] if count > len(names) else []
    together = " and ".join([*([", ".join(names[:-1])] if names[1:] else []), *names[-1:]])
    return f"{what}{'s' if count > 1 else ''} {together}"


def place_name(site: str) -> str:
    """``the model`` for what belongs to the model as a whole, else the site's name."""
    return "the model" if site == MODEL_SITE else site
