"""Scans made by hand, with what they warn of: one that is about to die, a sound one, an empty one, a large one and a
hostile one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from stabilitylab.analysis.caution import URGENCIES, Caution, by_urgency
from stabilitylab.record.scanned import (
    FLOATS,
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
from tests.injections import INJECTIONS

Told = tuple[Scan, tuple[Caution, ...]]

KINDS: Final = (
    ("self_attn.q_proj.weight", (64, 64)),
    ("self_attn.k_proj.weight", (64, 64)),
    ("self_attn.v_proj.weight", (64, 64)),
    ("self_attn.out_proj.weight", (64, 64)),
    ("self_attn_layer_norm.weight", (64,)),
    ("fc1.weight", (256, 64)),
    ("fc1.bias", (256,)),
    ("fc2.weight", (64, 256)),
    ("fc2.bias", (64,)),
    ("final_layer_norm.weight", (64,)),
)


def tensor(name: str, shape: tuple[int, ...], dtype: str, largest: float = 0.4, **more: object) -> TensorScan:
    norm = 0.02 * math.sqrt(math.prod(shape))
    given: dict[str, object] = {"norm": norm, "least": -largest, "greatest": 0.9 * largest, **more}
    return TensorScan(name, name.rpartition(".")[0], shape, dtype, **given)  # type: ignore[arg-type]


def decoder(layers: int = 4, dtype: str = "float16", prefix: str = "language_model.decoder.layers") -> list[TensorScan]:
    inside = [
        tensor(f"{prefix}.{layer}.{name}", shape, dtype, 0.3 + 0.1 * (layer % 5), is_site=name == "fc2.weight")
        for layer in range(layers)
        for name, shape in KINDS
    ]
    return [
        tensor("language_model.decoder.embed_tokens.weight", (512, 64), dtype),
        *inside,
        tensor("lm_head.weight", (512, 64), dtype),
    ]


def _counted(tensors: Sequence[TensorScan]) -> dict[str, int]:
    return {dtype: sum(each.size for each in tensors if each.dtype == dtype) for dtype in {t.dtype for t in tensors}}


def dying() -> Told:
    """A decoder in float16 of four layers, of which one is near its end and one has been broken."""
    layer = "language_model.decoder.layers"
    tensors = {each.name: each for each in decoder()}
    for name, shape, largest, more in (
        (f"{layer}.2.fc2.weight", (64, 256), 18_820.0, {"loud_rows": Some(1, (17,), (41.0,)), "is_site": True}),
        (f"{layer}.3.fc1.weight", (256, 64), 0.5, {"nonfinite": 3, "first_bad": (7, 12)}),
        (f"{layer}.1.fc1.weight", (256, 64), 0.4, {"zero_rows": Some(5, (3, 9, 44, 60, 99))}),
    ):
        tensors[name] = tensor(name, shape, "float16", largest, **more)
    held = tuple(tensors.values())
    scan = Scan(
        "/data/models/blip2-digits-fp16",
        "folder",
        _counted(held),
        held,
        activations=(
            ActivationScan(
                f"{layer}.1.final_layer_norm", "input", "float16", math.sqrt(FLOATS["float32"][0]), 212.0, 0.11
            ),
            ActivationScan(f"{layer}.2.fc2", "output", "float16", 65504.0, 9_310.0, 0.13, 0, 0, 17, 2),
            ActivationScan(
                f"{layer}.2.activation_fn", "output", "float16", 65504.0, 4.1, 0.2, units=256, dead=Some(1, (17,))
            ),
        ),
        statistics=(
            StatisticsScan(
                "MEND", f"{layer}.2.fc2", "u", 256, 84.0, 1e-7, 0.31, Some(1, (17,), (0.0,)), layers=(f"{layer}.2.fc2",)
            ),
            StatisticsScan("MEND", f"{layer}.2.fc2", "v", 64, 84.0, 1e-7, 0.0021, tiny=Some(2, (4, 9), (1e-6, 2e-6))),
        ),
        rates=(RatesScan("MEND", "edit_lrs", (1.2e-4, 9.4e-5, -3.1e-5, 1.1e-4)),),
        moments=(
            MomentScan(
                "moments",
                f"{layer}.2.fc2",
                256,
                "float32",
                4_096.0,
                255,
                math.inf,
                -1e-9,
                88.0,
                zero_rows=Some(1, (17,)),
            ),
            MomentScan("projection", "null_space_project.pt[0]", 256, "float32", rank=212, idempotence=2e-6),
        ),
        precisions=(
            PrecisionScan("float16", 220_000, 0, 12, 1.8, 2.81, 40_000, 1_240, 0.0, 1.0),
            PrecisionScan("bfloat16", 220_000, 0, 0, 113.5, 114.9, 40_000, 38_720, 0.004, 0.97),
            PrecisionScan("float32", 220_000, 0, 0, 114.0, 115.0, 40_000, 0, 0.0, 1.0),
            PrecisionScan("float8_e4m3fn", 220_000, 3, 81_000, -5.4, error="this device has no float8"),
        ),
        capacities=(
            CapacityScan(f"{layer}.2.fc2", 3.2, 2.5, 4.0, 0.71, 8),
            CapacityScan(f"{layer}.1.fc2", 41.0, 22.0, 57.0, 0.42, 8),
            CapacityScan(f"{layer}.0.fc2", 118.0, 80.0, math.inf, 0.39, 8),
            CapacityScan(f"{layer}.3.fc2", math.inf, 1_024.0, math.inf, 0.4, 8),
        ),
        skipped={"optimizer.pt": "a pickle: say --pickle to read it"},
        sites=tuple(f"{layer}.{place}.fc2" for place in range(4)),
        model_type="blip-2",
        bytes=440_000,
        seconds=0.214,
        lost_nats=1.0,
    )
    second = f"{layer}.2.fc2"
    told = (
        Caution(
            "zero-rows",
            "note",
            f"{layer}.1.fc1.weight",
            f"5 of 256 outputs of {layer}.1.fc1 have weights of 0 throughout: rows 3, 9, 44, 60 and 1 more.",
            "Nothing, if they were pruned on purpose.",
        ),
        Caution(
            "float16",
            "risk",
            "",
            "The model is float16: a weight, an update or an activation over 65,504 ends it."
            f" Of its weights {second}.weight is nearest, 1.8 bits away.",
            "Load it in bfloat16 or float32.",
            "float16-limit",
        ),
        Caution(
            "near-overflow",
            "risk",
            f"{second}.weight",
            f"{second}.weight is 1.8 bits from overflow: its largest entry is 1.88e4, and float16 ends at 65,504.",
            "Load the model in bfloat16 or float32.",
            "dtype-overflow",
        ),
        Caution(
            "zero-spread",
            "fatal",
            second,
            f"Unit 17 of {second} has no spread in MEND’s statistics: its first input is divided by 1e-7.",
            "Make the statistics from more and other text, or raise the guard.",
            "normaliser-zero-std",
        ),
        Caution(
            "nonfinite-weight",
            "fatal",
            f"{layer}.3.fc1.weight",
            f"3 of 16,384 entries of {layer}.3.fc1.weight are not finite, first at (7, 12).",
            "Load the model from where it is sound: this one is broken before any edit.",
            "broken-before",
        ),
    )
    return scan, by_urgency(told)


def healthy() -> Told:
    held = tuple(decoder(dtype="float32", prefix="model.layers"))
    return Scan("GPT2LMHeadModel", "live", _counted(held), held, model_type="gpt2", bytes=880_000, seconds=0.08), ()


def empty() -> Told:
    return Scan("nothing", "folder"), ()


def large() -> Told:
    """200 layers of ten tensors."""
    held = tuple(decoder(200, "bfloat16", "model.layers"))
    told = [
        Caution("loud", URGENCIES[place % 3], each.name, f"{each.name} has rows out of line.", "Look at them.", "x")
        for place, each in enumerate(held)
        if place % 20 == 7
    ]
    return Scan("/m/large", "folder", _counted(held), held, seconds=94.1, bytes=140_000_000_000), by_urgency(told)


def hostile() -> Told:
    """Every injection wherever a name or a text may stand, and numbers that are none."""
    names = tuple(INJECTIONS.values())
    bad = (math.nan, math.inf, -math.inf, 0.0, 1e308)

    def odd(place: int) -> float:
        return bad[place % len(bad)]

    def some(place: int) -> Some:
        return Some(place, (place, -1), (odd(place), odd(place + 1)))

    held = tuple(
        TensorScan(
            f"layers.{place}.{name}" if place % 2 else name,
            name,
            (place, 3) if place % 3 else (),
            name if place % 2 else "float16",
            odd(place),
            None if place % 2 else odd(place),
            None if place % 2 else odd(place + 1),
            nonfinite=place,
            first_bad=(place,),
            zero_rows=some(place),
            loud_columns=some(place),
            worst_output=odd(place),
            spectral_norm=odd(place + 1),
            stable_rank=odd(place + 2),
            condition=odd(place + 3),
            is_site=bool(place % 2),
        )
        for place, name in enumerate(names)
    )
    each = list(enumerate(names))
    scan = Scan(
        names[0],
        names[1],
        {name: place for place, name in each},
        held,
        tuple(
            ActivationScan(n, n, n, odd(p), odd(p + 1), odd(p + 2), token=p, nonfinite=p, units=p, dead=some(p))
            for p, n in each
        ),
        tuple(
            StatisticsScan(n, n, n, p, odd(p), odd(p + 1), odd(p + 2), some(p), some(p), some(p), p, (n,))
            for p, n in each
        ),
        tuple(RatesScan(n, n, bad) for _, n in each),
        tuple(
            MomentScan(n, n, p, n, odd(p), p, odd(p + 1), odd(p + 2), odd(p), p, some(p), odd(p), odd(p + 1), n)
            for p, n in each
        ),
        tuple(
            PrecisionScan(n, p, p, p, odd(p), odd(p + 1), p, p, odd(p), odd(p), n if p % 2 else None) for p, n in each
        ),
        tuple(CapacityScan(n, odd(p), odd(p + 1), odd(p + 2), odd(p + 3), p) for p, n in each),
        {name: name for name in names},
        names,
        names[2],
        seconds=math.nan,
        lost_nats=math.nan,
    )
    told = (Caution(name, URGENCIES[place % 3], name, name, name, name) for place, name in each)
    return scan, by_urgency(told)


EVERY: Final = {"dying": dying, "healthy": healthy, "empty": empty, "large": large, "hostile": hostile}
