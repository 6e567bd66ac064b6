"""How a warning looks, and a scan's figures in words: the same on its page and in the console."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from stabilitylab.analysis.caution import URGENCIES, Caution, Urgency
from stabilitylab.analysis.caution_model import FEW_BITS
from stabilitylab.record.scanned import CapacityScan, PrecisionScan, Scan
from stabilitylab.reports.text import clean, number, percent, shorten
from stabilitylab.reports.verdicts import Look

LOOKS: Final[dict[Urgency, Look]] = {
    "fatal": Look("Fatal", "✖", "red", "v-nonfinite", "Broken already, or the first edit that gets there breaks it."),
    "risk": Look("Risk", "▲", "dark_orange3", "v-diverging", "It makes an end of the run likelier, or nearer."),
    "note": Look("Note", "◐", "yellow", "v-drifting", "Worth knowing."),
}
CALM: Final = Look("Nothing to warn of", "●", "green", "v-stable", "Nothing out of the ordinary was read.")
ROOMY: Final = 20.0
"""Bits, a millionfold, at which a picture of headroom is full; numbers beside it go on."""
_ROUNDS_TO_NOTHING: Final = 0.0005
"""A share below it is 0.0 % to a reader."""
DTYPES_SHOWN: Final = 8


@dataclass(frozen=True)
class Told:
    """A warning as it is shown. came_true: when and where, in words; empty where it did not. here: at its own place."""

    caution: Caution
    came_true: str = ""
    here: bool = False


def look_of(cautions: Sequence[Caution]) -> Look:
    """That of the most urgent."""
    return next((LOOKS[urgency] for urgency in URGENCIES if any(c.urgency == urgency for c in cautions)), CALM)


def counts(cautions: Sequence[Caution]) -> dict[Urgency, int]:
    """How many there are of each urgency."""
    found = Counter(caution.urgency for caution in cautions)
    return {urgency: found[urgency] for urgency in URGENCIES}


def counts_words(cautions: Sequence[Caution]) -> str:
    """``1 fatal, 2 risks, 3 notes``."""
    told = {"fatal": ("fatal", "fatal"), "risk": ("risk", "risks"), "note": ("note", "notes")}
    held = counts(cautions).items()
    words = ", ".join(f"{number(count)} {told[name][count != 1]}" for name, count in held if count)
    return words or "nothing to warn of"


def plain(scan: Scan, cautions: Sequence[Caution]) -> dict[str, Any]:
    """The scan as plain JSON values, with ``cautions`` and ``urgencies``, how many there are of each."""
    told = [caution.to_json() for caution in cautions]
    return {**scan.to_json(), "cautions": told, "urgencies": dict(counts(cautions))}


def bits(value: float | None) -> str:
    """Headroom for a reader: ``1.8``, ``∞`` where there is nothing but zeros, a dash where it is not known."""
    return number(value) if value is None or not math.isfinite(value) else f"{value:.1f}".replace("-", "−")


def filled(headroom: float | None) -> float:
    """How full a picture of headroom is, 0 to 1."""
    return 0.0 if headroom is None or math.isnan(headroom) else min(max(headroom / ROOMY, 0.0), 1.0)


def model_name(scan: Scan) -> str:
    """The last part of its folder, or its class."""
    name = scan.model.replace("\\", "/").rstrip("/").rpartition("/")[2] if scan.kind == "folder" else scan.model
    return shorten(name, 80) or "a model"


def size_words(size: float) -> str:
    """Bytes for a reader: ``1.2 GB``."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{number(size)} {unit}"
        size /= 1000
    return f"{number(size)} TB"


def looked_at(scan: Scan) -> list[tuple[str, str]]:
    """(name, value) of what was scanned."""
    entries = sum(tensor.size for tensor in scan.tensors)
    listed = list(scan.dtypes.items())[:DTYPES_SHOWN]
    dtypes = [
        clean(name, 30) + (f" {percent(count / entries)}" if 0 < count < entries else "") for name, count in listed
    ]
    rows = [
        ("Kind", f"{clean(scan.model_type, 60)}, " * bool(scan.model_type) + clean(scan.kind, 20)),
        ("Read", f"{number(entries)} entries in {number(len(scan.tensors))} tensors"),
        ("Dtypes", ", ".join(dtypes)),
        ("Size", size_words(scan.bytes) if scan.bytes else ""),
        ("To be edited", f"{number(len(scan.sites))} layers" if scan.sites else ""),
        ("Scanned in", f"{number(scan.seconds)} s"),
    ]
    return [(name, value) for name, value in rows if value]


def block_names(names: Sequence[str], limit: int) -> dict[str, str]:
    """Names by their last two parts, ``layers.2``, where that tells all of them apart, each at most `limit` long."""
    cut = {name: ".".join(name.split(".")[-2:]) for name in names}
    distinct = len(set(cut.values())) == len(cut)
    return {name: shorten(cut[name] if distinct else name, limit) or "(no name)" for name in names}


def price(found: PrecisionScan) -> tuple[str, str]:
    """(dtype, what it would cost): ``("float16", "1.8 bits from overflow; 3.1 % of the updates are rounded away")``."""
    dtype = clean(found.dtype, 30)
    if found.error is not None:
        return dtype, f"could not be tried: {clean(found.error, 200)}"
    known = [(room, where) for room, where in _rooms(found) if room is not None and not math.isnan(room)]
    room, where = min(known, default=(None, ""))
    share = found.swallowed_share
    costs = []
    if found.overflowing:
        costs.append(f"{number(found.overflowing)} of its weights would not fit")
    elif room is not None:
        costs.append(f"{bits(room)} bits from overflow{where}")
    if found.vanishing:
        costs.append(f"{number(found.vanishing)} of {number(found.entries)} weights become 0")
    if share is not None:
        none_lost = share < _ROUNDS_TO_NOTHING
        costs.append(
            f"{'none' if none_lost else percent(share)} of these updates {'is' if none_lost else 'are'} rounded away"
        )
    if found.agreement is not None:
        kl = "" if found.kl_nats is None else f" (KL {number(found.kl_nats)} nats)"
        costs.append(f"{number(100 * found.agreement)} % of the canary’s answers stay{kl}")
    free = room is not None and room >= FEW_BITS and share is not None and share < _ROUNDS_TO_NOTHING
    return dtype, ("neither: " if free and not found.overflowing else "") + ("; ".join(costs) or "not known")


def _rooms(found: PrecisionScan) -> tuple[tuple[float | None, str], tuple[float | None, str]]:
    return (found.headroom_bits, ""), (found.activation_headroom_bits, " (the canary’s activations)")


def ranked(found: Sequence[CapacityScan]) -> list[CapacityScan]:
    """The layers that take least first; those of which nothing is known last."""
    return sorted(found, key=lambda each: (math.isnan(each.steps), each.steps))


def steps_words(steps: float) -> str:
    """Multiples of an update: ``3.2×``; ``∞`` where the model was not lost within the most that was tried."""
    return f"{number(steps)}×" if math.isfinite(steps) else number(steps)


def capacity_share(steps: float, found: Sequence[CapacityScan]) -> float:
    """Where it stands, 0 to 1, on a logarithmic scale that all of them share: powers of ten around the finite ones."""
    known = [
        value for each in found for value in (each.low, each.steps, each.high) if math.isfinite(value) and value > 0
    ]
    if math.isnan(steps) or steps <= 0 or not known:
        return 1.0 if steps == math.inf else 0.0
    low, high = math.floor(math.log10(min(known)) - 1e-9), math.ceil(math.log10(max(known)) + 1e-9)
    return 1.0 if steps == math.inf else (math.log10(steps) - low) / (high - low)
