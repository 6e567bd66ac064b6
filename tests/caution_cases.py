"""Figures of scans that are warned of, each at its limit and in its words, and the least change at which it is silent.

The limits are those that the modules' headers give reasons for; here they are written out once more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest

from stabilitylab.analysis.caution import Caution
from stabilitylab.analysis.cautions import cautions
from stabilitylab.record.scanned import (
    ActivationScan,
    CapacityScan,
    MomentScan,
    PrecisionScan,
    RatesScan,
    Scan,
    Some,
    StatisticsScan,
    TensorScan,
)

NAME = "model.layers.1.fc2.weight"
FINE = TensorScan(NAME, "model.layers.1.fc2", (4, 8), "float32", 2.0, -0.5, 0.4)
VECTOR = replace(FINE, name="model.layers.1.fc2.bias", shape=(4,))
OUTPUT = ActivationScan("fc1", "output", "float32", 3.4e38, 5.0, 0.5, unit=7, position=2)
INPUT = replace(OUTPUT, layer="norm", what="input", limit=1.8e19)
STATISTICS = StatisticsScan("MEND", "mlp.0", "u", 256, 100.0, 1e-7, 0.5, layers=("fc1", "fc2"))
RATES = RatesScan("MEND", "edit_lrs", (1e-4, 2e-4))
MOMENTS = MomentScan("moments", "C", 256, "float32", 1_000.0, 256, 1e3, 0.1, 100.0, layer="fc2")
PROJECTION = MomentScan("projection", "P", 100, "float32", rank=50, idempotence=1e-6)
CACHE = MomentScan("cache", "cache_c", 8, "float32", zero_rows=Some(8))
PRECISION = PrecisionScan("bfloat16", 1_000, 0, 0, 100.0, None, 100, 10, 0.1, 1.0)


def scan_of(*held: object) -> Scan:
    kinds = {
        TensorScan: "tensors",
        ActivationScan: "activations",
        StatisticsScan: "statistics",
        RatesScan: "rates",
        MomentScan: "moments",
        PrecisionScan: "precisions",
        CapacityScan: "capacities",
    }
    found: dict[str, tuple[object, ...]] = {}
    for each in held:
        found[kinds[type(each)]] = (*found.get(kinds[type(each)], ()), each)
    return Scan("m", "live", **found)  # type: ignore[arg-type]


def of_rule(rule: str, *held: object) -> list[Caution]:
    return [each for each in cautions(scan_of(*held)) if each.rule == rule]


@dataclass(frozen=True)
class Case:
    """held: of which it is warned once, there, so urgently, in these words. also, silent: what else is, and is not."""

    rule: str
    urgency: str
    held: tuple[object, ...]
    words: str
    place: str = NAME
    also: list[tuple[object, ...]] = field(default_factory=list)
    silent: list[tuple[object, ...]] = field(default_factory=list)


def tensor(**more: object) -> tuple[TensorScan]:
    return (replace(FINE, **more),)  # type: ignore[arg-type]


def output(**more: object) -> tuple[ActivationScan]:
    return (replace(OUTPUT, **more),)  # type: ignore[arg-type]


def statistics(**more: object) -> tuple[StatisticsScan]:
    return (replace(STATISTICS, **more),)  # type: ignore[arg-type]


def moments(**more: object) -> tuple[MomentScan]:
    return (replace(MOMENTS, **more),)  # type: ignore[arg-type]


def projection(**more: object) -> tuple[MomentScan]:
    return (replace(PROJECTION, **more),)  # type: ignore[arg-type]


def precision(**more: object) -> tuple[PrecisionScan]:
    return (replace(PRECISION, **more),)  # type: ignore[arg-type]


def layers(*norms: float, **more: object) -> tuple[TensorScan, ...]:
    """The same matrix in so many layers."""
    return tuple(
        replace(FINE, name=f"model.layers.{number}.fc2.weight", norm=norm, **more)  # type: ignore[arg-type]
        for number, norm in enumerate(norms)
    )


PLACE = "fc1, fc2"
ONE, TWO = Some(1, (17,), (0.001,)), Some(2, (17, 80), (0.001, 0.002))


def every(cases: Sequence[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=[f"{number}-{case.rule}" for number, case in enumerate(cases)])


def check_words(case: Case) -> None:
    """It is warned of once, in these words."""
    (found,) = of_rule(case.rule, *case.held)
    assert (found.urgency, found.place) == (case.urgency, case.place)
    assert case.words in found.says
    assert found.advice
    assert str(found) == found.says


def check_limits(case: Case) -> None:
    """It is warned of at the limit and not short of it."""
    for held in case.also:
        assert [each.urgency for each in of_rule(case.rule, *held)] == [case.urgency], held
    for held in case.silent:
        assert [each for each in of_rule(case.rule, *held) if each.urgency == case.urgency] == [], held
