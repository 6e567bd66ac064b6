"""What watching costs on a GPU: a random model of Llama-2-7B's shape in bf16, one step of fine-tuning an edit.

    python -m benchmarks.gpu [--sites 10 50] [--edits 20] [--layers 32] [--width 4096] [--device cuda]

For each number of sites: seconds to attach, the device's and the host's peak beyond the unwatched loop, milliseconds an
edit with and without, and how often torch says that an edit waited for the device. **It was never run on a GPU**; with
``--device cpu --layers 2 --width 64`` it can be tried on a machine without one, where nothing waits.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import resource
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import stabilitylab as sl

TOKENS, WARM_UP = 128, 3
_MATRICES = ("down_proj", "up_proj", "gate_proj")
_MIB = 1 << 20


@dataclass(frozen=True)
class Loop:
    """One loop of edits. attach: seconds. edit: median milliseconds. device, host: peaks in MiB. waits: all edits'."""

    attach: float
    edit: float
    device: float
    host: float
    waits: int


def llama(layers: int, width: int, device: torch.device) -> nn.Module:
    """Of Llama-2-7B's proportions, with random weights, made on the device."""
    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=width * 43 // 16,
        num_attention_heads=max(1, width // 128),
        num_key_value_heads=max(1, width // 128),
    )
    with device:
        torch.set_default_dtype(torch.bfloat16)
        try:
            model: nn.Module = LlamaForCausalLM(config)
            return model.train(False).requires_grad_(False)
        finally:
            torch.set_default_dtype(torch.float32)


def sites_of(layers: int, count: int) -> list[str]:
    """The first so many matrices of MLPs, kind by kind."""
    named = [f"model.layers.{layer}.mlp.{kind}" for kind, layer in itertools.product(_MATRICES, range(layers))]
    return named[:count]


def host_peak() -> float:
    """The most memory of the host that this process ever had, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@contextlib.contextmanager
def waits_counted(device: torch.device) -> Iterator[list[Any]]:
    """What torch warns of inside: each wait for the device."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield caught
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")


def run(model: nn.Module, sites: list[str], edits: int, device: torch.device, folder: Path | None) -> Loop:
    """folder: of the run; None for the unwatched loop."""
    weights = [model.get_submodule(name).weight for name in sites]
    for weight in weights:
        weight.requires_grad_(True)
    optimizer = torch.optim.SGD(weights, 1e-3)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 32_000, (edits + WARM_UP, 1, TOKENS), generator=generator).to(device)
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    host, began = host_peak(), time.perf_counter()
    monitor = None if folder is None else sl.attach(model, sites, folder, announce=False, trace=False)
    if device.type == "cuda":
        torch.cuda.synchronize()
    attach, times, waits = time.perf_counter() - began, [], 0
    for number, tokens in enumerate(ids):
        began = time.perf_counter()
        with waits_counted(device) as caught, contextlib.nullcontext() if monitor is None else monitor.edit():
            optimizer.zero_grad()
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if number >= WARM_UP:
            times.append(1000 * (time.perf_counter() - began))
            waits += sum("synchroniz" in str(each.message) for each in caught)
    peak = torch.cuda.max_memory_allocated() / _MIB if device.type == "cuda" else 0.0
    used = host_peak() - host
    if monitor is not None:
        monitor.close()
    optimizer.zero_grad()
    for weight in weights:
        weight.requires_grad_(False)
    return Loop(attach, statistics.median(times), peak, used, waits)


def main() -> None:
    """Measure, and show the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, nargs="+", default=[10, 50])
    parser.add_argument("--edits", type=int, default=20)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--device", default="cuda")
    asked = parser.parse_args()
    device = torch.device(asked.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here; --device cpu --layers 2 --width 64 tries the script itself")
    model = llama(asked.layers, asked.width, device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    size = sum(each.numel() for each in model.parameters()) / 1e9
    table = Table(title=f"{size:.2f} billion parameters in bf16 on {name}, {TOKENS} tokens an edit")
    columns = ("sites", "attach", "device, more", "host, more", "ms an edit", "watched", "waits an edit", "without")
    for column in columns:
        table.add_column(column, justify="right")
    for count in asked.sites:
        sites = sites_of(asked.layers, count)
        bare = run(model, sites, asked.edits, device, None)
        with tempfile.TemporaryDirectory() as folder:
            watched = run(model, sites, asked.edits, device, Path(folder) / "run")
        table.add_row(
            str(len(sites)),
            f"{watched.attach:.1f} s",
            f"{watched.device - bare.device:,.0f} MiB",
            f"{watched.host - bare.host:,.0f} MiB",
            f"{bare.edit:.1f}",
            f"{watched.edit:.1f}",
            f"{watched.waits / asked.edits:.1f}",
            f"{bare.waits / asked.edits:.1f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
