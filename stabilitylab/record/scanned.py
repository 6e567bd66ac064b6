"""What a scan has read of a model and its editor before the first edit: figures only. No torch here."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Final, get_args, get_origin, get_type_hints

from stabilitylab.record.checked import expect

FLOATS: Final[Mapping[str, tuple[float, float, float]]] = {
    "float64": (1.7976931348623157e308, 2.2250738585072014e-308, 2.220446049250313e-16),
    "float32": (3.4028234663852886e38, 1.1754943508222875e-38, 1.1920928955078125e-07),
    "bfloat16": (3.3895313892515355e38, 1.1754943508222875e-38, 0.0078125),
    "float16": (65504.0, 6.103515625e-05, 0.0009765625),
    "float8_e5m2": (57344.0, 6.103515625e-05, 0.25),
    "float8_e4m3fn": (448.0, 0.015625, 0.125),
}
"""Largest value, smallest normal one, and the distance from 1 to the next, of each dtype that models are kept in."""

LISTED: Final = 8
"""Rows, columns or units that are named; beyond them they are only counted."""


LONGEST_TEXT: Final = 10_000
"""Characters of a name or a reason that a scan may hold."""


def headroom(largest: float | None, limit: float) -> float | None:
    """Bits from a magnitude to a limit, log2(limit / largest); ∞ where it is 0, None where it is not known."""
    if largest is None or math.isnan(largest) or not limit > 0.0:
        return None
    if largest == 0.0:
        return math.inf
    return math.log2(limit / largest) if math.isfinite(largest) else -math.inf


def norm_limit(dtype: str) -> float:
    """The magnitude at which what enters a normalisation ends: its dtype's largest value, or the root of the largest
    that its squares are formed in, if that is less: float32 for narrower dtypes, as torch and transformers do.
    """
    return min(FLOATS[dtype][0], math.sqrt(FLOATS["float64" if dtype == "float64" else "float32"][0]))


@dataclass(frozen=True)
class Some:
    """Rows, columns or units with something in common. first: at most `LISTED` of them, the most striking first.

    values: of each of those, what is striking about it.
    """

    count: int = 0
    first: tuple[int, ...] = ()
    values: tuple[float, ...] = ()


@dataclass(frozen=True)
class TensorScan:
    """One tensor of the model.

    layer: the name of what it belongs to. least, greatest: of its finite entries; None where there is none. norm:
    Frobenius, of the finite entries. nonfinite, masking, zeros, subnormal: entries; masking ones are −∞; subnormal ones
    are not zero and below the smallest normal value of float16, and counted only there. first_bad: index of the first
    that is not finite. zero_rows, zero_columns: an output, an input of the layer, with weights of exactly 0 throughout.
    loud_rows, loud_columns: with a norm many times that of the median one, by how many times. Rows are outputs and
    columns inputs, however the layer keeps them; a vector has none. worst_output: the most that an input of RMS 1 can
    make of one output, max ‖row‖₂ · √inputs. spectral_norm, stable_rank (‖W‖²_F / σ₁²), condition (σ₁ / σ_min): only
    where they were asked for.
    """

    name: str
    layer: str
    shape: tuple[int, ...]
    dtype: str
    norm: float
    least: float | None
    greatest: float | None
    nonfinite: int = 0
    masking: int = 0
    zeros: int = 0
    subnormal: int = 0
    first_bad: tuple[int, ...] | None = None
    zero_rows: Some = Some()
    zero_columns: Some = Some()
    loud_rows: Some = Some()
    loud_columns: Some = Some()
    worst_output: float | None = None
    spectral_norm: float | None = None
    stable_rank: float | None = None
    condition: float | None = None
    is_site: bool = False
    """Whether it is one that is going to be edited."""
    is_buffer: bool = False
    """Whether it is no parameter, as far as that is known."""
    inputs_first: bool = False
    """Whether it is a layer's matrix that is kept as [inputs, outputs]."""

    @property
    def size(self) -> int:
        """How many entries."""
        return math.prod(self.shape)

    @property
    def largest(self) -> float | None:
        """The largest magnitude of its finite entries."""
        return None if self.least is None or self.greatest is None else max(abs(self.least), abs(self.greatest))

    @property
    def headroom_bits(self) -> float | None:
        """From its largest entry to the largest value of its dtype."""
        return headroom(self.largest, FLOATS[self.dtype][0]) if self.dtype in FLOATS else None

    @property
    def output_headroom_bits(self) -> float | None:
        """From `worst_output` to where the next normalisation ends, see `norm_limit`: the least there can be for an
        input of RMS 1.
        """
        return headroom(self.worst_output, norm_limit(self.dtype)) if self.dtype in FLOATS else None


@dataclass(frozen=True)
class ActivationScan:
    """What the canary makes of one layer.

    what: ``output`` of a layer, or ``input`` of a normalisation. limit: the magnitude at which it ends; for a
    normalisation the root of the largest value that its squares are formed in. row, position, token, unit: where the
    largest entry is (token: its id, where the canary has ids). typical: the median magnitude. nonfinite: entries. dead:
    units that give nothing but zeros, of `units`; None for what is no activation function.
    """

    layer: str
    what: str
    dtype: str
    limit: float
    largest: float | None
    typical: float
    row: int = 0
    position: int = 0
    unit: int = 0
    token: int | None = None
    nonfinite: int = 0
    units: int = 0
    dead: Some | None = None

    @property
    def headroom_bits(self) -> float | None:
        """From the largest entry to the limit."""
        return headroom(self.largest, self.limit)


@dataclass(frozen=True)
class StatisticsScan:
    """What an editor normalises one kind of input of its hypernetwork with.

    kind: ``u`` (a layer's inputs), ``v`` (gradients at its output), or empty for both in one. layers: those of the
    model that it serves, as far as that is known. rows: how many it was made from; None where it keeps no count.
    guard: what is added to a spread before it divides. typical: the median spread. zero, nan, tiny: units whose spread
    is 0, is not finite, or is many times below the median one; their values are the spreads. dtype: in which they are
    kept.
    """

    editor: str
    name: str
    kind: str
    units: int
    rows: float | None
    guard: float
    typical: float | None = None
    zero: Some = Some()
    nan: Some = Some()
    tiny: Some = Some()
    nan_means: int = 0
    layers: tuple[str, ...] = ()
    dtype: str = ""


@dataclass(frozen=True)
class RatesScan:
    """Edit learning rates that an editor has learned, in its order."""

    editor: str
    name: str
    values: tuple[float, ...]


@dataclass(frozen=True)
class MomentScan:
    """Second moments C of the keys of one layer, a projection that was made of them, or the sum over edited keys.

    what: ``moments``, ``projection`` or ``cache``. tokens: that it was made from; None where no count is kept. rank:
    singular values above the largest · size · eps of its dtype. condition: largest by smallest eigenvalue, ∞ where
    that is 0 or below. smallest, largest: eigenvalues. zero_rows: inputs that were never anything but 0. asymmetry:
    ‖C − Cᵀ‖ / ‖C‖. idempotence: of a projection, ‖P² − P‖ / ‖P‖. layer: that of the model which it is of, where its
    name tells.
    """

    what: str
    name: str
    size: int
    dtype: str
    tokens: float | None = None
    rank: int | None = None
    condition: float | None = None
    smallest: float | None = None
    largest: float | None = None
    nonfinite: int = 0
    zero_rows: Some = Some()
    asymmetry: float | None = None
    idempotence: float | None = None
    layer: str = ""


@dataclass(frozen=True)
class PrecisionScan:
    """What one dtype would cost.

    entries: of the weights. overflowing: those that would not fit. vanishing: those that are not 0 and would be.
    headroom_bits: from the largest weight, activation_headroom_bits: from the largest activation of the canary, to the
    dtype's largest value. updates: entries of dry edits that are not 0; swallowed: of those, the ones that the dtype
    rounds away when they are added to its weight. kl_nats, agreement: the canary's predictions with all weights
    rounded to it, against those as they are: mean KL, and the share of tokens with the same answer. error: why that
    could not be tried.
    """

    dtype: str
    entries: int
    overflowing: int
    vanishing: int
    headroom_bits: float | None
    activation_headroom_bits: float | None = None
    updates: int | None = None
    swallowed: int | None = None
    kl_nats: float | None = None
    agreement: float | None = None
    error: str | None = None

    @property
    def swallowed_share(self) -> float | None:
        """Of the entries of updates; None where none was made."""
        return self.swallowed / self.updates if self.updates and self.swallowed is not None else None


@dataclass(frozen=True)
class CapacityScan:
    """How far one site can be moved along the updates of dry edits until the canary is lost.

    steps: in multiples of the update, the median over the dry edits; ∞ where it was not lost within the most that was
    tried. low, high: the least and greatest of them. update_norm: Frobenius, the median. updates: how many were tried.
    """

    site: str
    steps: float
    low: float
    high: float
    update_norm: float
    updates: int


@dataclass(frozen=True)
class Scan:
    """Everything that was read, in the order of the model.

    model: its folder, or its class. kind: ``folder`` or ``live``. skipped: what could not be read, with the reason.
    bytes: of the tensors that were read. lost_nats: the mean KL at which `capacities` take a canary for lost.
    editor_nonfinite: entries that are not finite in the tensors of an editor that no other figure is of, by tensor.
    """

    model: str
    kind: str
    dtypes: Mapping[str, int] = field(default_factory=dict)
    """Entries in each dtype."""
    tensors: tuple[TensorScan, ...] = ()
    activations: tuple[ActivationScan, ...] = ()
    statistics: tuple[StatisticsScan, ...] = ()
    rates: tuple[RatesScan, ...] = ()
    moments: tuple[MomentScan, ...] = ()
    precisions: tuple[PrecisionScan, ...] = ()
    capacities: tuple[CapacityScan, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)
    sites: tuple[str, ...] = ()
    """Names of the layers that are going to be edited, as far as that was said."""
    model_type: str = ""
    bytes: int = 0
    seconds: float = 0.0
    lost_nats: float | None = None
    editor_nonfinite: Mapping[str, int] = field(default_factory=dict)

    def to_json(self, *, brief: bool = False) -> dict[str, Any]:
        """Plain JSON values; NaN and infinities become the strings ``"NaN"``, ``"Infinity"``, ``"-Infinity"``.

        brief: leave out what is nothing out of the ordinary: fields that are at their default.
        """
        plain: dict[str, Any] = _plain(self, brief)
        return plain


def scan_from_json(given: Any) -> Scan:
    """A scan from what `Scan.to_json` gave. Raises ValueError where it is none."""
    try:
        scan: Scan = _read(Scan, given)
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise ValueError(f"no scan: {error}") from None
    return scan


_SPELLED: Final = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _plain(value: Any, brief: bool) -> Any:
    if dataclasses.is_dataclass(value):
        fields = ((field, getattr(value, field.name)) for field in dataclasses.fields(value))
        return {field.name: _plain(held, brief) for field, held in fields if not (brief and _is_default(field, held))}
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {str(key): _plain(item, brief) for key, item in value.items()}
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    return [_plain(each, brief) for each in value] if is_list else value


def _is_default(field: dataclasses.Field[Any], held: Any) -> bool:
    made = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
    return bool(made is not dataclasses.MISSING and held == made)


def _read(kind: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(kind):
        hints, given = _hints(kind), _of(dict, value)  # type: ignore[arg-type]
        return kind(**{name: _read(hints[name], item) for name, item in given.items()})  # type: ignore[operator]
    inside, home = get_args(kind), get_origin(kind)
    if home is tuple:
        return tuple(_read(inside[0], item) for item in _of(list, value))
    if isinstance(home, type) and issubclass(home, Mapping):
        return {_read(str, key): _read(inside[1], item) for key, item in _of(dict, value).items()}
    if type(None) in inside:
        (inner,) = (each for each in inside if each is not type(None))
        return None if value is None else _read(inner, value)
    if kind is float and isinstance(value, str):
        return _SPELLED[value]
    found = expect(kind, value, "a value")
    if kind is str and len(found) > LONGEST_TEXT:
        raise ValueError(f"a text of {len(found):,} characters")
    return float(found) if kind is float else found


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _of(kind: type, value: Any) -> Any:
    return expect(kind, value, f"what should be a {kind.__name__}")
