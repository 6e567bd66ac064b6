"""Rows that are looked at many at once say what they say one by one: the second implementation is the online pass."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from stabilitylab.analysis import Analyzer
from stabilitylab.analysis.drift import DriftBank
from stabilitylab.probes import catalogue
from stabilitylab.record.packed import Frames
from stabilitylab.record.readings import Array, EditRow, Key
from stabilitylab.record.run import fed

SITES = ("a", "b", "c")
SEEDS = range(14)
EVENTS = (
    *("grows", "jump", "zero", "rounded", "inf", "restored", "leap", "shrinks", "nan", "narrow"),
    *("fades", "flares", "passing", "leaves", "dead", "failed", "gone"),
)


class _Loop:
    """Made-up edits: quiet ones, and among them whatever a rule may speak about, for one edit or from then on."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.scale: dict[Key, float] = {}
        self.noise = float(self.random.choice([0.02, 0.2, 0.6]))
        self.drift = dict.fromkeys(SITES, 0.0)
        self.growing: dict[str, float] = {}
        self.kl = 1e-4
        self.rated_from = int(self.random.choice([1, 60, 10_000]))

    def wobble(self) -> float:
        return float(np.exp(self.noise * self.random.standard_normal()))

    def layer(self, edit: int, site: str, event: str) -> dict[str, float]:
        grown = self.growing.setdefault(site, 1.0)
        if event == "grows":
            self.growing[site] *= 1.5
        update = {"jump": 3e4, "zero": 0.0, "rounded": 1e-9, "inf": np.inf}.get(event, 0.3 * grown * self.wobble())
        update = 0.0 if edit == 0 else update
        self.drift[site] = update if event == "restored" else float(np.hypot(self.drift[site], min(update, 1e6)))
        largest = 0.0 if site == "c" and edit < 2 else 0.3 * grown * self.wobble()
        largest, update = (80.0 * grown, 80.0 * grown) if event == "leap" else (largest, update)
        norm = (0.5 if event == "shrinks" else 9.0) * self.wobble()
        bad = event == "nan"
        rate = 1e-3 * min(edit, 90) if edit % 11 else 0.0
        rated = {"gradient.learning_rate": rate} if edit >= self.rated_from and event != "gone" else {}
        return rated | {
            "update.norm": np.nan if bad else update,
            "update.ratio": np.nan if bad else update / norm,
            "drift.norm": np.nan if bad else self.drift[site],
            "drift.ratio": np.nan if bad else self.drift[site] / 9.0,
            "weight.norm": np.nan if bad else norm,
            "weight.max_abs": np.nan if bad else largest,
            "weight.nonfinite": 7.0 if bad else 0.0,
            "weight.headroom_bits": -np.inf if bad else 1.0 if event == "narrow" else np.inf if largest == 0 else 12.0,
        }

    def seldom(self, event: str) -> dict[str, float]:
        rms = (1e-3 if event == "fades" else 200.0 if event == "flares" else 1.0) * self.wobble()
        return {
            "activation.rms": rms,
            "activation.max_abs": 0.0 if event == "zero" else 7.0 * rms,
            "activation.nonfinite": 3.0 if event == "passing" else 0.0,
            "activation.headroom_bits": 9.0,
            "gradient.norm": np.nan if event == "passing" else 0.2 * self.wobble(),
        }

    def model(self, event: str) -> dict[str, float]:
        half = (0.01 if event == "fades" else 12.0) * self.wobble()
        self.kl = min(self.kl * 2.0, 30.0) if event == "leaves" else self.kl
        return {
            "canary.min": -half,
            "canary.max": half,
            "canary.dead": float(event == "dead"),
            "canary.nonfinite": 0.0,
            "canary.kl": self.kl * self.wobble(),
            "canary.agreement": float(np.exp(-self.kl)),
            "logits.loss": 2.0 * self.wobble(),
            "logits.loss_weight": -1.0 if event == "leaves" else 1.0,
        }

    def rows(self, edits: int) -> Iterator[EditRow]:
        """As a run file has them: rows with the same readings share a frame."""
        frames, lasts = Frames(), (1, 1, 4, 14)
        every = int(self.random.integers(1, 5))
        event, left = "", 0
        for edit in range(edits):
            left -= 1
            if left < 0:
                event = str(self.random.choice(EVENTS)) if edit > 3 and self.random.random() < 0.08 else ""
                left = int(self.random.choice(lasts)) if event else 0
            sites = SITES[1:] if event == "gone" else SITES
            struck = str(self.random.choice(SITES))
            readings: dict[Key, float | Array] = {}
            for site in sites:
                here = event if site == struck or event in {"restored", "grows"} else ""
                readings |= {(name, site): value for name, value in self.layer(edit, site, here).items()}
                if edit and edit % every == 0:
                    readings |= {(name, site): value for name, value in self.seldom(here).items()}
            readings |= {(name, "model"): value for name, value in self.model(event).items()}
            status = "start" if edit == 0 else "failed" if event == "failed" else "applied"
            yield EditRow(edit, "", status, 0.0, 1.0, 0.0, 0.0, readings=frames.packed(readings))  # type: ignore[arg-type]


def _said(analyzer: Analyzer, row: EditRow) -> object:
    """All that is known after a row; what costs more at some rows alone, since asking must not change anything."""
    said: list[object] = [analyzer.verdict, analyzer.alarm_edit]
    if row.edit % 7 == 3:
        said += [repr(sorted(analyzer.peaks.items())), str(analyzer.found_at(row.edit))]
    if row.edit % 31 == 0:
        said.append(analyzer.diagnosis().to_json())
    return said


def _dry(seed: int) -> list[EditRow]:
    rows = list(_Loop(100 + seed).rows(10))[1:] if seed % 3 == 0 else []
    return [row for row in rows if row.status == "applied"]


@pytest.mark.parametrize("seed", SEEDS)
def test_the_same_is_said_after_each_row(seed: int) -> None:
    rows, dry = list(_Loop(seed).rows(260)), _dry(seed)
    one_by_one, together = Analyzer(catalogue()), Analyzer(catalogue())
    one_by_one.observe(rows[0])
    together.observe(rows[0])
    for row in dry:
        one_by_one.observe_dry(row)
        together.observe_dry(row)
    random, ahead = np.random.default_rng(seed), 1
    for number, row in enumerate(rows[1:], start=1):
        if number == ahead:
            ahead += int(random.choice([1, 3, 17, 64, 200]))
            together.look_ahead(rows[number:ahead])
        one_by_one.observe(row)
        together.observe(row)
        assert _said(one_by_one, row) == _said(together, row), number
    assert one_by_one.peaks == together.peaks
    assert one_by_one.diagnosis().to_json() == together.diagnosis().to_json()


def test_the_loops_here_go_through_every_verdict_and_most_rules() -> None:
    verdicts, rules = set(), set()
    for seed in SEEDS:
        analyzer = Analyzer(catalogue())
        for row in _Loop(seed).rows(260):
            analyzer.observe(row)
        verdicts.add(analyzer.verdict)
        rules |= {finding.rule for finding in analyzer.diagnosis().findings}
    spoken = {
        "drift",
        "level",
        "growth",
        "shrink",
        "jump",
        "non-finite",
        "headroom",
        "one-entry",
        "weight-shrunk",
        "dead",
    }
    assert spoken <= rules
    assert "non-finite" in verdicts


def test_other_rows_may_come_than_were_shown() -> None:
    rows = list(_Loop(3).rows(120))
    plain, misled = Analyzer(catalogue()), Analyzer(catalogue())
    for row in rows:
        plain.observe(row)
        if row.edit % 40 == 9:
            misled.look_ahead(rows[row.edit : row.edit + 5] + rows[20:30])
        misled.observe(row)
    assert plain.peaks == misled.peaks
    assert plain.diagnosis().to_json() == misled.diagnosis().to_json()


def test_rows_of_a_quiet_run_are_not_looked_at_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    observe = DriftBank._observe

    def counted(bank: DriftBank, row: object) -> object:
        looked.append(1)
        return observe(bank, row)  # type: ignore[arg-type]

    monkeypatch.setattr(DriftBank, "_observe", counted)
    frames, random = Frames(), np.random.default_rng(0)
    rows = [
        EditRow(
            edit, "", "applied" if edit else "start", 0.0, 1.0, 0.0, 0.0,
            readings=frames.packed({("weight.max_abs", site): float(np.exp(0.1 * random.random())) for site in SITES}),
        )
        for edit in range(600)
    ]  # fmt: skip
    analyzer = Analyzer(catalogue())
    assert len(list(fed(analyzer, rows, (), ()))) == 600
    assert analyzer.verdict == "stable"
    assert len(looked) < 60
