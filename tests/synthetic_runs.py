"""Seeded synthetic runs, healthy and failing, to measure how often the drift rules cry wolf and how early they speak.

`python tests/synthetic_runs.py --runs 500` prints the table.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from stabilitylab.analysis import Analyzer, Diagnosis, severity
from stabilitylab.record.readings import Array, EditRow, Key, Metric

LAYERS = tuple(f"decoder.layers.{layer}.{name}" for layer in (1, 2) for name in ("fc1", "fc2"))
EDITOR_SITES = ("editor.a.u", "editor.a.v", "editor.b.u", "editor.b.v")

SCALES: dict[str, tuple[str, str]] = {
    "activation.rms": ("log", "during"),
    "activation.max_abs": ("log", "during"),
    "activation.headroom_bits": ("linear", "during"),
    "activation.nonfinite": ("count", "during"),
    "logits.min": ("linear", "during"),
    "logits.max": ("linear", "during"),
    "logits.dead": ("flag", "during"),
    "gradient.norm": ("log", "during"),
    "gradient.nonfinite": ("count", "during"),
    "editor.std_zeros": ("count", "before"),
    "editor.std_min": ("log", "before"),
    "editor.zero_units": ("linear", "before"),
    "editor.seen_rows": ("count", "before"),
    "editor.no_spread": ("flag", "before"),
    "editor.input_max": ("log", "during"),
    "editor.input_unit": ("linear", "during"),
    "editor.input_unit_std": ("log", "during"),
    "update.norm": ("log", "after"),
    "drift.norm": ("log", "after"),
    "weight.max_abs": ("log", "after"),
    "weight.nonfinite": ("count", "after"),
    "weight.headroom_bits": ("linear", "after"),
    "canary.min": ("linear", "after"),
    "canary.max": ("linear", "after"),
    "canary.dead": ("flag", "after"),
    "canary.agreement": ("linear", "after"),
    "canary.kl": ("log", "after"),
    "feedback.gain": ("linear", "after"),
}


def metric(name: str) -> Metric:
    scale, phase = SCALES[name]
    described: Any = {"name": name, "scale": scale, "phase": phase}
    return Metric(unit="", meaning="", formula="", source="", **described)


METRICS = tuple(metric(name) for name in SCALES)


def row(edit: int, readings: dict[Key, float], status: str | None = None) -> EditRow:
    known: Any = status or ("applied" if edit else "start")
    arrays = {key: np.atleast_1d(np.asarray(value, dtype=np.float64)) for key, value in readings.items()}
    return EditRow(edit, f"edit {edit}", known, 0.0, 1.0, 0.01, 0.0, readings=arrays)


def diagnose(rows: Iterable[EditRow], metrics: Sequence[Metric] = METRICS) -> Diagnosis:
    analyzer = Analyzer(metrics)
    for each in rows:
        analyzer.observe(each)
    return analyzer.diagnosis()


@dataclass(frozen=True)
class Synthetic:
    """rows: edit 0 first. onset, end: where growth begins, and the first non-finite edit; None for a healthy run."""

    rows: list[EditRow]
    onset: int | None = None
    end: int | None = None


def _noise(rng: np.random.Generator, edits: int, spread: float) -> Array:
    """Log noise of one series: normal or heavy-tailed, with or without memory from edit to edit."""
    noise = rng.standard_t(3, edits) / math.sqrt(3.0) if rng.random() < 0.3 else rng.standard_normal(edits)
    memory = rng.choice([0.0, 0.0, 0.5])
    for edit in range(1, edits):
        noise[edit] = memory * noise[edit - 1] + math.sqrt(1 - memory**2) * noise[edit]
    return spread * noise


def _series(rng: np.random.Generator, edits: int, rise: Array, drifts: bool = True) -> dict[Key, Array]:
    """Positive series over edits 1..edits.

    rise: what a failing run adds to the log of what feeds back, [edits]. drifts: whether activations and weights may
    drift as √t or t, harmlessly, up to tenfold.
    """
    time = np.arange(1, edits + 1, dtype=np.float64)
    difficulty = _noise(rng, edits, rng.uniform(0.0, 0.5))
    spikes = np.where(rng.random(edits) < rng.choice([0.0, 0.01, 0.03]), rng.uniform(1.0, 5.0, edits), 0.0)
    trend = rng.choice(["flat", "root", "linear"]) if drifts else "flat"
    gentle = {"flat": 0.0 * time, "root": np.sqrt(time), "linear": time}[str(trend)]
    weakly = np.log1p(rng.uniform(0.0, 0.03) * gentle)
    series: dict[Key, Array] = {}
    update = np.zeros(edits)
    for site in LAYERS:
        local = difficulty + spikes
        norm = np.exp(rng.normal() + local + _noise(rng, edits, rng.uniform(0.05, 0.6)) + rise)
        update += norm**2
        series["update.norm", site] = norm
        series["drift.norm", site] = np.sqrt(np.cumsum(norm**2)) if trend == "root" else np.cumsum(norm)
        grown = np.cumsum(norm) / np.maximum(norm[0], 1e-9)
        series["weight.max_abs", site] = 0.3 * np.exp(weakly) + (0.001 * grown if rise.any() else 0.0)
        for name, spread in (("rms", 0.15), ("max_abs", 0.25)):
            series[f"activation.{name}", site] = 3.0 * np.exp(
                _noise(rng, edits, rng.uniform(0.01, spread)) + 0.3 * spikes + weakly + np.maximum(rise - 3.0, 0.0)
            )
        series["gradient.norm", site] = np.exp(
            rng.normal() + 2.0 * local + _noise(rng, edits, rng.uniform(0.2, 1.2)) + 0.7 * rise
        )
    for site in EDITOR_SITES:
        series["editor.input_max", site] = np.minimum(
            8.0 * np.exp(np.minimum(spikes, 1.0) + _noise(rng, edits, rng.uniform(0.05, 0.5)) + 0.8 * rise),
            np.where(rise > 0, np.inf, 99.0),
        )
    for kind in ("logits", "canary"):
        half = 6.0 * np.exp(_noise(rng, edits, rng.uniform(0.01, 0.2)) + 0.2 * weakly)
        series[f"{kind}.min", "model"], series[f"{kind}.max", "model"] = -half, half
    series["canary.agreement", "model"] = np.maximum(0.7, 1.0 - rng.uniform(0.0, 0.005) * time)
    series["canary.kl", "model"] = np.minimum(0.8, 1e-4 * np.sqrt(time) * np.exp(_noise(rng, edits, 0.5)))
    return series


def _rows(rng: np.random.Generator, series: dict[Key, Array], edits: int) -> list[EditRow]:
    """Rows with some series late or with gaps, and now and then a failed edit with few readings."""
    begins = {key: int(rng.integers(1, edits)) if rng.random() < 0.1 else 1 for key in series}
    rows = [row(0, {("weight.max_abs", site): 0.3 for site in LAYERS})]
    for edit in range(1, edits + 1):
        failed = rng.random() < 0.01
        readings = {
            key: float(values[edit - 1])
            for key, values in series.items()
            if edit >= begins[key] and (rng.random() < 0.2 if failed else rng.random() > 0.01)
        }
        rows.append(row(edit, readings, "failed" if failed else None))
    return rows


def healthy(seed: int, drifts: bool = True) -> Synthetic:
    rng = np.random.default_rng([1, seed])
    edits = int(rng.integers(10, 300))
    return Synthetic(_rows(rng, _series(rng, edits, np.zeros(edits), drifts), edits))


def growing(seed: int, how: str) -> Synthetic:
    """how: ``exponential`` or ``super-exponential`` growth of what feeds back, until it no longer fits float16."""
    rng = np.random.default_rng([2, seed])
    onset = int(rng.integers(1, 100))
    total = math.log(65_504.0) + rng.uniform(0.0, 4.0)
    length = int(rng.integers(8, 60)) if how == "super-exponential" else max(6, int(total / rng.uniform(0.05, 0.8)))
    edits = onset + length
    share = np.clip((np.arange(1, edits + 1) - onset) / length, 0.0, 1.0)
    rise = total * (share if how == "exponential" else np.expm1(3.0 * share) / math.expm1(3.0))
    rows = _rows(rng, _series(rng, edits, rise), edits)
    bad = dict(rows[-1].readings) | {("weight.nonfinite", LAYERS[1]): np.array([300.0])}
    return Synthetic([*rows[:-1], replace(rows[-1], readings=bad, status="applied")], onset, edits)


def false_alarms(seeds: Iterable[int], verdict: str = "diverging", drifts: bool = True) -> list[tuple[int, Diagnosis]]:
    """Healthy runs that were given `verdict` or worse, with their seeds."""
    said = [(seed, diagnose(healthy(seed, drifts).rows)) for seed in seeds]
    return [(seed, diagnosis) for seed, diagnosis in said if severity(diagnosis.verdict) >= severity(verdict)]


@dataclass(frozen=True)
class Lead:
    """recall: share of runs alarmed before the end. ahead: median share of onset-to-end that was still ahead then.

    early: share alarmed before the onset. onset_error: median of named minus true onset, as a share of onset-to-end.
    """

    recall: float
    ahead: float
    early: float
    onset_error: float


def lead(seeds: Iterable[int], how: str) -> Lead:
    ahead, early, onset_error = [], [], []
    for seed in seeds:
        run = growing(seed, how)
        diagnosis = diagnose(run.rows)
        assert run.onset is not None
        assert run.end is not None
        assert diagnosis.alarm_edit is not None
        ahead.append((run.end - max(diagnosis.alarm_edit, run.onset)) / (run.end - run.onset))
        early.append(diagnosis.alarm_edit < run.onset)
        assert diagnosis.onset_edit is not None
        onset_error.append((diagnosis.onset_edit - run.onset) / (run.end - run.onset))
    recall = float(np.mean(np.array(ahead) > 0))
    return Lead(recall, float(np.median(ahead)), float(np.mean(early)), float(np.median(onset_error)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=300)
    parser.add_argument("--first", type=int, default=0, help="the first seed; thresholds were looked at with 0 to 299")
    arguments = parser.parse_args()
    runs, seeds = arguments.runs, range(arguments.first, arguments.first + arguments.runs)
    for verdict, drifts in (("drifting", True), ("drifting", False), ("diverging", True), ("diverging", False)):
        alarms = false_alarms(seeds, verdict, drifts)
        kind = "healthy, some with harmless drift" if drifts else "healthy, stationary"
        print(f"{kind}: {len(alarms)} of {runs} called {verdict} or worse ({len(alarms) / runs:.1%})")
        for seed, diagnosis in alarms[:8]:
            print("   ", seed, diagnosis.edits, diagnosis.alarm_edit, diagnosis.says)
    for how in ("exponential", "super-exponential"):
        print(how, lead(seeds, how))
