"""How a figure becomes a picture in a page: compact SVG that a browser shows dark where the reader prefers that."""

from __future__ import annotations

import base64
import io
import re
from typing import Final

from matplotlib.figure import Figure

from stabilitylab.reports.charting import BAD, GRID, INK, LANE, LINES, MUTED, ONSET, PAPER, style

_DARK: Final = {
    INK: "#e7ebf0",
    MUTED: "#a9b4c2",
    GRID: "#333c48",
    PAPER: "#181e26",
    LANE: "#3a2029",
    BAD: "#ff7d9c",
    ONSET: "#ffb454",
    **dict(
        zip(
            LINES,
            ("#56b0ea", "#ff9356", "#35cba0", "#ea9cc8", "#e6b645", "#8ad2f7", "#b69af0", "#cfa86a"),
            strict=True,
        )
    ),
}


def to_svg(figure: Figure, *, dark: bool = True) -> str:
    """The figure as compact SVG text: the same for the same figure, dark where the reader prefers that.

    dark: whether it follows the reader; where the ground is always light it must not.

    Coordinates keep a tenth of a point, names of parts are short, and markers of one line share one style: a third of
    what matplotlib writes, with no difference that could be seen.
    """
    out = io.StringIO()
    with style():
        figure.savefig(out, format="svg", dpi=144, metadata={"Date": None, "Creator": None})
    svg = out.getvalue()[out.getvalue().index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    head, body = svg[: svg.index("<defs>")], svg[svg.index("<defs>") :]
    body = re.sub(r"(?<![#\w.])-?\d+\.\d{2,}(?![\w.])", _tenth, body)
    body = re.sub(r">\s+<", "><", body)
    body = re.sub(r' d="([^"]*)"', _tight_path, body)
    body = _MARKERS_OF_A_LINE.sub(_style_once, body)
    used = set(re.findall(r'"(?:url\()?#([^")]+)\)?"', body))
    body = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", body)
    short = {name: f"i{place}" for place, name in enumerate(sorted(used))}
    body = re.sub(r'((?: id="|href="#|url\(#))([^")]+)', lambda found: found[1] + short[found[2]], body)
    return f"{head.strip()}<style>{_dark_sheet(body)}</style>{body}" if dark else f"{head.strip()}{body}"


def _tight_path(found: re.Match[str]) -> str:
    path = re.sub(r"\s*([A-Za-z])\s*", r"\1", found[1])
    return f' d="{path}"'


def _tenth(found: re.Match[str]) -> str:
    """Small numbers are scales of glyphs, and keep what they have."""
    value = float(found[0])
    return f"{value:.1f}".removesuffix(".0") if abs(value) >= 0.2 else f"{value:.4g}"


_MARKERS_OF_A_LINE: Final = re.compile(r'<g([^>]*)>((?:<use [^>]*? style="[^"]*"/>){2,})</g>')


def _style_once(group: re.Match[str]) -> str:
    styles = set(re.findall(r'style="([^"]*)"', group[2]))
    if len(styles) > 1:
        return group[0]
    plain = re.sub(r' style="[^"]*"', "", group[2])
    return f'<g{group[1]} style="{styles.pop()}">{plain}</g>'


def _dark_sheet(body: str) -> str:
    rules = "".join(
        f'[style*="{what}: {light}"]{{{what}:{dark}!important}}'
        for light, dark in _DARK.items()
        for what in ("fill", "stroke")
        if f"{what}: {light}" in body
    )
    return f"@media (prefers-color-scheme:dark){{{rules}}}"


def data_uri(svg: str) -> str:
    """The SVG as the address of a picture."""
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode('utf-8')).decode('ascii')}"
