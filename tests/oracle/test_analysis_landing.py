"""How many edits landed: the running count beside a naive one that looks at all edits at once."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from stabilitylab.analysis.columns import Columns
from stabilitylab.analysis.landing import Landing, Landings
from stabilitylab.analysis.lookup import Lookup
from stabilitylab.record.readings import EditRow
from tests.synthetic_runs import METRICS, row

A, B, M = "decoder.layers.1.fc1", "decoder.layers.1.fc2", "model"
LONG_WORDS = "LinAlgError: " + "x" * 200


def edits(seed: int) -> list[EditRow]:
    """Edits of which some raise, some move nothing, some have bad gradients and some had nothing to do."""
    rng = np.random.default_rng([5, seed])
    rows = [row(0, {("update.norm", A): 0.0, ("update.norm", B): 0.0})]
    every = int(rng.integers(1, 4))  # a loop that steps at each n-th edit
    for edit in range(1, int(rng.integers(3, 40))):
        moves = edit % every == 0 and rng.random() < 0.8
        norms = rng.choice([0.0, 1.0, 5e4, 4e5, math.inf], 2, p=[0.2, 0.4, 0.2, 0.1, 0.1])
        readings = {
            ("update.norm", A): float(moves),
            ("update.norm", B): float(moves and rng.random() < 0.5),
            ("update.writes", A): float(rng.random() < 0.3),
            ("gradient.norm", A): float(norms[0]),
            ("gradient.norm", B): float(norms[1]),
            ("gradient.nonfinite", A): float(math.isinf(norms[0])),
            ("gradient.nonfinite", B): float(math.isinf(norms[1])),
            ("gradient.nonfinite_steps", A): float(rng.random() < 0.05),
        }
        if rng.random() < 0.6:
            stepped = rng.choice([0.0, 1.0], 2, p=[0.8, 0.2])
            readings |= {
                ("gradient.norm_stepped", A): float(stepped[0]),
                ("gradient.norm_stepped", B): float(stepped[1]),
            }
        if rng.random() < 0.5:
            readings["logits.loss", M] = float(rng.choice([0.05, 0.1, 0.11, 2.0]))
        if rng.random() < 0.2:
            error = str(rng.choice(["ValueError: a", "KeyError: b", LONG_WORDS]))
            failed = row(edit, readings, "failed")
            rows.append(EditRow(edit, "", "failed", 0.0, 1.0, 0.0, 0.0, error, failed.readings))
        else:
            rows.append(row(edit, readings))
    return rows


def at(each: EditRow, *names: str) -> list[float]:
    return [float(values[0]) for (metric, _), values in each.readings.items() if metric in names]


def landed(each: EditRow) -> bool | None:
    if each.status == "failed":
        return False
    if any(update != 0 for update in at(each, "update.norm")):
        return True
    loss = at(each, "logits.loss")
    return None if loss and loss[0] <= 0.1 else False


def naive(rows: list[EditRow]) -> Landing:
    """By the words of `Landing`."""
    told = [(each, landed(each)) for each in rows if each.edit > 0]
    told = [(each, did) for each, did in told if did is not None]
    lost = [each for each, did in told if not did]
    run: list[EditRow] = []
    for each, did in told:
        run = [] if did else [*run, each]
    landings = [each.edit for each, did in told if did]
    gaps = [after - before for before, after in itertools.pairwise(landings)][-2:]
    spoilt = [
        each for each in lost if any(count > 0 for count in at(each, "gradient.nonfinite", "gradient.nonfinite_steps"))
    ]
    sound = [
        each for each in lost if each not in spoilt and any(0 < norm < math.inf for norm in at(each, "gradient.norm"))
    ]
    stepped = [(each, at(each, "gradient.norm_stepped")) for each in sound]
    words = Counter(
        (each.error if len(each.error) <= 120 else each.error[:119].rstrip() + "…") for each in lost[-10:] if each.error
    )
    return Landing(
        tried=len(told),
        landed=len(landings),
        lost=len(run),
        since=run[0].edit if run else None,
        first=lost[0].edit if lost else None,
        failed=sum(each.status == "failed" for each in lost),
        left=sum(any(update != 0 for update in at(each, "update.norm")) for each in lost),
        words=words.most_common(1)[0][0] if words else "",
        gradients_bad=len(spoilt),
        gradients=len(sound),
        written=sum(any(count > 0 for count in at(each, "update.writes")) for each in lost),
        huge=sum(math.hypot(*at(each, "gradient.norm")) > 65_504.0 for each in sound),
        clipped=sum(bool(norms) and not any(norms) for _, norms in stepped),
        gap=gaps[0] if len(gaps) == 2 and gaps[0] == gaps[1] else None,
    )


def followed(rows: list[EditRow]) -> list[Landing]:
    columns = Columns(METRICS)
    lookup = Lookup(columns)
    landings, found = Landings(lookup), []
    for each in rows:
        flat = columns.flatten(each)
        lookup.look(flat)
        landings.observe(each, flat)
        found.append(landings.now)
    return found


COUNTED = [
    "tried",
    "landed",
    "lost",
    "since",
    "first",
    "failed",
    "left",
    "gradients_bad",
    "gradients",
    "written",
    "huge",
    "clipped",
    "gap",
    "words",
    "elsewhere",
    "whole",
]


@pytest.mark.parametrize("seed", range(40))
def test_what_is_counted_is_what_a_naive_look_at_all_edits_counts(seed: int) -> None:
    rows = edits(seed)
    for number, now in enumerate(followed(rows), start=1):
        expected = naive(rows[:number])
        for name in COUNTED:
            assert getattr(now, name) == getattr(expected, name), (name, number)
