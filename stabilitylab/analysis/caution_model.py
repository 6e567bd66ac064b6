"""What a scan's figures of the model itself warn of: its weights, their dtypes, and what the canary made of them.

Where the limits come from:

- ``FEW_BITS``: four doublings; as the tracer arms itself by (`analysis.alertness`).
- ``NEAREST_FLOAT16``: 65,504, by IEEE 754-2019; a model in float16 is warned of whatever its weights, since activations
  and updates end there too.
- ``OUT_OF_LINE``: a matrix with ten times the norm of the same matrix in the other layers. Trained models differ by
  less than three from layer to layer; edits that went on too long leave more.
- ``MASSIVE_SIZE``, ``MASSIVE_TIMES``: an activation above 100 and above a thousand times the median one (Sun et al.,
  arXiv 2402.17762, §2).
- ``SUBNORMAL``: one in a hundred weights below float16's smallest normal value, where up to ten bits of it are lost.
- ``CONDITION``: 10⁷, see `analysis.limits`.
"""

from __future__ import annotations

import math
import re
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Final

from stabilitylab.analysis.caution import Caution
from stabilitylab.analysis.limits import CONDITION
from stabilitylab.analysis.words import listed, number
from stabilitylab.record.scanned import FLOATS, ActivationScan, Scan, TensorScan, norm_limit

FEW_BITS: Final = 4.0
OUT_OF_LINE: Final = 10.0
PEERS: Final = 4
MASSIVE_SIZE: Final = 100.0
MASSIVE_TIMES: Final = 1_000.0
SUBNORMAL: Final = 0.01
_NAMED: Final = 4
_MATRIX: Final = 2  # dimensions
_TABLES: Final = ("embed", "wte", "wpe", "lm_head", "word_emb", "shared", "position")
"""In the names of tables of tokens or positions, where a row of zeros is one that is never used."""
_BEGINS_AT_ZERO: Final = ("lora_B", "lora_embedding_B", "modules_to_save")
"""In the names of what is 0 before it is trained."""


def cautions(scan: Scan) -> Iterator[Caution]:
    """All of them, in the order of the model."""
    yield from _nonfinite(scan.tensors)
    yield from _negative_variances(scan.tensors)
    yield from _squares(scan.tensors)
    yield from _near_the_end(scan.tensors)
    yield from _float16(scan)
    yield from _bfloat16(scan)
    yield from _out_of_line(scan.tensors)
    yield from _zeros(scan.tensors)
    yield from _subnormal(scan.tensors)
    yield from _conditions(scan.tensors)
    yield from _loud(scan.tensors)
    yield from _answers(scan.activations)
    yield from _dead(scan.activations)
    yield from _massive(scan.activations)


def _nonfinite(tensors: Sequence[TensorScan]) -> Iterator[Caution]:
    for tensor in (each for each in tensors if each.nonfinite):
        is_weight = len(tensor.shape) == _MATRIX and tensor.name.endswith("weight")
        if tensor.masking == tensor.nonfinite and (tensor.is_buffer or not is_weight):
            yield Caution(
                "masks",
                "note",
                tensor.name,
                f"{tensor.name} holds −∞ in {number(tensor.nonfinite)} places, as masks do.",
                "Nothing, if it is a mask. It is counted so that it is not taken for harm later.",
            )
            continue
        at = f", first at {tensor.first_bad}" if tensor.first_bad is not None else ""
        yield Caution(
            "nonfinite-weight",
            "fatal",
            tensor.name,
            f"{number(tensor.nonfinite)} of {number(tensor.size)} entries of {tensor.name} are not finite{at}.",
            "Load the model from where it is sound: this one is broken before any edit.",
            "broken-before",
        )


def _negative_variances(tensors: Sequence[TensorScan]) -> Iterator[Caution]:
    for tensor in tensors:
        if tensor.name.endswith("running_var") and tensor.least is not None and tensor.least < 0:
            yield Caution(
                "negative-variance",
                "fatal",
                tensor.name,
                f"{tensor.name} is negative, {number(tensor.least)}: the root of a variance below 0 is NaN.",
                "Load the statistics from where they are sound, or gather them anew.",
                "broken-before",
            )


def _is_scaled(tensor: TensorScan) -> bool:
    """Weights in eight bits are scaled to the end of their range, by factors that are kept apart."""
    return tensor.dtype.startswith("float8")


def _squares(tensors: Sequence[TensorScan]) -> Iterator[Caution]:
    """What an input of ordinary size makes of it can't be squared in float32 any more."""
    for tensor in tensors:
        bits, worst = tensor.output_headroom_bits, tensor.worst_output
        if bits is None or worst is None or bits > 0 or tensor.nonfinite or _is_scaled(tensor):
            continue
        limit = norm_limit(tensor.dtype)
        if limit == FLOATS[tensor.dtype][0]:
            yield Caution(
                "output-overflows",
                "risk",
                tensor.name,
                f"{tensor.name} can make {number(worst)} of an input of RMS 1, and {tensor.dtype} ends at"
                f" {number(limit)}.",
                "Load the model in bfloat16 or float32.",
                "dtype-overflow",
            )
        else:
            yield Caution(
                "norm-overflows",
                "fatal",
                tensor.name,
                f"{tensor.name} makes up to {number(worst)} of an input of RMS 1: the next normalisation squares that,"
                f" and squares end at {number(limit)}.",
                "Load the model from where it is sound: weights of this size are what lost models have.",
                "broken-before",
            )


def _near_the_end(tensors: Sequence[TensorScan]) -> Iterator[Caution]:
    held = [each for each in tensors if not _is_scaled(each)]
    near = [(bits, each) for each in held if (bits := each.headroom_bits) is not None and bits < FEW_BITS]
    for bits, tensor in sorted(near, key=lambda pair: pair[0]):
        ends = FLOATS[tensor.dtype][0]
        yield Caution(
            "near-overflow",
            "risk",
            tensor.name,
            f"{tensor.name} is {bits:.1f} bits from overflow: its largest entry is {number(tensor.largest or 0.0)}, and"
            f" {tensor.dtype} ends at {number(ends)}.",
            "Load the model in bfloat16 or float32.",
            "dtype-overflow",
        )


def _float16(scan: Scan) -> Iterator[Caution]:
    half = [tensor for tensor in scan.tensors if tensor.dtype == "float16" and not tensor.is_buffer]
    if not half:
        return
    all_of_it = len(half) == sum(not tensor.is_buffer for tensor in scan.tensors)
    what = "The model" if all_of_it else _common(half) or "Part of the model"
    ends = number(FLOATS["float16"][0])
    nearest = min(half, key=lambda tensor: tensor.headroom_bits or math.inf)
    bits = nearest.headroom_bits
    held = (
        "" if bits is None or math.isinf(bits) else f" Of its weights {nearest.name} is nearest, {bits:.1f} bits away."
    )
    seen = [each for each in scan.activations if each.dtype == "float16" and each.headroom_bits is not None]
    if seen:
        worst = min(seen, key=lambda each: each.headroom_bits or math.inf)
        held += (
            f" Of the canary's activations the {worst.what} of {worst.layer} is, {worst.headroom_bits:.1f} bits away."
        )
    yield Caution(
        "float16",
        "risk",
        "",
        f"{what} is float16: a weight, an update or an activation over {ends} ends it.{held}",
        "Load it in bfloat16 or float32.",
        "float16-limit",
    )


def _common(tensors: Sequence[TensorScan]) -> str:
    """What their names begin with, all of them."""
    parts = [tensor.name.split(".")[:-1] for tensor in tensors]
    shared: list[str] = []
    for at_once in zip(*parts, strict=False):
        if len(set(at_once)) > 1:
            break
        shared.append(at_once[0])
    return ".".join(shared)


def _bfloat16(scan: Scan) -> Iterator[Caution]:
    sites = [tensor for tensor in scan.tensors if tensor.is_site]
    held = [tensor for tensor in (sites or scan.tensors) if tensor.dtype == "bfloat16" and not tensor.is_buffer]
    if held:
        yield Caution(
            "bfloat16",
            "note",
            "",
            f"{'What is edited' if sites else 'The model'} is bfloat16, which holds eight bits of a number: of a weight"
            " of 1, an update below 0.004 is rounded away.",
            "Edit in float32 if updates are small beside their weights; --precision tells what it would lose.",
            "update-absorbed",
        )


def _out_of_line(tensors: Sequence[TensorScan]) -> Iterator[Caution]:
    kinds: dict[tuple[str, tuple[int, ...]], list[TensorScan]] = defaultdict(list)
    for tensor in tensors:
        if len(tensor.shape) == _MATRIX and not tensor.nonfinite and not _is_scaled(tensor):
            kinds[re.sub(r"\.\d+\.", ".#.", tensor.name), tensor.shape].append(tensor)
    for peers in kinds.values():
        usual = statistics.median(tensor.norm for tensor in peers)
        if len(peers) < PEERS or usual == 0:
            continue
        for tensor in peers:
            if tensor.norm >= OUT_OF_LINE * usual:
                yield Caution(
                    "out-of-line",
                    "risk",
                    tensor.name,
                    f"The norm of {tensor.name} is {number(tensor.norm)}, {number(tensor.norm / usual)} times what it"
                    f" is in the other {len(peers) - 1} layers.",
                    "Make sure that this is the model as it was trained: edits that went on too long leave such"
                    " weights.",
                    "broken-before",
                )


def _zeros(tensors: Sequence[TensorScan]) -> Iterator[Caution]:
    for tensor in tensors:
        if tensor.nonfinite or len(tensor.shape) != _MATRIX or any(word in tensor.name for word in _BEGINS_AT_ZERO):
            continue
        if tensor.zeros == tensor.size:
            yield Caution(
                "zero-weight",
                "risk",
                tensor.name,
                f"{tensor.name} is zero throughout: its layer says nothing, and no gradient goes through it.",
                "Make sure that all files of the model were loaded.",
                "dead-logits",
            )
            continue
        if any(word in tensor.name.lower() for word in _TABLES):
            continue
        for some, says in ((tensor.zero_rows, "outputs"), (tensor.zero_columns, "inputs")):
            if some.count:
                of = tensor.shape[0] if says == "outputs" else tensor.shape[1]
                yield Caution(
                    f"zero-{says}",
                    "note",
                    tensor.name,
                    f"{number(some.count)} of the {number(of)} {says} of {tensor.name} have weights of exactly 0:"
                    f" {listed('unit', some.first[:_NAMED], some.count)}.",
                    "If they were pruned, nothing. An editor's statistics have no spread there, and divide by next to"
                    " nothing when an edit wakes them.",
                    "normaliser-zero-std",
                )


def _subnormal(tensors: Sequence[TensorScan]) -> Iterator[Caution]:
    matrices = (tensor for tensor in tensors if len(tensor.shape) == _MATRIX)
    held = [tensor for tensor in matrices if tensor.subnormal > SUBNORMAL * tensor.size]
    if held:
        worst = max(held, key=lambda tensor: tensor.subnormal / tensor.size)
        yield Caution(
            "subnormal",
            "note",
            worst.name,
            f"{worst.subnormal / worst.size:.0%} of the entries of {worst.name} are below float16's smallest normal"
            f" value and have lost bits already{f'; so in {len(held) - 1} more tensors' if len(held) > 1 else ''}.",
            "Load the model in bfloat16 or float32, from a file that holds it so.",
            "float16-limit",
        )


def _conditions(tensors: Sequence[TensorScan]) -> Iterator[Caution]:
    for tensor in tensors:
        if tensor.condition is not None and tensor.condition >= CONDITION:
            yield Caution(
                "weight-singular",
                "note",
                tensor.name,
                f"{tensor.name} has a condition of {number(tensor.condition)}: some directions of its input, or of its"
                " output, are lost in it.",
                "An edit that writes along such a direction is not like one of trained weights: compare its update with"
                " the others'.",
            )


def _loud(tensors: Sequence[TensorScan]) -> Iterator[Caution]:
    for tensor in tensors:
        if any(word in tensor.name.lower() for word in _TABLES):
            continue
        for some, says in ((tensor.loud_rows, "output"), (tensor.loud_columns, "input")):
            if some.count:
                more = f", and of {number(some.count - 1)} more" if some.count > 1 else ""
                yield Caution(
                    f"loud-{says}",
                    "note",
                    tensor.name,
                    f"{says.capitalize()} {some.first[0]} of {tensor.name} has weights {some.values[0]:.0f} times those"
                    f" of the median one{more}: a massive activation is likely made here.",
                    "Watch it apart: the largest value of the layer is this one's, and hides what edits do to the"
                    " rest.",
                )


def _answers(activations: Sequence[ActivationScan]) -> Iterator[Caution]:
    bad = [each for each in activations if each.nonfinite]
    if bad:
        first = bad[0]
        yield Caution(
            "nonfinite-activation",
            "fatal",
            first.layer,
            f"The canary's {first.what} of {first.layer} is not finite in {number(first.nonfinite)} entries, before any"
            " edit.",
            "Make sure that the canary is a batch that the model can answer, and that the model is sound.",
            "broken-before",
        )
    near = [each for each in activations if (bits := each.headroom_bits) is not None and bits < FEW_BITS]
    for found in sorted(near, key=lambda each: each.headroom_bits or 0.0)[:_NAMED]:
        ends = "its square overflows" if found.what == "input" else f"{found.dtype} ends"
        yield Caution(
            "activation-near-overflow",
            "risk",
            found.layer,
            f"On the canary, the {found.what} of {found.layer} reaches {number(found.largest or 0.0)}:"
            f" {found.headroom_bits:.1f} bits from {number(found.limit)}, where {ends}.",
            "Load the model in bfloat16 or float32.",
            "dtype-overflow",
        )


def _dead(activations: Sequence[ActivationScan]) -> Iterator[Caution]:
    for found in activations:
        if found.dead is not None and found.dead.count:
            yield Caution(
                "dead-units",
                "note",
                found.layer,
                f"{number(found.dead.count)} of {number(found.units)} units of {found.layer} are 0 on all of the"
                f" canary: {listed('unit', found.dead.first[:_NAMED], found.dead.count)}.",
                "Gather an editor's statistics on more and other text: a unit that was dead there has no spread, and is"
                " divided by next to nothing once it fires.",
                "normaliser-zero-std",
            )


def _massive(activations: Sequence[ActivationScan]) -> Iterator[Caution]:
    held = [
        each
        for each in activations
        if each.what == "output" and (each.largest or 0.0) > max(MASSIVE_SIZE, MASSIVE_TIMES * each.typical)
    ]
    if held:
        worst = max(held, key=lambda each: each.largest or 0.0)
        token = "" if worst.token is None else f" (token {worst.token})"
        others = len(held) - 1
        more = f" {number(others)} other {'layers have' if others > 1 else 'layer has'} one too." if others else ""
        yield Caution(
            "massive-activation",
            "note",
            worst.layer,
            f"On the canary, unit {worst.unit} of the output of {worst.layer} is {number(worst.largest or 0.0)} at"
            f" position {worst.position}{token}, {number((worst.largest or 0.0) / worst.typical)} times the median: a"
            f" massive activation.{more}",
            "Look at extremes without the first position too: this one is by design, and hides the rest.",
        )
