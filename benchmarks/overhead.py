"""What watching costs: CPU time of an edit with the default probes, as a ratio to the same edit without.

    python benchmarks/overhead.py [--pairs 15] [--json FILE]

The workload is one fine-tuning edit (forward, backward, SGD step in place) of a model of GPT-2-small's shape with
random weights, editing c_fc and c_proj of its last three blocks, on one thread. Plain and watched edits alternate pair
by pair within one process, and each pair has a third, plain edit: plain against plain (A/A) shows what the machine's
noise alone makes of the ratio. Plain and watched edits have a model each, of the same weights: a watched loop whose
weights something else moves between edits would pay for noticing it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import GPT2Config, GPT2LMHeadModel

import stabilitylab as sl

EDITED = ("transformer.h.9.", "transformer.h.10.", "transformer.h.11.")


def make_model() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config()).eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(EDITED) and ".mlp.c_" in name and name.endswith("weight"))
    return model


def make_edit(model: GPT2LMHeadModel, batch: int, tokens: int) -> Callable[[], None]:
    ids = torch.randint(0, model.config.vocab_size, (batch, tokens))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def edit() -> None:
        loss = model(input_ids=ids, labels=ids).loss
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.sub_(gradient, alpha=1e-4)

    return edit


def cpu_seconds(action: Callable[[], None]) -> float:
    start = time.process_time()
    action()
    return time.process_time() - start


def measure(batch: int, tokens: int, pairs: int, folder: Path, console: Console) -> dict[str, list[float]]:
    """Ratios per pair: ``default`` (watched to plain) and ``a_a`` (plain to plain)."""
    model = make_model()
    edit, same_edit = make_edit(make_model(), batch, tokens), make_edit(model, batch, tokens)
    ratios: dict[str, list[float]] = {"default": [], "a_a": []}
    names = [f"transformer.h.{block}.mlp.{layer}" for block in (9, 10, 11) for layer in ("c_fc", "c_proj")]
    with sl.attach(model, names, folder) as monitor:

        def watched() -> None:
            with monitor.edit():
                same_edit()

        for action in (edit, watched, edit, watched):
            action()  # warm-up
        for pair in track(range(pairs), "edits", console=console, disable=not console.is_terminal):
            order = (edit, watched, edit) if pair % 2 else (edit, edit, watched)
            plain, *rest = (cpu_seconds(action) for action in order)
            watched_at = 0 if pair % 2 else 1
            ratios["default"].append(rest[watched_at] / plain)
            ratios["a_a"].append(rest[1 - watched_at] / plain)
    ratios["probe_time_share"] = [sl.load(folder).probe_time_share or 0.0]
    return ratios


def summary(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "pairs": len(values)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as scratch:
        ratios = measure(options.batch, options.tokens, options.pairs, Path(scratch) / "run", console)
    found = {name: summary(values) for name, values in ratios.items()}
    table = Table("ratio of CPU time", "median", "min", "max", "pairs")
    for name in ("default", "a_a"):
        row = found[name]
        table.add_row(name, *(f"{row[key]:.3f}" for key in ("median", "min", "max")), str(row["pairs"]))
    Console().print(table)
    print(f"share of the edit's time inside probes: {found['probe_time_share']['median']:.1%}")
    if options.json:
        options.json.write_text(json.dumps({"workloads": {"gpt2": found}}, indent=2, allow_nan=False))


if __name__ == "__main__":
    sys.exit(main())
