"""An edit loop under DistributedDataParallel, one process of it: run by `test_data_parallel.py` with torchrun.

Writes, as JSON, what plain torch and what the run say of the gradient of the first layer, what the tracer said, and a
digest of what is computed with the tracer, without it, and without any monitor.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import stabilitylab as sl

LAYER = "module.0"


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(parallel.parameters(), 0.1)
    run, true = folder / f"rank{rank}", []
    with sl.attach(parallel, sites=LAYER, run=run) as monitor:
        for edit in range(3):
            with monitor.edit():
                x = torch.randn(4, 8, generator=torch.Generator().manual_seed(10 * edit + rank))
                optimizer.zero_grad()
                parallel(x).pow(2).mean().backward()
                gradient = model[0].weight.grad
                assert gradient is not None
                true.append(gradient.norm().item())
                nn.utils.clip_grad_norm_(parallel.parameters(), 0.05)
                optimizer.step()
    told = sl.load(run).series("gradient.norm", LAYER)[1:].tolist()
    digests = {str(trace): traced(folder, rank, trace) for trace in (None, False, True)}
    found = sl.load(folder / f"traced{rank}True")
    said = {
        "true": true,
        "told": told,
        "digests": digests,
        "traced": found.trace_time_share,
        "off": [note.says for note in found.notes if note.kind == "trace-off"],
        "operations": [(each.operator, each.place.source, each.made, each.edit) for each in found.operations],
    }
    (folder / f"rank{rank}.json").write_text(json.dumps(said), encoding="utf-8")
    dist.destroy_process_group()


def traced(folder: Path, rank: int, trace: bool | None) -> str:
    """A digest of the weights and gradients that a loop leaves. In its last edit rank 1 makes a NaN, and all get it."""
    torch.manual_seed(1)
    parallel = DistributedDataParallel(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)))
    optimizer = torch.optim.Adam(parallel.parameters(), 0.01)
    digest, monitor = hashlib.sha256(), None
    if trace is not None:
        monitor = sl.attach(parallel, LAYER, folder / f"traced{rank}{trace}", trace=trace, announce=False)
    for edit in range(3):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(10 * edit + rank))
        around: Any = contextlib.nullcontext() if monitor is None else monitor.edit()
        with around:
            optimizer.zero_grad()
            loss = parallel(x).pow(2).mean()
            if edit == 2 and rank == 1:
                loss = loss * ((x - x).sum().log() * 0)
            loss.backward()
            optimizer.step()
        for parameter in parallel.parameters():
            assert parameter.grad is not None
            for tensor in (parameter.detach(), parameter.grad):
                digest.update(tensor.nan_to_num(nan=7.0).numpy().tobytes())
    if monitor is not None:
        monitor.close()
    return digest.hexdigest()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
