"""Numbers and untrusted text as a reader sees them: the same on the page, in the console and in TensorBoard."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from stabilitylab.record.readings import EDITOR_SITE
from stabilitylab.record.spelling import spelled


def clean(text: object, limit: int = 200) -> str:
    """`text` on one line and at most `limit` characters long.

    Whitespace becomes single blanks. Control, bidirectional, zero-width, unassigned and surrogate characters are
    spelled out (``\\u202e``): they can neither reorder what is read nor steer a terminal. Not escaped for HTML.
    """
    known = str(text)[: 4 * limit]
    told = spelled(re.sub(r"[ \t\r\n\f\v\u2028\u2029]+", " ", known)).strip()
    return told if len(told) <= limit and len(str(text)) <= 4 * limit else told[: limit - 1] + "…"


def sentence(text: str) -> str:
    """`text` with a capital first, unless its first word is a name such as ``fc2`` or ``decoder.layers``."""
    first = text.partition(" ")[0]
    return text[:1].upper() + text[1:] if first.isalpha() and first.islower() else text


def shorten(name: str, limit: int) -> str:
    """A site's name cleaned and cut in its middle: both ends of a name tell more than its middle."""
    known = clean(name if len(name) <= 2_000 else f"{name[:1_000]}{name[-1_000:]}", 8_000)
    if len(known) <= limit:
        return known
    head = (limit - 1) // 3
    return f"{known[:head]}…{known[-(limit - 1 - head) :]}"


def short_names(sites: Sequence[str], limit: int = 22) -> dict[str, str]:
    """Sites without the dotted prefix that all of them share: ``decoder.layers.1.fc2`` becomes ``1.fc2``.

    A layer's number stays, also where all sites are in that layer. Layers and the editor's own sites have a prefix
    each, so that a site is called the same on charts that show both.
    """
    of_editor = [site for site in sites if site.startswith(f"{EDITOR_SITE}.")]
    of_model = [site for site in sites if site not in of_editor]
    cut = {**_without_prefix(of_model), **_without_prefix(of_editor)}
    distinct = len(set(cut.values())) == len(cut)
    return {site: shorten(cut[site] if distinct else site, limit) for site in sites}


def _without_prefix(sites: Sequence[str]) -> dict[str, str]:
    split = [site.split(".") for site in sites]
    if len(sites) < 2:
        # Of a single site nothing says what is prefix but a layer's number with something behind it.
        return {site: ".".join(parts[_number_in(parts[:-1]) or 0 :]) for parts, site in zip(split, sites, strict=True)}
    shared = 0
    while len({tuple(parts[: shared + 1]) for parts in split}) == 1 and shared < min(map(len, split)):
        shared += 1
    numbered = _number_in(split[0][:shared])
    shared = shared if numbered is None else numbered
    return {site: ".".join(parts[shared:]) or site for parts, site in zip(split, sites, strict=True)}


def _number_in(parts: Sequence[str]) -> int | None:
    """Where the first part that is a number stands; None where none is."""
    return next((place for place, part in enumerate(parts) if part.isdecimal()), None)


def with_short_names(words: str, places: Mapping[str, str]) -> str:
    """`words` with each site's name as its short one in `places`, also where that of a part of it goes on.

    A name without a dot may be a word, and stays.
    """

    def short(found: re.Match[str]) -> str:
        site = found[0]
        while "." in site:
            if site in places:
                return places[site] + found[0][len(site) :]
            site = site.rpartition(".")[0]
        return found[0]

    return re.sub(r"\w+(?:\.\w+)+", short, words)


def number(value: float | None, digits: int = 3) -> str:
    """A value for a reader: ``300``, ``0.032``, ``3.2e5``, ``NaN``, ``∞``; a dash for None."""
    if value is None:
        return "–"
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == int(value) and abs(value) < 1e6:
        return f"{int(value):,}".replace("-", "−")
    if 1e-3 <= abs(value) < 1e5:
        whole = f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"
        return whole.replace("-", "−")
    mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
    mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
    return f"{mantissa}e{int(exponent)}".replace("-", "−")


def limit(value: float) -> str:
    """The limit of a finding; a dash for one that has none."""
    return "–" if math.isnan(value) else number(value)


def percent(share: float | None) -> str:
    """A share of time: ``2.1 %``; a dash for None."""
    return number(share) if share is None or not math.isfinite(100 * share) else f"{100 * share:.1f} %"
