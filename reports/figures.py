"""Charts of a run as matplotlib figures, light and legible on a phone. Each marks the flagged edits.

On every chart: onset dashed, alarm dotted, first bad edit solid. A value that is NaN or infinite stands as a marker (×
or ▲) in a lane of its own at the top edge, −∞ and zeros on a log axis at the bottom; a reading that was not taken is a
gap. A ring is a reading that a finding rests on.

For a paper, make and save them within `style`::

    with figures.style():                                  # or figures.style("my.mplstyle")
        figures.heatmap(run, "update.norm").savefig("heatmap.pdf")
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Final

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from stabilitylab.errors import UsageError
from stabilitylab.record.readings import MODEL_SITE, Array
from stabilitylab.record.run import Run
from stabilitylab.reports import charting, drawing
from stabilitylab.reports.charting import BAD, BAD_CELL, INK, PAPER, ZERO_CELL, ZERO_CELL_INK
from stabilitylab.reports.text import clean, number, shorten

HEIGHT: Final = 2.7
LABEL_LIMIT: Final = 40
"""Characters of a metric's name or unit beside an axis."""
_DEPTHS: Final = (1, 2, 4, 8, 16, 32)
_NO_UNIT: Final = frozenset({"1", ""})


PAPER_STYLE: Final = "paper"


@contextmanager
def style(name: str | Path = PAPER_STYLE) -> Iterator[None]:
    """Figures that are made and saved within the block look as a matplotlib style file says.

    name: ``"paper"`` is ours, ``paper.mplstyle``: one column wide, white, with text that stays text in PDF and SVG. Or
    the path of a file of your own; what it does not say stays as ours. Of ``figure.figsize`` the width counts. Raises
    UsageError for a file that can't be read.
    """
    own = str(name) == PAPER_STYLE
    path = files("stabilitylab.reports").joinpath("paper.mplstyle") if own else Path(name)
    try:
        settings = mpl.rc_params_from_file(str(path), use_default_template=False)
    except OSError as error:
        raise UsageError(
            f"style {str(name)!r}: {error.strerror or error}; expected 'paper', or a style file"
        ) from error
    with charting.over(settings):
        yield


def lines(run: Run, metric: str, sites: str | Sequence[str] | None = None) -> Figure:
    """One metric over the edits, a line per site; log axis where the metric says so.

    sites: names or patterns such as ``"*.fc2"``; by default all at which it was read. A limit that all findings about
    the metric share is drawn. Raises UsageError for a metric or site that the run does not know.
    """
    about = run.metric(metric)
    chosen = drawing.choose(run, metric, sites)
    with charting.style():
        columns = charting.legend_columns(drawing.names_of(chosen).values(), 2 if len(chosen) <= 4 else 4)
        named = len(chosen) <= len(charting.LINES) and chosen != (MODEL_SITE,)
        figure, (axis,) = charting.canvas(HEIGHT, -(-len(chosen) // columns) if named else 1)
        drawing.draw(axis, run, drawing.read(run, metric, chosen), log=about.scale == "log")
        label = metric.partition(".")[2] or metric if about.unit in _NO_UNIT else about.unit
        axis.set_ylabel(clean(label, LABEL_LIMIT))
        charting.edit_axis(axis, run.edit_numbers)
        charting.mark_edits(axis, charting.flagged(run.diagnosis()))
        if named:
            charting.legend(figure, axis, columns)
        elif len(chosen) > 1:
            shades = charting.colours(len(chosen))
            handles = [Patch(color=shades[place]) for place in (0, len(chosen) // 2, -1)]
            words = [f"first of {len(chosen)} layers", "middle", "last"]
            figure.legend(handles, words, loc="lower center", ncols=3, handlelength=1.2)
        return figure


def telling(run: Run, metric: str, site: str) -> Figure:
    """One reading over the edits, with onset, alarm and end, and nothing else."""
    with charting.style():
        figure, (axis,) = charting.canvas(HEIGHT)
        drawing.draw(axis, run, drawing.read(run, metric, [site]), log=run.metric(metric).scale == "log")
        axis.set_ylabel(clean(metric, LABEL_LIMIT))
        charting.edit_axis(axis, run.edit_numbers)
        charting.mark_edits(axis, charting.story(run.diagnosis()))
        return figure


def logit_range(run: Run, family: str = "canary") -> Figure:
    """Smallest and largest logit over the edits as a band, with the log-sum-exp. family: ``canary`` or ``logits``."""
    with charting.style():
        figure, (axis,) = charting.canvas(HEIGHT, 1)
        wanted = (f"{family}.max", f"{family}.logsumexp", f"{family}.min")
        read = [line for name in wanted if run.sites_of(name) for line in drawing.read(run, name, [MODEL_SITE])]
        known, edits = {line.metric: line.values for line in read}, run.edit_numbers
        above = drawing.lane_height([np.any([line.above() for line in read], axis=0)] if read else [])
        below = drawing.lane_height([np.any([line.below(False) for line in read], axis=0)] if read else [])
        charting.value_axis(axis, charting.finite_of(list(known.values())), False, (above, below))
        if {wanted[0], wanted[2]} <= set(known):
            low, high = known[wanted[2]], known[wanted[0]]
            both = np.isfinite(low) & np.isfinite(high)
            axis.fill_between(edits, low, high, where=both.tolist(), color=charting.LINES[0], alpha=0.18, linewidth=0)
        for line in read:
            drawn, total = line.drawn(False), line.metric == wanted[1]
            axis.plot(
                edits, drawn, label=line.metric.partition(".")[2], color=charting.ONSET if total else line.shade,
                linestyle=":" if total else "-", marker="." if drawing.has_lone_points(drawn) else None,
            )  # fmt: skip
            drawing.lane(axis, edits, line, False)
            drawing.ring(axis, run, line, False)
        charting.lane(axis, above, "NaN, ∞")
        charting.lane(axis, below, "−∞", top=False)
        axis.set_ylabel("logit")
        charting.edit_axis(axis, edits)
        charting.mark_edits(axis, charting.flagged(run.diagnosis()))
        charting.legend(figure, axis, 3)
        return figure


def editor_state(run: Run) -> Figure:
    """The editor's largest normalised input (above), and the spread that this input was divided by (below)."""
    panels = (("editor.input_max", "largest input"), ("editor.input_unit_std", "its std"))
    with charting.style():
        sites = run.sites_of(panels[0][0])
        named = len(sites) <= len(charting.LINES)
        columns = charting.legend_columns(drawing.names_of(sites).values(), 2)
        figure, axes = charting.canvas(3.9, -(-len(sites) // columns) if named else 0, panels=2)
        for axis, (metric, label) in zip(axes, panels, strict=True):
            drawing.draw(axis, run, drawing.read(run, metric, run.sites_of(metric)), log=True)
            axis.set_ylabel(label)
            charting.edit_axis(axis, run.edit_numbers)
            charting.mark_edits(axis, charting.flagged(run.diagnosis()), named=axis is axes[0])
        _name_unit(axes[0], run)
        axes[0].set_xlabel("")
        if named:
            charting.legend(figure, axes[0], columns)
        return figure


def _name_unit(axis: Axes, run: Run) -> None:
    """The unit behind the first bad edit's largest input, beside its point."""
    diagnosis = run.diagnosis()
    for finding in diagnosis.findings:
        row = next((edit.row for edit in run.edits if edit.edit == finding.edit), None)
        unit = None if row is None else row.scalar("editor.input_unit", finding.site)
        first = (finding.start, finding.metric) == (diagnosis.first_bad_edit, "editor.input_max")
        if first and unit is not None and np.isfinite([unit, finding.value]).all():
            right = finding.edit > float(run.edit_numbers.mean())
            axis.annotate(
                f"unit {number(unit)}", (finding.edit, finding.value), (-7 if right else 7, 0), color=BAD, fontsize=8,
                textcoords="offset points", ha="right" if right else "left", va="center",
            )  # fmt: skip
            return


def spectra(run: Run, site: str, metric: str = "gradient.spectrum") -> Figure:
    """The leading singular values at one site over the edits: the 1st, 2nd, 4th, … as a fan from dark to light."""
    with charting.style():
        edits, values = run.edit_numbers, run.series(metric, site)
        values = values.reshape(edits.size, -1)
        (leading,) = drawing.read(run, metric, [site])
        depths = [depth for depth in _DEPTHS if depth <= values.shape[1] and np.isfinite(values[:, depth - 1]).any()]
        figure, (axis,) = charting.canvas(HEIGHT, 1)
        positive = {depth: np.where(values[:, depth - 1] > 0, values[:, depth - 1], np.nan) for depth in depths or [1]}
        above, below = drawing.lane_height([leading.above()]), drawing.lane_height([leading.below(True)])
        charting.value_axis(axis, charting.finite_of(list(positive.values())), True, (above, below))
        shades = mpl.colormaps["viridis"](np.linspace(0.2, 0.85, len(positive)))
        for (depth, line), shade in zip(positive.items(), shades, strict=True):
            axis.plot(
                edits, np.where(np.isfinite(line), line, np.nan), color=mpl.colors.to_hex(shade), label=f"σ{depth}",
                linewidth=1.8 if depth == 1 else 1.1, marker="." if drawing.has_lone_points(line) else None,
            )  # fmt: skip
        drawing.lane(axis, edits, leading, True)
        charting.lane(axis, above, "NaN, ∞")
        charting.lane(axis, below, "0", top=False)
        axis.set_ylabel("singular value")
        charting.edit_axis(axis, edits)
        charting.mark_edits(axis, charting.flagged(run.diagnosis()))
        charting.legend(figure, axis, len(positive))
        return figure


def heatmap(run: Run, metric: str, sites: str | Sequence[str] | None = None) -> Figure:
    """Layers (rows, in dataflow order) by edits, coloured by value. NaN and ∞ red with a cross, not taken: blank.

    On a log scale 0 is pale with a ring. sites: as for `lines`.
    """
    about = run.metric(metric)
    chosen = drawing.choose(run, metric, sites)
    with charting.style():
        height, edits = min(1.75 + 0.2 * len(chosen), 6.0), run.edit_numbers
        names = [name[-18:] for name in drawing.names_of(chosen).values()]
        left = 0.28 + 0.07 * max(map(len, names), default=0)
        figure, (axis,) = charting.canvas(height, 3, left=left)
        read = drawing.read(run, metric, chosen)
        values = np.array([line.values for line in read]).reshape(len(read), edits.size)
        there = np.array([line.there for line in read]).reshape(values.shape)
        good = there & np.isfinite(values)
        edges = np.concatenate([edits[:1] - 0.5, (edits[1:] + edits[:-1]) / 2, edits[-1:] + 0.5])
        rows = np.arange(len(read) + 1) - 0.5
        norm = _norm(values[good], about.scale == "log")
        zero, bad = good & (values <= 0) & (about.scale == "log"), there & ~good
        shades = np.ma.masked_where(~good | zero, values)
        image = axis.pcolormesh(edges, rows, shades, cmap="cividis", norm=norm, rasterized=True)
        for mask, shade, sign, ink in ((bad, BAD_CELL, "x", PAPER), (zero, ZERO_CELL, "o", ZERO_CELL_INK)):
            flat = np.ma.masked_where(~mask, np.ones(values.shape))
            axis.pcolormesh(edges, rows, flat, cmap=ListedColormap([shade]), rasterized=True)
            down, along = np.nonzero(mask)
            axis.plot(
                edits[along], down, sign, color=ink, markersize=min(4.0, 200.0 / edits.size), markeredgewidth=0.6,
                markerfacecolor="none", rasterized=True,
            )  # fmt: skip
        axis.grid(False)
        axis.invert_yaxis()
        step = max(1, -(-len(names) // 22))
        axis.set_yticks(range(0, len(names), step), names[::step], fontsize=8)
        charting.edit_axis(axis, edits)
        charting.mark_edits(axis, charting.flagged(run.diagnosis()))
        label = shorten(metric, LABEL_LIMIT)
        label = label if about.unit in _NO_UNIT else f"{label} ({clean(about.unit, LABEL_LIMIT)})"
        keys = [("NaN, ∞", BAD_CELL)] * bool(bad.any()) + [("0", ZERO_CELL)] * bool(zero.any())
        _colour_bar(figure, image, (left, height), label, keys)
        return figure


def _norm(finite: Array, log: bool) -> Normalize:
    values = finite[finite > 0] if log else finite
    if not values.size:
        return Normalize(0.0, 1.0)
    low, high = float(values.min()), float(values.max())
    if log:
        return LogNorm(low, high if high > low else 10.0 * low)
    return Normalize(low, high if high > low else low + 1.0)


def _colour_bar(
    figure: Figure, image: ScalarMappable, at: tuple[float, float], label: str, keys: Sequence[tuple[str, str]]
) -> None:
    """Below the map. at: its left edge and the figure's height, in inches. keys: (name, colour) of other cells."""
    left, height = at
    width = charting.width() - left - (1.5 if keys else 0.3)
    box = figure.add_axes((left / charting.width(), 0.40 / height, width / charting.width(), 0.09 / height))
    bar = figure.colorbar(image, cax=box, orientation="horizontal")
    bar.outline.set_edgecolor(INK)
    box.xaxis.set_minor_locator(NullLocator())
    low, high = image.get_clim()
    if isinstance(image.norm, LogNorm) and low and high and high / low >= 20:
        box.xaxis.set_major_locator(LogLocator(numticks=5))
    else:
        box.xaxis.set_major_locator(
            FixedLocator([low or 0.0, high or 1.0]) if isinstance(image.norm, LogNorm) else MaxNLocator(3)
        )
    box.xaxis.set_major_formatter(FuncFormatter(charting.tick_text))
    box.tick_params(labelsize=8, length=2, pad=1)
    box.set_xlabel(label, fontsize=8, labelpad=0)
    if keys:
        figure.legend(
            [Patch(color=shade) for _, shade in keys], [name for name, _ in keys], loc="lower right", handlelength=1.0,
            ncols=len(keys), columnspacing=0.9, handletextpad=0.5, bbox_to_anchor=(1.0, 0.25 / height),
        )  # fmt: skip
