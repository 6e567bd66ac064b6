"""Many rows at once: those at which the facts of any model have nothing to say.

These are the rules of `facts` that look at every row, and whose claims are one reading against a limit, or against what
was read there before. Where none of them can speak a row is calm, and need not be shown to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from stabilitylab.analysis.columns import First, Flat, Places, Schema
from stabilitylab.analysis.limits import LimitFacts
from stabilitylab.analysis.lookup import Lookup
from stabilitylab.analysis.nonfinite import NonfiniteContext

LEAP: Final = 100.0
SHRUNK: Final = 0.1
HEADROOM_BITS: Final = 2.0
"""Where these come from: see `facts`."""
LARGEST: Final = "weight.max_abs"


def calm(
    rows: Sequence[Flat],
    lookup: Lookup,
    first_headroom: First,
    first_norm: First,
    limits: LimitFacts,
    context: NonfiniteContext,
) -> list[bool]:
    """Of rows that come next, one after the other, whether each is calm. The first is never called so.

    first_headroom, first_norm: what was read first at each place.
    """
    quiet = np.zeros(len(rows), dtype=bool)
    alike: dict[Schema, list[int]] = {}
    for number, row in enumerate(rows):
        alike.setdefault(row.schema, []).append(number)
    largest = np.full((len(rows), max(int(schema.places.max(initial=-1)) for schema in alike) + 1), np.nan)
    for schema, numbers in alike.items():
        values, finite = np.stack([rows[n].values for n in numbers]), np.stack([rows[n].finite for n in numbers])

        def at(what: str, schema: Schema = schema) -> Places:
            return lookup.positions(schema, what)

        loud = (values[:, at("*.nonfinite")] != 0).any(axis=1) | ~finite[:, at("value")].all(axis=1)
        loud |= (values[:, at("gradient.nonfinite_steps")] > 0).any(axis=1)
        loud |= (values[:, at("*.dead")] == 1).any(axis=1)
        room, norm, size = at("*.headroom_bits"), at("weight.norm"), at(LARGEST)
        loud |= (~(values[:, room] >= HEADROOM_BITS)).any(axis=1)
        loud |= (finite[:, room] & np.isnan(first_headroom.values(schema.places[room]))).any(axis=1)
        loud |= (~(values[:, norm] >= SHRUNK * first_norm.values(schema.places[norm]))).any(axis=1)
        loud |= limits.may_reach(schema, values)
        largest[np.ix_(np.array(numbers), schema.places[size])] = values[:, size]
        quiet[numbers] = ~loud & ~context.is_new(schema)
    quiet[:1] = False
    quiet[1:] &= ~_leaps(largest)
    found: list[bool] = quiet.tolist()
    return found


def _leaps(largest: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether some entry is many times that of the row before, by row but the first. NaN: not read."""
    before, after = largest[:-1], largest[1:]
    return np.asarray(((before > 0) & (LEAP * before <= after)).any(axis=1))
