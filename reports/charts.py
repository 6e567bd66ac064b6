"""Charts of a run for a notebook, made with Altair: the same as `stabilitylab.reports.figures` draws with matplotlib.

On every chart: onset dashed, alarm dotted, first bad edit solid. A value that is NaN or infinite stands as a marker in
a lane of its own at the top edge, −∞ and zeros on a log axis at the bottom; a reading that was not taken is a gap. A
ring is a reading that a finding rests on. Lines and marks are to be seen on white and on near-black.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import altair as alt
import matplotlib as mpl
import numpy as np

from stabilitylab.record.readings import MODEL_SITE
from stabilitylab.record.run import Run
from stabilitylab.reports import charting, drawing
from stabilitylab.reports.chart_panel import Curve, chart_of, panel_of
from stabilitylab.reports.chart_parts import (
    GAPS,
    NAMED,
    SHAPES,
    ZEROS,
    about_edits,
    edit_axis,
    edit_tips,
    ends_of,
    flag_rules,
    inline,
    six_digits,
    ticks_of,
    titled,
    told_readings,
    unbracketed,
    unfold,
)
from stabilitylab.reports.drawing import Line
from stabilitylab.reports.spec_parts import LINES, ONSET, TICK
from stabilitylab.reports.text import clean, short_names, shorten

_DEPTHS: Final = (1, 2, 4, 8, 16, 32)


def lines(run: Run, metric: str, sites: str | Sequence[str] | None = None) -> alt.LayerChart:
    """One metric over the edits, a line per site; see `stabilitylab.record.run.Run.plot`. Raises UsageError."""
    about = run.metric(metric)
    chosen = drawing.choose(run, metric, sites)
    names = _names(chosen)
    shades = _shades(len(chosen))
    curves = [
        Curve(names[line.site], shorten(line.site, 120), line, shade)
        for line, shade in zip(drawing.read(run, metric, chosen), shades, strict=True)
    ]
    limits = drawing.shared_limits(run, metric)
    unit = metric if about.unit in {"1", ""} else f"{metric} ({about.unit})"
    layers = panel_of(run, curves, log=about.scale == "log", limits=limits, title=unbracketed(clean(unit, 60)))
    return chart_of(run, layers, metric, about.meaning)


def spectra(run: Run, site: str, metric: str = "gradient.spectrum") -> alt.LayerChart:
    """The leading singular values at one site as a fan; see `stabilitylab.record.run.Run.plot`. Raises UsageError."""
    about = run.metric(metric)
    values = run.series(metric, site).reshape(len(run.edits), -1)
    there = run.present(metric, site)
    depths = [depth for depth in _DEPTHS if depth <= values.shape[1] and np.isfinite(values[:, depth - 1]).any()]
    depths = depths or [1]
    shades = mpl.colormaps["viridis"](np.linspace(0.2, 0.8, len(depths)))
    curves = []
    for place, depth in enumerate(depths):
        # Only the first value tells "not taken" from NaN and 0: a matrix of low rank has fewer values.
        column = values[:, depth - 1]
        kept = there & ((column > 0) | (depth == 1))
        line = Line(metric, site, column, kept, place, len(depths), "")
        curves.append(Curve(f"σ{depth}", f"σ{depth}", line, mpl.colors.to_hex(shades[place])))
    layers = panel_of(run, curves, log=True, title="singular value")
    return chart_of(run, layers, f"{metric} at {shorten(site, 60)}", about.meaning)


def logit_range(run: Run, family: str = "canary") -> alt.LayerChart:
    """Smallest to largest logit as a band; see `stabilitylab.record.run.Run.plot`. Raises UsageError."""
    parts = {"max": LINES[0], "logsumexp": ONSET, "min": LINES[0]}
    for part in parts:
        run.metric(f"{family}.{part}")
    read = {
        part: drawing.read(run, f"{family}.{part}", [MODEL_SITE])[0]
        for part in parts
        if run.sites_of(f"{family}.{part}")
    }
    curves = [Curve(part, part, line, parts[part]) for part, line in read.items()]
    layers = panel_of(run, curves, log=False, title="logit", dashed=("logsumexp",))
    if {"max", "min"} <= set(read):
        low, high = read["min"].values, read["max"].values
        both = np.isfinite(low) & np.isfinite(high)
        band = {
            "edit": run.edit_numbers.astype(int).tolist(),
            "low": six_digits(np.where(both, low, np.nan)),
            "high": six_digits(np.where(both, high, np.nan)),
        }
        area = (
            alt.Chart(inline([band]))
            .transform_flatten(["edit", "low", "high"])
            .mark_area(color=LINES[0], opacity=0.18, invalid=GAPS, clip=True)
            .encode(x=edit_axis(run), y=alt.Y("low:Q", scale=layers.scale, axis=layers.axis), y2="high:Q")
        )
        layers = layers.behind(area)
    return chart_of(run, layers, f"{family} logits", "From the smallest to the largest, with the log-sum-exp.")


def heatmap(run: Run, metric: str, sites: str | Sequence[str] | None = None) -> alt.LayerChart:
    """Layers by edits, coloured by value; see `stabilitylab.record.run.Run.plot`. Raises UsageError."""
    about = run.metric(metric)
    log = about.scale == "log"
    chosen = drawing.choose(run, metric, sites)
    names, edits = _names(chosen), run.edit_numbers
    read = drawing.read(run, metric, chosen)
    low, high = ends_of(charting.finite_of([line.drawn(log) for line in read]), log)
    rows = [
        {
            "site": names[line.site],
            "whole": shorten(line.site, 120),
            "edit": edits.astype(int).tolist(),
            "reading": told_readings(line, log),
        }
        for line in read
    ]
    edges = np.concatenate([edits[:1] - 0.5, (edits[1:] + edits[:-1]) / 2, edits[-1:] + 0.5])
    told_edits = [
        {**told, "start": start, "end": end}
        for told, start, end in zip(about_edits(run), edges[:-1].tolist(), edges[1:].tolist(), strict=True)
    ]
    found = alt.LookupData(inline(told_edits), key="edit", fields=["label", "status", "start", "end"])
    order = list(names.values())
    step = 18 if len(order) <= 20 else 12
    y = alt.Y(
        "site:N", scale=alt.Scale(domain=order, paddingInner=0, paddingOuter=0), title=None,
        axis=alt.Axis(labelLimit=200, labelOverlap="greedy", ticks=False, domain=False),
    )  # fmt: skip
    unit = metric if about.unit in {"1", ""} else f"{metric} ({about.unit})"
    kind: dict[str, Any] = {"type": "log"} if log else {"type": "linear", "zero": False}
    scale = alt.Scale(scheme="cividis", domain=[low, high], nice=False, clamp=True, **kind)
    bar = alt.Legend(
        title=unbracketed(clean(unit, 60)), orient="bottom", direction="horizontal", gradientLength=300, titleLimit=300,
        values=ticks_of(low, high, log, 5), labelExpr=TICK,
    )  # fmt: skip
    tip = [alt.Tooltip("whole:N", title="site"), *edit_tips()]
    seen = {reading for row in rows for reading in row["reading"] if isinstance(reading, str)}
    keys = {"NaN, ±∞": charting.BAD_CELL} if seen - ZEROS else {}
    keys |= {"≤ 0": charting.ZERO_CELL} if seen & ZEROS else {}
    kinds = alt.Scale(domain=list(keys), range=list(keys.values()))
    cells = alt.Chart().mark_rect(clip=True)
    good = (
        cells.transform_filter("datum.kind == '' && isValid(datum.value)")
        .encode(
            x=edit_axis(run, "start"), x2="end:Q", y=y, color=alt.Color("value:Q", scale=scale, legend=bar),
            tooltip=[*tip, alt.Tooltip("value:Q", format=".4~g")],
        )
    )  # fmt: skip
    other = (
        cells.transform_filter("datum.kind != ''")
        .transform_calculate(key="datum.kind == '0' || datum.kind == 'negative' ? '≤ 0' : 'NaN, ±∞'")
        .encode(
            x=edit_axis(run, "start"), x2="end:Q", y=y, tooltip=[*tip, alt.Tooltip("kind:N", title="value")],
            color=alt.Color("key:N", scale=kinds, legend=alt.Legend(title=None, orient="bottom", symbolType="square")),
        )
    )  # fmt: skip
    shape = alt.Scale(domain=list(SHAPES), range=list(SHAPES.values()))
    signs = (
        alt.Chart()
        .transform_filter("datum.kind != ''")
        .mark_point(size=min(30.0, 4_000.0 / max(1, edits.size)), color="#ffffff", strokeWidth=0.9, clip=True)
        .encode(x=edit_axis(run), y=y, shape=alt.Shape("kind:N", scale=shape, legend=None))
    )
    parts = [good, *([other, signs] if seen else [])]
    grid = unfold(alt.layer(*parts, data=inline(rows)), found).resolve_scale(color="independent", shape="independent")
    chart = alt.layer(grid, *flag_rules(run)).resolve_scale(color="independent", strokeDash="independent")
    return titled(chart, metric, about.meaning, step * max(1, len(order)))


def _names(sites: Sequence[str]) -> dict[str, str]:
    """Short names, of which no two are alike."""
    seen: dict[str, int] = {}
    names = {}
    for site, full in short_names(sites, 30).items():
        short = unbracketed(full)
        seen[short] = seen.get(short, 0) + 1
        names[site] = short if seen[short] == 1 else f"{short} ({seen[short]})"
    return names


def _shades(count: int) -> list[str]:
    return list(LINES[:count]) if count <= NAMED else charting.colours(count)
