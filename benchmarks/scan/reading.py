"""What it costs to scan a folder, in time and in memory, beside reading it.

The folder is made for it: a decoder's weights in shards, random numbers, about a gigabyte. **Time**: a scan (of
weights alone, with nothing decomposed) over reading each tensor and forming its norm, in turns: *cold*, wall time with
the files dropped from the system's cache before each, as on a folder that was just fetched; *warm*, CPU time with the
files in memory, where reading is nearly free and the goal is not meant. **Memory**: in a process of its own, how far
the most resident memory lies above what was resident before, beside the largest tensor.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import stabilitylab as sl

GOAL_TIME: Final = 2.0
GOAL_MEMORY: Final = 2.0
_WIDTH, _HIDDEN, _WORDS = 1024, 4096, 32_000
_SHARD: Final = 6
"""Layers in a file."""

_MEMORY: Final = """
import gc, json, sys, threading, time
import torch
import stabilitylab as sl
torch.set_num_threads(1)
sl.scan(torch.nn.Linear(2, 2))  # whatever is imported on first use

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

before, most, running = resident(), 0, True
def watch():
    global most
    while running:
        most = max(most, resident())
        time.sleep(0.0005)

watcher = threading.Thread(target=watch)
watcher.start()
scanned = sl.scan(sys.argv[1])
running = False
watcher.join()
largest = max(tensor.size for tensor in scanned.figures.tensors) * int(sys.argv[2])
print(json.dumps({"above": most - before, "largest": largest}))
"""


def _layers(size: int, dtype: torch.dtype, generator: torch.Generator) -> Iterator[dict[str, Tensor]]:
    """The tensors of one file after the other, until there are `size` bytes."""

    def drawn(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) * 0.02).to(dtype)

    each = 2 if dtype != torch.float32 else 4
    yield {"model.embed_tokens.weight": drawn(_WORDS, _WIDTH)}
    made, layer = _WORDS * _WIDTH * each, 0
    while made < size:
        held = {}
        for _ in range(_SHARD):
            for name, shape in (
                *((f"self_attn.{part}_proj", (_WIDTH, _WIDTH)) for part in "qkvo"),
                ("mlp.gate_proj", (_HIDDEN, _WIDTH)),
                ("mlp.up_proj", (_HIDDEN, _WIDTH)),
                ("mlp.down_proj", (_WIDTH, _HIDDEN)),
            ):
                held[f"model.layers.{layer}.{name}.weight"] = drawn(*shape)
                made += shape[0] * shape[1] * each
            layer += 1
        yield held


def make_folder(folder: Path, size: int, dtype: torch.dtype, seed: int = 0) -> Path:
    """A folder of about `size` bytes, in shards, with its index."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    places: dict[str, str] = {}
    for number, held in enumerate(_layers(size, dtype, generator), 1):
        file = f"model-{number:05}.safetensors"
        save_file(held, folder / file)
        places |= dict.fromkeys(held, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


def read_and_norm(folder: Path) -> float:
    """The least that anything can do: read each tensor, form one norm."""
    total = 0.0
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                total += float(torch.linalg.vector_norm(opened.get_tensor(name).float()))
    return total


def _evict(folder: Path) -> None:
    """Drop the files from the system's cache."""
    os.sync()
    for file in folder.iterdir():
        handle = os.open(file, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def _seconds(work: Callable[[], object], clock: Callable[[], float]) -> float:
    began = clock()
    work()
    return clock() - began


def _times(made: Path, rounds: int, clock: Callable[[], float], before: Callable[[], None]) -> dict[str, float]:
    """Of a scan over that of reading and a norm, in turns."""
    pairs = []
    for _ in range(rounds):
        before()
        ours = _seconds(lambda: sl.scan(made), clock)
        before()
        pairs.append((ours, _seconds(lambda: read_and_norm(made), clock)))
    ratios = sorted(ours / theirs for ours, theirs in pairs)
    return {
        "scan_seconds": statistics.median(ours for ours, _ in pairs),
        "read_and_norm_seconds": statistics.median(theirs for _, theirs in pairs),
        "ratio": statistics.median(ratios),
        "ratio_low": ratios[0],
        "ratio_high": ratios[-1],
    }


def measure(folder: Path, size: int, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Time and memory of one folder of a dtype, which is made and removed again."""
    torch.set_num_threads(1)
    made = make_folder(folder / str(dtype), size, dtype)
    cold = _times(made, rounds, time.perf_counter, lambda: _evict(made))
    warm = _times(made, rounds, time.process_time, lambda: None)
    bytes_each = str(torch.empty(0, dtype=dtype).element_size())
    answer = subprocess.run(
        [sys.executable, "-c", _MEMORY, str(made), bytes_each], capture_output=True, text=True, check=True
    )
    memory = json.loads(answer.stdout)
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "bytes": sum(file.stat().st_size for file in made.glob("*.safetensors")),
        "cold": cold,
        "warm": warm,
        "memory_above": memory["above"],
        "largest_tensor": memory["largest"],
        "memory_ratio": memory["above"] / memory["largest"],
    }
