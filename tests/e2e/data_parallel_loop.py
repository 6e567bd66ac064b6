"""An edit loop under DistributedDataParallel, one process of it: run by `test_data_parallel.py` with torchrun.

Prints, as JSON, what plain torch and what the run say of the gradient of the first layer.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

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
    (folder / f"rank{rank}.json").write_text(json.dumps({"true": true, "told": told}), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
