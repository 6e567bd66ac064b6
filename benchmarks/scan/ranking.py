"""Is the ranking of layers by capacity true? Beside the edits that each layer takes alone until the canary is lost.

    python -m benchmarks.scan.ranking [--seeds 3] [--layers 8] [--norm layer|rms] [--json FILE]

Decoders of several layers (`benchmarks.wild.decoder`), two norms and some seeds. For each MLP's second matrix: its
capacity, from dry edits of eight requests, and *edits to loss*: other requests edited one on top of the other at that
matrix alone, until the canary is `KL_COLLAPSED` nats from what it was; the geometric mean of two streams. Between the
two Spearman's rank correlation over the layers, and the share of pairs that are in the same order, for three editors: a
gradient step of fixed norm, Adam on one edit until it is learned, and a rank-one update at the subject.

Beside the capacity along single updates: along the sum of all dry updates; by size alone, ‖W‖ / ‖Δ‖, without a canary;
and the two streams' agreement with one another, above which no prediction can be expected.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any, Final, get_args

import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr
from torch import nn

from benchmarks.overhead import machine
from benchmarks.wild.decoder import Decoder, Fact, Norm, Settings, answered, canary, decoder, requests, true_facts
from benchmarks.wild.editing import backward, keys_of, moments, on, wanted_change, weights_of
from stabilitylab.acting.scanning.answers import original_of
from stabilitylab.acting.scanning.capacity import capacities
from stabilitylab.acting.scanning.dry import Updates, dry_updates
from stabilitylab.analysis.findings import json_safe
from stabilitylab.analysis.limits import KL_COLLAPSED
from stabilitylab.editors.finetune import Finetune

GOAL: Final = 0.7
DRY: Final = 8
MOST: Final = 100
"""Edits of a stream; a layer that survives them all is given this number."""
STREAMS: Final = (1, 2)
_SHARE: Final = 1.0
"""Norm of a gradient step, of the layer's own: with half of it most layers survive their streams."""
_RIDGE: Final = 1e-2

Apply = Callable[[nn.Module, Any], object]
Maker = Callable[[Decoder, int], Apply]
"""Makes the editor of one layer, from the unedited model and the layer's number."""


def gradient(model: Decoder, number: int) -> Apply:
    """A step of fixed norm down the gradient."""
    site = down(number)
    size = _SHARE * float(weights_of(model, [site])[site].detach().norm())

    def apply(edited: nn.Module, fact: Fact) -> nn.Module:
        backward(edited, on([fact]))
        weight = weights_of(edited, [site])[site]
        assert weight.grad is not None
        with torch.no_grad():
            weight.sub_(size * weight.grad / weight.grad.norm())
        edited.zero_grad()
        return edited

    return apply


def finetune(model: Decoder, number: int) -> Apply:
    """The package's FT."""
    return Finetune([down(number)], batch_of=lambda fact: answered([fact])).edit


def rank_one(model: Decoder, number: int) -> Apply:
    """One value at one key: ROME's formula."""
    known = moments(model, model.stack[number], true_facts())
    known = known + _RIDGE * known.diagonal().mean() * torch.eye(len(known))

    def apply(edited: nn.Module, fact: Fact) -> nn.Module:
        assert isinstance(edited, Decoder)
        layer = edited.stack[number]
        change = wanted_change(edited, layer, fact)[0]
        with torch.no_grad():
            key = keys_of(edited, layer, torch.tensor([fact.words[:-1]]))[0]
            direction = torch.linalg.solve(known, key)
            layer.mlp.fc2.weight += torch.outer(change / (direction @ key), direction)
        return edited

    return apply


EDITORS: Final[Mapping[str, Maker]] = {"gradient": gradient, "finetune": finetune, "rank-one": rank_one}


def down(number: int) -> str:
    """The second matrix of a layer's MLP."""
    return f"layers.{number}.mlp.fc2"


@dataclass(frozen=True)
class Layer:
    """One layer: what was predicted of it, in edits, and what it took. along_sum: the step along the sum of the dry
    updates, times their number. by_size: ‖W‖ / ‖Δ‖. edits: of each stream.
    """

    site: str
    capacity: float
    along_sum: float
    by_size: float
    edits: tuple[int, ...]

    @property
    def taken(self) -> float:
        """Geometric mean over the streams."""
        return math.exp(fmean(map(math.log, self.edits)))


def measure(model: Decoder, maker: Maker, number: int) -> Layer | None:
    """Predict and measure one layer; None where no edit moves it: what the last layer says at a subject is not read."""
    site = down(number)
    everything = requests(MOST + DRY)
    tried = copy.deepcopy(model)
    updates = dry_updates(tried, maker(tried, number), everything[MOST:], sites=site)
    ((key, each),) = updates.items()
    if not each:
        return None
    weight = weights_of(model, [site])[site].detach()
    return Layer(
        site,
        _capacity(tried, updates),
        _capacity(tried, {key: (torch.stack(each).sum(dim=0),)}) * len(each),
        float(weight.norm()) / median(float(update.norm()) for update in each),
        tuple(edits_to_loss(model, maker, number, _stream(everything[:MOST], seed)) for seed in STREAMS),
    )


def _capacity(model: Decoder, updates: Updates) -> float:
    (found,) = capacities(model, original_of(model, canary()), updates, limit=KL_COLLAPSED)
    return found.steps


def _stream(facts: Sequence[Fact], seed: int) -> list[Fact]:
    return random.Random(seed).sample(facts, len(facts))


def edits_to_loss(model: Decoder, maker: Maker, number: int, stream: Sequence[Fact]) -> int:
    """Edits of one layer, one on top of the other, until the canary is lost; all of the stream where it is not."""
    edited = copy.deepcopy(model)
    original, apply = original_of(edited, canary()), maker(edited, number)
    for done, fact in enumerate(stream, 1):
        apply(edited, fact)
        if original.distance_of(edited).is_lost(KL_COLLAPSED):
            return done
    return len(stream)


def _rho(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's; NaN where all of one are the same."""
    if len(set(one)) == 1 or len(set(other)) == 1:
        return math.nan
    return float(spearmanr(one, other).statistic)


def concordance(one: Sequence[float], other: Sequence[float]) -> float:
    """Of the pairs that differ in `other`, the share that `one` puts in the same order; ties in `one` count half.

    Harrell's C (1982), for values that were cut off: layers that all survived don't lower it, as they do Spearman's ρ.
    NaN where no pair differs.
    """
    pairs = [(a, b) for a in range(len(one)) for b in range(len(one)) if other[a] < other[b]]
    right = sum(1.0 if one[a] < one[b] else 0.5 if one[a] == one[b] else 0.0 for a, b in pairs)
    return right / len(pairs) if pairs else math.nan


def summary(layers: Sequence[Layer]) -> dict[str, float]:
    """Rank correlations with the edits that were taken."""
    taken = [layer.taken for layer in layers]
    return {
        "capacity": _rho([layer.capacity for layer in layers], taken),
        "concordance": concordance([layer.capacity for layer in layers], taken),
        "along_sum": _rho([layer.along_sum for layer in layers], taken),
        "by_size": _rho([layer.by_size for layer in layers], taken),
        "streams": _rho(*([layer.edits[n] for layer in layers] for n in range(len(STREAMS)))),
        "least_edits": min(min(layer.edits) for layer in layers),
        "survived": sum(max(layer.edits) == MOST for layer in layers),
    }


def run(norms: Sequence[Norm], seeds: int, depth: int, tell: Callable[[str], None]) -> list[dict[str, Any]]:
    """All models and editors."""
    rows: list[dict[str, Any]] = []
    for seed in range(seeds):
        for norm in norms:
            model = decoder(Settings(norm=norm, layers=depth, seed=seed))
            for name, maker in EDITORS.items():
                measured = [measure(model, maker, number) for number in range(depth)]
                layers = [layer for layer in measured if layer is not None]
                rows.append({"norm": norm, "seed": seed, "editor": name, **summary(layers)})
                tell(json.dumps(json_safe(rows[-1])))
                rows[-1]["layers"] = [asdict(layer) for layer in layers]
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """A line for each model and editor, and the medians."""
    measured = ("capacity", "concordance", "along_sum", "by_size", "streams", "least_edits", "survived")
    found = Table(title="Spearman's ρ with edits to loss", title_justify="left")
    for name in ("model", "editor", *measured):
        found.add_column(name, justify="left" if name in {"model", "editor"} else "right")
    for row in rows:
        found.add_row(f"{row['norm']}, seed {row['seed']}", row["editor"], *(f"{row[name]:.2f}" for name in measured))
    for editor in dict.fromkeys(row["editor"] for row in rows):
        own = [row for row in rows if row["editor"] == editor]
        found.add_row("median", editor, *(f"{median(row[name] for row in own):.2f}" for name in measured))
    return found


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="models of each norm")
    parser.add_argument("--norm", choices=get_args(Norm), action="append", help="this one alone")
    parser.add_argument("--layers", type=int, default=8, help="of each model")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    out = Console()
    rows = run(options.norm or get_args(Norm), options.seeds, options.layers, out.print)
    out.print(table(rows), f"goal: ρ ≥ {GOAL:g}")
    if options.json is not None:
        document = {"machine": machine(), "ranking": rows}
        options.json.write_text(json.dumps(json_safe(document), indent=2, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
