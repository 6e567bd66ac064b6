"""Edit loops over weights that are spread over processes, one process of them: run by `test_spread_models.py`.

Writes, as JSON, what each process knows; process 0 makes the same loop once more on a plain model.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

import stabilitylab as sl
from stabilitylab.errors import StabilityLabError
from stabilitylab.watching import company
from stabilitylab.watching.instruments import exchange
from stabilitylab.watching.instruments.transfer import Shipment
from stabilitylab.watching.monitor import Monitor

EDITS, BATCH = 4, 8
CANARY = {"input": torch.linspace(-1, 1, 3 * 24).reshape(3, 24)}


def plain() -> nn.Sequential:
    """Three rows fewer than four processes could share: one of them holds nothing of the last layer."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 33), nn.ReLU(), nn.Linear(33, 3))


def sharded(mesh: DeviceMesh) -> nn.Sequential:
    model = plain()
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def flattened(model: nn.Module, original: bool = True) -> nn.Module:
    """By FSDP1. original: whether the parameters are still there, each as its piece."""
    made: nn.Module = FullyShardedDataParallel(model, use_orig_params=original, device_id=torch.device("cpu"))
    return made


def evaluate(model: nn.Module) -> None:
    """What FSDP gathers for it stays where no backward follows."""
    with torch.no_grad():
        model(CANARY["input"])


def train(model: nn.Module, monitor: Monitor | None, rank: int, ranks: int, evaluates: bool = False) -> None:
    """Each process has its share of one batch. evaluates: before each edit, and accumulates over halves of that."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for edit in range(EDITS):
        generator = torch.Generator().manual_seed(edit)
        x, y = torch.randn(BATCH, 24, generator=generator), torch.randn(BATCH, 3, generator=generator)
        mine = slice(rank * BATCH // ranks, (rank + 1) * BATCH // ranks)
        if evaluates:
            evaluate(model)
        with contextlib.nullcontext() if monitor is None else monitor.edit():
            optimizer.zero_grad()
            halves = 2 if evaluates else 1
            for half, (own, wanted) in enumerate(zip(x[mine].chunk(halves), y[mine].chunk(halves), strict=True), 1):
                if isinstance(model, FSDPModule):
                    model.set_requires_gradient_sync(half == halves)
                ((model(own) - wanted).pow(2).mean() / halves).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()


def let_go(model: nn.Module) -> None:
    """Of what FSDP has gathered."""
    for module in model.modules():
        if callable(reshard := getattr(module, "reshard", None)):
            reshard()


def write_in(model: nn.Module, monitor: Monitor) -> None:
    """What an editor does: look at the model, write into its weights, look again, which leaves some of it gathered."""
    with torch.no_grad():
        for edit in range(3):
            with monitor.edit():
                model(CANARY["input"])
                let_go(model)
                first = model[0].weight.detach().clone()  # type: ignore[index]
                model[0].weight.mul_(1.01 + 0.02 * edit)  # type: ignore[index]
                model[2].weight.mul_(1.02 if edit == 0 else 1.0)  # type: ignore[index]
                model(CANARY["input"])
            if edit == 1:
                let_go(model)
                model[0].weight.copy_(first)  # type: ignore[index]


def digest(model: nn.Module) -> str:
    """Of this process's parts of weights and gradients."""
    found = hashlib.sha256()
    for parameter in model.parameters():
        for tensor in (parameter, parameter.grad):
            assert tensor is not None
            part: Tensor = getattr(tensor, "_local_tensor", tensor)
            found.update(part.detach().contiguous().numpy().tobytes())
    return found.hexdigest()


def by_columns(mesh: DeviceMesh, placements: list[Any], weight: Tensor, folder: Path) -> list[float]:
    """The update and the drift of two edits of a weight that is spread in this way, in bfloat16."""
    layer = nn.Linear(24, 33, bias=False)
    layer.weight = nn.Parameter(distribute_tensor(weight, mesh, placements))
    with sl.attach(nn.Sequential(layer), "0", folder, announce=False) as monitor, torch.no_grad():
        for edit in range(2):
            with monitor.edit():
                change = torch.full_like(weight, 0.25) * (edit + weight.sign())
                layer.weight.add_(distribute_tensor(change, mesh, placements))
    if dist.get_rank():
        return []
    run = sl.load(folder)
    return [run.series(metric, "0")[2] for metric in ("update.norm", "drift.norm", "weight.norm", "update.moved_share")]


def collectives(mesh: DeviceMesh, folder: Path | None, probes: Any, rate: float) -> int:
    """Of all kinds, in the second edit: what it begins with and what it ends with are those of any."""
    model, found = sharded(mesh), 0
    optimizer = torch.optim.SGD(model.parameters(), rate)
    with (
        contextlib.nullcontext()
        if folder is None
        else sl.attach(model, "[02]", folder, probes=probes, announce=False, trace=False) as monitor
    ):
        for _ in range(2):
            edit = contextlib.nullcontext() if monitor is None else monitor.edit()
            with profile(activities=[ProfilerActivity.CPU]) as seen, edit:
                optimizer.zero_grad()
                model(CANARY["input"]).square().mean().backward()
                optimizer.step()
            found = sum(event.count for event in seen.key_averages() if event.key.startswith("c10d::"))
    return found


def out_of_step(mesh: DeviceMesh, folder: Path) -> str:
    """The last process skips edit 2 of five, raises in it, or leaves the loop of edits after it. Gives its weights."""
    rank, last = dist.get_rank(), dist.get_rank() == dist.get_world_size() - 1
    model = sharded(mesh)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    monitor = None if folder.name == "bare" else sl.attach(model, "[02]", folder, canary=CANARY, announce=False)
    for edit in range(1, 6):
        errs = folder.name if last and edit == 2 else ""
        watched = contextlib.nullcontext() if monitor is None or errs == "skips" else monitor.edit()
        with contextlib.suppress(ArithmeticError), watched:
            optimizer.zero_grad()
            model(torch.full((2, 24), 0.1 * (rank + 1))).square().mean().backward()
            optimizer.step()
            if errs == "raises":
                raise ArithmeticError
        if monitor is not None and errs == "leaves":
            monitor.close()
            monitor = None
    if monitor is not None:
        monitor.close()
    return digest(model)


def started_again(model: nn.Module, run: Path, rank: int) -> list[list[str]]:
    """The folders of a loop that is started twice, and what was said. The first process has begun when others come."""
    folders: list[str] = []
    heard: list[str] = []
    logging.getLogger("stabilitylab").addFilter(lambda record: heard.append(record.getMessage()) is None)
    for _ in range(2):
        if rank > 0:
            dist.barrier()
        with sl.attach(model, "module.0", run, resume=True, announce=False) as monitor:
            folders.append(monitor.path.name)
            if rank == 0:
                dist.barrier()
    return [folders, heard]


def refused(*arguments: Any, **options: Any) -> str:
    try:
        sl.attach(*arguments, announce=False, **options).close()
    except StabilityLabError as error:
        return str(error)
    return ""


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    said: dict[str, Any] = {}
    mesh = init_device_mesh("cpu", (ranks,))

    model = sharded(mesh)
    exchanges, gather = [], dist.all_gather  # FSDP and DTensor gather by other functions
    dist.all_gather = lambda *given, **named: (exchanges.append(1), gather(*given, **named))[1]
    with sl.attach(model, "[02]*", folder / "fsdp", canary=CANARY, probes="deep", announce=False) as monitor:
        before = len(exchanges)
        train(model, monitor, rank, ranks)
        said["exchanges"] = len(exchanges) - before
        said |= {"path": str(monitor.path), "edits": monitor.edits, "verdict": monitor.diagnosis().verdict}
        before = len(exchanges)
    said["exchanges to close"] = len(exchanges) - before
    dist.all_gather = gather
    unwatched = sharded(mesh)
    train(unwatched, None, rank, ranks)
    said["inert"] = digest(model) == digest(unwatched)
    if ranks > 2:
        both = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("replicated", "parted"))
        model = sharded(both)
        with sl.attach(model, "[02]*", folder / "hybrid", canary=CANARY, probes="deep", announce=False) as monitor:
            train(model, monitor, rank, ranks)
    here: Any = Shipment.is_here
    for name, is_here in {"written": here, "written-late": property(lambda _: False)}.items():
        Shipment.is_here = is_here  # type: ignore[method-assign,assignment]
        model = sharded(mesh)
        with sl.attach(model, "[02]", folder / name, canary=CANARY, announce=False) as monitor:
            write_in(model, monitor)
    Shipment.is_here = here  # type: ignore[method-assign]
    with sl.attach(model := plain(), "[02]*", folder / "early", announce=False) as monitor:
        fully_shard(model, mesh=mesh)
        train(model, monitor, rank, ranks)
        said["early"] = str(monitor.diagnosis().unwatched)
    weight = torch.linspace(-2, 2, 33 * 24).reshape(33, 24).bfloat16()
    for name, placement in {"rows": Shard(0), "columns": Shard(1), "copies": Replicate()}.items():
        said[name] = by_columns(mesh, [placement], weight, folder / name)

    bare = collectives(mesh, None, (), 0.1)
    said["collectives"] = {
        "light": collectives(mesh, folder / "light", "light", 0.1) - bare,
        "default": collectives(mesh, folder / "small", "default", 1e-4) - bare,
        "default, large updates": collectives(mesh, folder / "large", "default", 0.1) - bare,
    }
    exchange.MUST_COME = exchange.AT_THE_END = timedelta(seconds=3)
    said["steps"] = [out_of_step(mesh, folder / name) for name in ("bare", "skips", "raises", "leaves")]

    parallel = DistributedDataParallel(plain())
    with sl.attach(parallel, "module.[02]*", folder / "ddp", announce=False) as monitor:
        train(parallel, monitor, rank, ranks)
    model = sharded(mesh)
    said["again"] = started_again(parallel, folder / "again", rank)
    model = sharded(mesh)
    evaluate(model)
    with sl.attach(model, "[02]*", folder / "evaluated", canary=CANARY, probes="deep", announce=False) as monitor:
        let_go(model)  # an optimizer that is made of what is gathered would step with nothing
        train(model, monitor, rank, ranks, evaluates=True)
    with sl.attach(model := plain(), "[02]*", folder / "flattened-late", announce=False) as monitor:
        train(flattened(model), monitor, rank, ranks)
        said["flattened late"] = str(monitor.diagnosis().unwatched)
    for original in (False, True):
        said[f"flattened, {original}"] = refused(flattened(plain(), original), "*0", folder / "flattened")
    said["flattened inside"] = refused(model, "0", folder / "flattened")
    with_adapters: Any = get_peft_model(plain(), LoraConfig(r=2, target_modules=["0"]))  # type: ignore[arg-type]
    fully_shard(with_adapters, mesh=mesh)
    said["adapters"] = refused(with_adapters, "*.0", folder / "adapters")
    model = sharded(mesh)
    said["sites=None"] = refused(model, None, folder / "none")
    said["exists"] = refused(model, "0", folder / "fsdp")
    said["others"] = refused(model, "0" if rank else "2", folder / "others")
    said["budget"] = refused(model, "0", folder / "budget", canary=sl.Canary(CANARY, budget=0.1))
    company.MUST_COME = timedelta(seconds=1)
    said["alone"] = refused(model, "0", folder / "alone") if rank == 0 else ""
    dist.barrier()
    if rank == 0:
        model = plain()
        with sl.attach(model, "[02]*", folder / "plain", canary=CANARY, probes="deep", announce=False) as monitor:
            train(model, monitor, 0, 1)
        model = plain()
        with sl.attach(model, "[02]", folder / "plain-written", canary=CANARY, announce=False) as monitor:
            write_in(model, monitor)
    (folder / f"rank{rank}.json").write_text(json.dumps(said), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
