"""Makes run files with plausible readings for every metric, without a model: `make_run(folder, ...)`.

A dying run follows the case that this project started with: an editor whose frozen normaliser has units of zero spread,
whose inputs and updates grow from edit to edit, until fp16 weights overflow at one layer and NaN spreads from there.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from stabilitylab.analysis import Analyzer, severity
from stabilitylab.probes import catalogue
from stabilitylab.record.readings import Alarm, Array, EditRow, Key, Note
from stabilitylab.record.store import RunWriter

FP16_MAX = 65_504.0
VOCABULARY = 1_000
TOKENS = 32
UNIT = 117.0
GROWING = 12
"""Edits over which a dying run grows."""

HOSTILE = (
    "<script>document.title='owned'</script>",
    "</style><style>body{display:none}</style>",
    "{{7*7}} {% raw %} ${7*7} #{7*7}",
    "\"' onmouseover='alert(1)' x=\"",
    "<img src=x onerror=alert(1)>",
    "abc\u202edcba\u2066\u200f bidi",
    "nul\x00 bell\x07 escape\x1b[31mred\x1b]0;title\x07 \x9b31m",
    "[bold red]markup[/bold red] [/] [link=https://example.org]x[/link]",
    "$\\frac{1}{0}$ $unclosed",
    "![x](https://example.org/x.png) [y](javascript:alert(1))",
    "line\r\nbreak\ttab\u2028separator",
    "lone \ud800 surrogate",
    "mega" * 250_000,
)
"""Labels and names that must stay text wherever they are shown."""


def site_names(sites: int, hostile: bool = False) -> tuple[str, ...]:
    """Names of `sites` layers in dataflow order; hostile: such as no model has, but a file can hold."""
    if hostile:
        return tuple(f"layers.{place}.{HOSTILE[place % len(HOSTILE)]}" for place in range(sites))
    prefix = "language_model.model.decoder.layers"
    return tuple(f"{prefix}.{1 + place // 2}.fc{1 + place % 2}" for place in range(sites))


def _spectrum(norm: float) -> Array:
    """32 falling singular values whose root sum of squares is `norm`."""
    values = np.exp(-0.25 * np.arange(32))
    return np.asarray(values * (norm / float(np.linalg.norm(values))), dtype=np.float64)


def _layer(rng: np.random.Generator, edit: int, site: str, *, rise: float, bad: bool, drift: Array) -> dict[Key, Array]:
    """Readings of one layer. rise: log growth so far. bad: whether all is NaN. drift: what it has moved, [1]."""
    wobble = float(np.exp(0.2 * rng.standard_normal()))
    readings: dict[str, float | Array] = {}
    update = 0.0 if edit == 0 else 0.4 * wobble * math.exp(rise)
    drift[0] = math.hypot(float(drift[0]), update)
    largest = 0.3 + 0.02 * float(drift[0])
    if edit > 0:
        gradient = math.nan if bad else 0.05 * wobble * math.exp(0.7 * rise)
        rms = math.nan if bad else 1.4 * wobble**0.2 * math.exp(0.3 * max(0.0, rise - 1.0))
        readings |= {
            "activation.rms": rms,
            "activation.max_abs": 9.0 * rms,
            "activation.rms_beyond_first": 0.8 * rms,
            "activation.max_abs_beyond_first": 5.0 * rms,
            "activation.headroom_bits": -math.inf if bad else math.log2(FP16_MAX / (9.0 * rms)),
            "activation.nonfinite": 256.0 if bad else 0.0,
            "gradient.spectrum": np.full(32, np.nan) if bad else _spectrum(gradient),
            "gradient.norm": gradient,
            "gradient.stable_rank": math.nan if bad else 1.0 / (1.0 - math.exp(-0.5)),
            "gradient.nonfinite": 64.0 if bad else 0.0,
        }
    readings |= {
        "update.norm": math.nan if bad else update,
        "drift.norm": math.nan if bad else float(drift[0]),
        "drift.ratio": math.nan if bad else float(drift[0]) / 40.0,
        "weight.max_abs": math.nan if bad else largest,
        "weight.nonfinite": 98_304.0 if bad else 0.0,
        "weight.headroom_bits": -math.inf if bad else math.log2(FP16_MAX / largest),
    }
    if edit > 1 and not bad:
        readings["feedback.gain"] = 0.02 * float(rng.standard_normal()) + (0.6 if rise else 0.0)
    return {(name, site): np.atleast_1d(np.asarray(value, dtype=np.float64)) for name, value in readings.items()}


def _overflowed(readings: dict[Key, Array], site: str) -> None:
    """What the first bad edit leaves at the layer where it happens: 300 weights beyond fp16."""
    for name, value in {
        "update.norm": math.inf,
        "drift.norm": math.inf,
        "drift.ratio": math.inf,
        "weight.max_abs": math.inf,
        "weight.nonfinite": 300.0,
        "weight.headroom_bits": -math.inf,
    }.items():
        readings[name, site] = np.array([value])


def _range(rng: np.random.Generator, family: str, shrink: float, bad: bool) -> dict[Key, Array]:
    half = 12.0 * math.exp(-shrink) * float(np.exp(0.05 * rng.standard_normal()))
    values = {
        "min": -0.7 * half,
        "max": half,
        "logsumexp": half + 0.3,
        "entropy": min(math.log(VOCABULARY), 0.4 + 2.0 * shrink),
        "margin": 0.35 * half,
        "dead": 0.0,
    }
    readings = {name: math.nan if bad and name != "dead" else value for name, value in values.items()}
    readings["nonfinite"] = float(VOCABULARY * TOKENS) if bad else 0.0
    return {(f"{family}.{name}", "model"): np.array([value]) for name, value in readings.items()}


def _editor(rng: np.random.Generator, edit: int, rise: float, bad: bool, died: bool) -> dict[Key, Array]:
    """rise: log growth so far. bad: whether its inputs are NaN. died: whether the unit without spread has fired."""
    readings: dict[Key, Array] = {("editor.learning_rate", "editor"): np.array([1.1e-4, 0.9e-4, 1.3e-4, 0.8e-4])}
    for place, site in enumerate(("editor.256x64.u", "editor.256x64.v", "editor.64x256.u", "editor.64x256.v")):
        layer_input = site.endswith(".u")
        values = {
            "editor.std_min": 0.0 if place == 0 else 0.02 if layer_input else 3e-4,
            "editor.std_zeros": 3.0 if place == 0 else 0.0,
        }
        if edit > 0:
            fired = died and place == 0
            size = 9.0 * float(np.exp(0.25 * rng.standard_normal())) * math.exp(0.8 * rise)
            values |= {
                "editor.input_max": math.nan if bad else 3.2e5 if fired else size,
                "editor.input_unit": UNIT if fired else float(rng.integers(0, 256)),
                "editor.input_unit_std": 0.0 if fired else 0.05,
            }
        readings |= {(name, site): np.array([value]) for name, value in values.items()}
    return readings


def make_run(
    folder: Path,
    *,
    edits: int = 40,
    sites: int = 4,
    seed: int = 0,
    dies_at: int | None = 30,
    hostile_labels: bool = False,
    closed: bool = True,
) -> Path:
    """Write a run of `edits` edits (edit 0 apart) at `sites` layers into the new `folder`; returns `folder`.

    dies_at: the first edit with non-finite weights, or None for a healthy run. hostile_labels: labels, layer names,
    errors and notes are injections of all kinds. closed: whether the monitor has closed it.
    """
    rng = np.random.default_rng(seed)
    names, metrics = site_names(sites, hostile_labels), catalogue()
    writer = RunWriter(folder, _manifest(names, seed, closed, hostile_labels), metrics)
    writer.note(Note(0, "skipped-site", f"{names[0] if hostile_labels else 'lm_head'}: tied to the input embedding"))
    writer.note(Note(0, "probe-off", HOSTILE[0] if hostile_labels else "spectral norm: more tokens than 256"))
    drifts = {name: np.zeros(1) for name in names}
    culprit = names[sites // 2] if names else ""
    analyzer, raised = Analyzer(metrics), 0
    for edit in range(edits + 1):
        since = -1 if dies_at is None else edit - dies_at
        rise = 0.0 if dies_at is None else 0.35 * max(0.0, min(since, 0) + GROWING) ** 1.2 / 1.6
        failed = edit == 7
        readings = _editor(rng, edit, rise, bad=since > 1, died=since == 0)
        if edit > 0:
            readings |= _range(rng, "logits", 0.1 * rise, bad=since > 0)
        for name in names:
            readings |= _layer(rng, edit, name, rise=rise, bad=since > 0, drift=drifts[name])
        if since == 0 and names:
            _overflowed(readings, culprit)
        if not failed:
            readings |= _range(rng, "canary", 0.1 * rise, bad=since >= 0)
            readings["canary.agreement", "model"] = np.array([0.0 if since >= 0 else max(0.05, 1.0 - 0.08 * rise)])
            readings["canary.kl", "model"] = np.array([math.nan if since >= 0 else 1e-4 * (edit + math.expm1(rise))])
        label = HOSTILE[edit % len(HOSTILE)] if hostile_labels else f"What digit is on picture {edit}?" if edit else ""
        error = (HOSTILE[0] if hostile_labels else "RuntimeError: no answer token") if failed else None
        row = EditRow(
            edit=edit,
            label=label,
            status="failed" if failed else "applied" if edit else "start",
            started=1.7e9 + edit,
            seconds=1.0,
            probe_seconds=0.021,
            canary_seconds=0.06,
            readings=readings,
            error=error,
        )
        writer.append(row)
        analyzer.observe(row)
        diagnosis = analyzer.diagnosis()
        if severity(diagnosis.verdict) > raised:
            raised, worst = severity(diagnosis.verdict), diagnosis.findings[-1]
            writer.alarm(Alarm(edit, diagnosis.verdict, worst.metric, worst.site, worst.says))
        if 0 < edit < edits and not failed:
            writer.outcome(edit, "restored" if edit == 3 else "committed")
    writer.close()
    return folder


def _manifest(names: tuple[str, ...], seed: int, closed: bool, hostile: bool) -> dict[str, object]:
    return {
        "created": "2026-11-24T01:50:09+00:00",
        "closed": closed,
        "model_class": HOSTILE[1] if hostile else "transformers.models.blip_2.Blip2ForConditionalGeneration",
        "parameters": 260_000,
        "dtypes": {"float32": 120, "float16": 64},
        "sites": list(names),
        "site_details": {name: {"shape": [256, 64], "dtype": "float16", "kind": "Linear"} for name in names},
        "patterns": ["language_model.*.fc[12]"],
        "editor_class": "stabilitylab.editors.mend.Mend",
        "canary": "fixed batch of 8 rows",
        "config": {"precision": "fp16", "note": HOSTILE[3] if hostile else "demo"},
        "seed": seed,
        "versions": {"stabilitylab": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
        "python": "3.11.2",
        "platform": "Linux-6.1-x86_64",
        "command": ["stabilitylab", "demo", HOSTILE[4] if hostile else "--out=runs/demo"],
        "cwd": "/home/user/project",
        "git": {"commit": "0faf958c8ce4", "dirty": True},
    }
