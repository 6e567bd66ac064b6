"""What one watched weight costs, part by part: each against one read of the weight and against the bare C loop.

    python -m benchmarks.sites [--shape 768x3072] [--tokens 128] [--dtype float32] [--repeats N] [--markdown]

One thread, one process, CPU time. The caches are flushed before each part, and all parts are run in turn, so that what
the machine does besides meets all of them alike: medians, with 95% intervals of the ratios. The bare loop is the C
function that the weight pass calls, called alone: norm, drift, update, extremes and the copy into W₋ in one sweep.

The last rows are of whole edits: models of two and of six such layers, each edit moves all of them by hand, and what is
timed is all that a tier does at its end. The difference is what one more site costs there, the rest what any edit does:
its row, the analyzer, the transfer. The edit passes no layer, so that no hook has anything to catch.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from torch import Tensor, nn

import stabilitylab as sl
from benchmarks.overhead import machine, summary, write
from stabilitylab.probes.base import Tier
from stabilitylab.probes.gradient_factors import reduce_factors, reduce_size
from stabilitylab.probes.gram import lower_gram, norm_of_product
from stabilitylab.probes.native_scan import bare_sweep, weight_pass
from stabilitylab.probes.output_pass import reduce_output
from stabilitylab.probes.top_singular import follow, start_direction, update_direction
from stabilitylab.probes.weight_pass import reduce_weight, scan_weight
from stabilitylab.watching.instruments.transfer import Stack

READ, LOOP = "one read of W", "the bare C loop"
SITES: Final = (2, 6)
"""Layers of the two models that tell what one more site costs."""
TIERS: Final[tuple[Tier, ...]] = ("light", "default")
_FLUSH_BYTES: Final = 1 << 27
_HALF: Final = 2  # bytes an entry, of which there is no BLAS
_BASELINE: Final = 9
"""Edits before the first that counts: the analyzer's own baseline is eight."""
_DTYPES: Final = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
HEADER: Final = ("part", "ms", f"of {READ}", "95%", f"of {LOOP}", "95%")

Part = Callable[[], object]


@dataclass(frozen=True)
class Timed:
    """What is timed, and what puts everything back before that."""

    run: Part
    prepare: Part = lambda: None


def parts_of(shape: tuple[int, int], tokens: int, dtype: torch.dtype) -> dict[str, Timed]:
    """Everything that is done about a site of this shape, by name."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(*shape, generator=generator).to(dtype)
    weight = (first.float() + 1e-3 * torch.randn(*shape, generator=generator)).to(dtype)
    before, norm = first.clone(), first.double().norm()
    x = torch.randn(tokens, shape[1], generator=generator).to(dtype)
    delta = 1e-3 * torch.randn(tokens, shape[0], generator=generator).to(dtype)
    product = x.T @ delta
    output = torch.randn(1, tokens, shape[0], generator=generator).to(dtype)
    wide_x, wide_delta = x.float(), delta.float()
    _, direction = start_direction(weight)
    change = update_direction((weight.float() - first.float())[: max(1, 98_304 // shape[1])])
    packed, rebuild = reduce_factors(x, delta)
    host = packed.numpy()

    def transfer() -> None:
        stack = Stack()
        for at in range(12):
            stack.add(str(at), torch.zeros(7, dtype=torch.float64), lambda values: values)
        for one in stack.send().arrived:
            one.make()

    def unmoved() -> None:
        before.copy_(first)

    flat, largest = weight.view(-1), weight.abs().amax()
    loop = bare_sweep(weight, (first, before))
    return {
        READ: Timed((lambda: torch.dot(flat, flat)) if dtype.itemsize > _HALF else weight.sum),
        **({} if loop is None else {LOOP: Timed(loop, unmoved)}),
        "weight pass (default)": Timed(lambda: reduce_weight(weight, first, before, norm, True), unmoved),
        "weight pass, no rows kept": Timed(lambda: reduce_weight(weight, first, before, norm), unmoved),
        "weight scan (light)": Timed(lambda: scan_weight(weight)),
        "σ₁, followed": Timed(lambda: follow(weight, (direction, change), largest)),
        "output": Timed(lambda: reduce_output(output)),
        "gradient: norm alone, of the product that the backward has formed": Timed(
            lambda: reduce_size(x, delta, product)
        ),
        "gradient: norm alone, where it forms none": Timed(lambda: reduce_size(x, delta)),
        "– of that the Gram matrices, fp32": Timed(lambda: norm_of_product(wide_delta, wide_x)),
        "gradient: factors of the spectrum": Timed(lambda: reduce_factors(x, delta)),
        "– of that the Gram matrices, fp64": Timed(
            lambda: [lower_gram(each.double()) for each in (wide_x, wide_delta)]
        ),
        "gradient: decomposition": Timed(lambda: rebuild(host)),
        "12 measurements to the host": Timed(transfer),
    }


@functools.cache
def _far() -> Tensor:
    return torch.zeros(_FLUSH_BYTES // 4)


def _flush() -> None:
    """Fill the caches with something else."""
    _far().add_(1.0)


def timed(part: Timed) -> float:
    """CPU seconds, caches flushed."""
    part.prepare()
    _flush()
    started = time.process_time()
    part.run()
    return time.process_time() - started


def measure_parts(parts: dict[str, Timed], repeats: int) -> dict[str, list[float]]:
    """Seconds of each part, round by round; the first one warms up."""
    rounds = [{name: timed(part) for name, part in parts.items()} for _ in range(repeats + 1)][1:]
    return {name: [found[name] for found in rounds] for name in parts}


def edits_of(
    tier: Tier, sites: int, shape: tuple[int, int], dtype: torch.dtype, folder: Path, stack: ExitStack
) -> Callable[[], float]:
    """What makes an edit that moves each of so many weights by hand, and tells how many CPU seconds its end took."""
    layers = [nn.Linear(shape[1], shape[0], bias=False, dtype=dtype) for _ in range(sites)]
    monitor = stack.enter_context(sl.attach(nn.Sequential(*layers), "*", folder, probes=tier, trace=False))
    changes = [torch.randn_like(layer.weight) * 1e-4 for layer in layers]

    def edit() -> float:
        with monitor.edit() as edited, torch.no_grad():
            for layer, change in zip(layers, changes, strict=True):
                layer.weight.add_(change)
            _flush()
            started = time.process_time()
            edited.end(None)
            return time.process_time() - started

    return edit


def measure_edits(shape: tuple[int, int], dtype: torch.dtype, repeats: int, read: Timed) -> dict[str, list[float]]:
    """Seconds at an edit's end that one more site takes per tier, and those without any site; and those of a read."""
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        pairs = {
            tier: [edits_of(tier, n, shape, dtype, Path(scratch) / f"{tier}{n}", stack) for n in SITES]
            for tier in TIERS
        }
        for number in range(-_BASELINE, repeats):
            seconds = {READ: timed(read)}
            for tier, (few, many) in pairs.items():
                less, more = few(), many()
                each = (more - less) / (SITES[1] - SITES[0])
                seconds[f"{tier}: one more site, all of it"] = each
                seconds[f"{tier}: an edit of no site"] = less - each * SITES[0]
            for name, took in seconds.items():
                if number >= 0:
                    found.setdefault(name, []).append(took)
    return found


def row(name: str, seconds: Sequence[float], beside: Mapping[str, Sequence[float]]) -> dict[str, object]:
    """Milliseconds, and the ratios to what was measured in the same rounds."""
    ratios = {
        other: summary([own / theirs for own, theirs in zip(seconds, against, strict=True)])
        for other, against in beside.items()
    }
    return {"part": name, "ms": statistics.median(seconds) * 1e3, "ratios": ratios}


def table_of(seconds: dict[str, list[float]], edits: dict[str, list[float]]) -> list[dict[str, object]]:
    """All rows."""
    beside = {name: seconds[name] for name in (READ, LOOP) if name in seconds}
    rows = [row(name, values, beside) for name, values in seconds.items()]
    return rows + [row(name, values, {READ: edits[READ]}) for name, values in edits.items() if name != READ]


def cells(found: dict[str, object]) -> list[str]:
    """One line."""
    ratios: dict[str, dict[str, float | None]] = found["ratios"]  # type: ignore[assignment]
    line = [str(found["part"]), f"{found['ms']:.3f}"]
    for other in (READ, LOOP):
        ratio = ratios.get(other)
        if ratio is None or ratio["median"] is None:
            line += ["", ""]
            continue
        low, high = ratio["low"], ratio["high"]
        line += [f"{ratio['median']:.2f}", "–" if low is None or high is None else f"{low:.2f}–{high:.2f}"]
    return line


def show(rows: Sequence[dict[str, object]], title: str, markdown: bool) -> None:
    """The table, for a person or for the docs."""
    lines = [cells(found) for found in rows]
    if markdown:
        print(f"{title}\n")
        for line in (HEADER, ["---", *["---:"] * (len(HEADER) - 1)], *lines):
            print(f"| {' | '.join(line)} |")
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
    for at, name in enumerate(HEADER):
        table.add_column(name, justify="right" if at else "left")
    for line in lines:
        table.add_row(*line)
    Console().print(table, highlight=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", default="768x3072", help="of the weight (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=128, help="of the edit's batch (default: %(default)s)")
    parser.add_argument("--dtype", choices=_DTYPES, default="float32")
    parser.add_argument("--repeats", type=int, default=25, help="rounds (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    try:
        rows, columns = (int(side) for side in options.shape.split("x"))
    except ValueError:
        parser.error(f"--shape {options.shape}: expected rows x columns, such as 768x3072")
    if min(rows, columns, options.tokens, options.repeats) < 1:
        parser.error("expected a shape, tokens and repeats of 1 or more")
    torch.set_num_threads(1)
    dtype = _DTYPES[options.dtype]
    with threadpool_limits(1):
        parts = parts_of((rows, columns), options.tokens, dtype)
        seconds = measure_parts(parts, options.repeats)
        edits = measure_edits((rows, columns), dtype, options.repeats, parts[READ])
    found = table_of(seconds, edits)
    says = f"A weight of {rows}x{columns} in {options.dtype}, {options.tokens} tokens; weight pass: {weight_pass()}"
    show(found, says, options.markdown)
    if options.json:
        write(options.json, {"says": says, "rows": found, "machine": machine()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
