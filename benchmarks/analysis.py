"""What the analysis costs: online as a share of an edit, and offline in seconds, for a run of many edits and sites.

    python -m benchmarks.analysis [--edits N] [--sites N] [--json FILE]

The run is made up: every metric that the default probes emit, at each site (those of the model as a whole once), with
noise of 10% around what a healthy run shows. Three kinds are measured:

- ``quiet``: just that.
- ``growing``: updates, activations and gradients of every site grow by 2% per edit from the middle of the run on, so
  that trends are fitted at every site.
- ``sparse``: like ``quiet``, but the canary is read every 5 edits and the spectra every 10, so that rows differ in
  which readings they hold.

Online is the CPU time of taking a row in and of the diagnosis after it, as the monitor asks for both at each edit: the
mean over all edits. Offline is `load` and `Run.diagnosis`, in CPU and in wall time. All on one thread.

The edit that the online share is of is that of a GPT-2-small-shaped model in the same process: Adam fine-tuning of one
MLP's two matrices, 25 steps as EasyEdit's FT takes, 32 tokens.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, TypeVar

import numpy as np
import torch
from torch import nn

from stabilitylab.analysis.analyzer import Analyzer
from stabilitylab.probes.registry import probes_of
from stabilitylab.record.readings import MODEL_SITE, EditRow, Key, Metric
from stabilitylab.record.run import load
from stabilitylab.record.store import RunWriter

WIDTH, INNER, TOKENS, STEPS = 768, 3072, 32, 25
KINDS: Final = ("quiet", "growing", "sparse")
OF_THE_MODEL: Final = ("canary", "logits", "attention")
"""Families of metrics that are read once, not at each site."""
GROWING: Final = ("update.norm", "update.ratio", "activation.rms", "activation.max_abs", "gradient.norm")
EVERY: Final = {"canary": 5, "spectrum": 10, "stable_rank": 10, "effective_rank": 10, "top_share": 10}
"""In a sparse run: every how many edits the metrics of this family or last name are read."""
USUAL: Final = {
    "update.norm": 0.01,
    "update.ratio": 1e-4,
    "drift.norm": 0.1,
    "drift.ratio": 1e-3,
    "weight.norm": 100.0,
    "canary.kl": 1e-3,
    "canary.agreement": 1.0,
    "canary.perplexity": 20.0,
    "canary.perplexity_ratio": 1.0,
    "editor.denominator_ratio": 0.5,
    "editor.null_space_share": 0.9,
    "editor.clamp_hits": 1.0,
    "logits.passes": 25.0,
}
USUAL_LAST: Final = {"headroom_bits": 100.0, "norm_headroom_bits": 50.0, "min": -5.0, "swallowed_share": 0.01}
"""By the last part of a metric's name."""
ZERO: Final = (
    "nonfinite",
    "dead",
    "nonfinite_passes",
    "masked_rows",
    "masked_sequences",
    "std_zeros",
    "no_spread",
    "dead_share",
)
ZERO_BEFORE: Final = (
    "editor.keys",
    "editor.cache_energy",
    "editor.side_drift",
    "update.norm",
    "update.ratio",
    "drift.norm",
)
"""Also zero at edit 0, when nothing was edited yet."""
OTHERWISE: Final = 3.0
STEADY: Final = (
    "editor.std_min",
    "editor.seen_rows",
    "editor.learning_rate",
    "editor.null_space_share",
    "logits.passes",
)
"""What is the same at every edit."""
Returned = TypeVar("Returned")


def usual(metric: str) -> float:
    """What a healthy run shows."""
    last = metric.rpartition(".")[2]
    return 0.0 if last in ZERO else USUAL.get(metric, USUAL_LAST.get(last, OTHERWISE))


def is_read(metric: str, kind: str, edit: int) -> bool:
    """Whether a run of this kind reads a metric at an edit."""
    family, _, last = metric.partition(".")
    return kind != "sparse" or edit % EVERY.get(family, EVERY.get(last, 1)) == 0


def rows_of(kind: str, edits: int, sites: int, metrics: tuple[Metric, ...]) -> Iterator[EditRow]:
    """The rows of a run, edit 0 first."""
    draw = np.random.default_rng([KINDS.index(kind), edits, sites])
    names = [f"transformer.h.{site // 2}.mlp.{('c_fc', 'c_proj')[site % 2]}" for site in range(sites)]
    keys: list[tuple[Key, int]] = [
        ((metric.name, site), metric.length)
        for metric in metrics
        for site in ((MODEL_SITE,) if metric.name.startswith(OF_THE_MODEL) else names)
    ]
    middles = np.array([usual(metric) for (metric, _), _ in keys])
    grows = np.array([kind == "growing" and metric.startswith(GROWING) for (metric, _), _ in keys])
    spread = np.array([0.0 if metric in STEADY else 0.1 for (metric, _), _ in keys])
    for edit in range(edits + 1):
        noise = np.exp(spread * draw.standard_normal(len(keys)) + 0.02 * grows * max(edit - edits // 2, 0))
        values = np.where(middles == 1.0, np.minimum(noise, 1.0), middles * noise)
        readings = {
            key: np.full(length, 0.0 if edit == 0 and key[0] in ZERO_BEFORE else value)
            for (key, length), value in zip(keys, values, strict=True)
            if is_read(key[0], kind, edit)
        }
        yield EditRow(edit, f"edit {edit}", "applied" if edit else "start", 0.0, 1.0, 0.01, 0.0, readings=readings)


def edit_seconds() -> float:
    """CPU seconds of one edit."""
    model = nn.Sequential(
        *[nn.Sequential(nn.Linear(WIDTH, INNER), nn.GELU(), nn.Linear(INNER, WIDTH)) for _ in range(12)]
    )
    model.requires_grad_(False)
    edited = list(model[6].requires_grad_(True).parameters())
    optimiser, inputs = torch.optim.Adam(edited, lr=1e-5), torch.randn(TOKENS, WIDTH)
    began = time.process_time()
    for _ in range(STEPS):
        optimiser.zero_grad()
        model(inputs).square().mean().backward()
        optimiser.step()
    return time.process_time() - began


def timed(work: Callable[[], Returned]) -> tuple[Returned, float, float]:
    """(what it returned, CPU seconds, wall seconds)."""
    cpu, wall = time.process_time(), time.perf_counter()
    returned = work()
    return returned, time.process_time() - cpu, time.perf_counter() - wall


def measure(kind: str, edits: int, sites: int) -> dict[str, float | str]:
    """Verdict and times of one run."""
    metrics = tuple(metric for probe in probes_of("default") for metric in probe.metrics)
    with tempfile.TemporaryDirectory() as folder:
        writer = RunWriter(Path(folder) / "run", {}, metrics)
        analyzer, online, readings = Analyzer(metrics), 0.0, 0
        for row in rows_of(kind, edits, sites, metrics):
            began = time.process_time()
            analyzer.observe(row)
            analyzer.diagnosis()
            online += time.process_time() - began
            writer.append(row)
            readings = max(readings, len(row.readings))
        writer.close()
        run, load_cpu, load_wall = timed(lambda: load(Path(folder) / "run"))
        diagnosis, cpu, wall = timed(run.diagnosis)
    return {
        "verdict": diagnosis.verdict,
        "readings": readings,
        "online_ms": 1e3 * online / edits,
        "load_cpu_s": load_cpu,
        "load_wall_s": load_wall,
        "diagnosis_cpu_s": cpu,
        "diagnosis_wall_s": wall,
    }


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edits", type=int, default=1000)
    parser.add_argument("--sites", type=int, default=50)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    seconds = float(np.median([edit_seconds() for _ in range(5)]))
    found = {kind: measure(kind, arguments.edits, arguments.sites) for kind in KINDS}
    print(
        f"{arguments.edits} edits, {arguments.sites} sites; one edit: {seconds:.2f} CPU s. Offline: CPU s (wall s).\n"
    )
    print("| run | verdict | readings | online, ms an edit | of an edit | load | diagnosis | both |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for kind, of in found.items():
        of["online_share_of_edit"] = float(of["online_ms"]) / 1e3 / seconds
        cpu, wall = ([float(of[f"{what}_{clock}_s"]) for what in ("load", "diagnosis")] for clock in ("cpu", "wall"))
        offline = (f"{c:.2f} ({w:.2f})" for c, w in zip((*cpu, sum(cpu)), (*wall, sum(wall)), strict=True))
        online = f"{of['online_ms']:.2f} | {of['online_share_of_edit']:.2%}"
        print(f"| {kind} | {of['verdict']} | {of['readings']} | {online} | {' | '.join(offline)} |")
    if arguments.json:
        measured = {"edits": arguments.edits, "sites": arguments.sites, "edit_cpu_s": seconds, "runs": found}
        arguments.json.write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
