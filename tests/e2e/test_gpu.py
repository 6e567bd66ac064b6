"""The contract on CUDA: the same readings as on the host, the same bits as unwatched, and no wait inside an edit.

Never run so far: no machine that built this had a GPU.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import stabilitylab as sl

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here"),
]
EDITS = 10


def made(device: str) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 12)).to(device)


def loop(device: str, run: Path | None, probes: str = "default", *, strictly: bool = False) -> list[Tensor]:
    model = made(device)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    canary = {"input": torch.linspace(-1, 1, 3 * 24).reshape(3, 24).to(device)}
    monitor = None if run is None else sl.attach(model, "*", run, canary=canary, probes=probes, announce=False)  # type: ignore[arg-type]
    for edit in range(EDITS):
        generator = torch.Generator().manual_seed(edit)
        x, y = torch.randn(8, 24, generator=generator).to(device), torch.randn(8, 12, generator=generator).to(device)
        with contextlib.nullcontext() if monitor is None else monitor.edit():
            if strictly:
                torch.cuda.set_sync_debug_mode("error")
            try:
                optimizer.zero_grad()
                (model(x) - y).pow(2).mean().backward()
                optimizer.step()
            finally:
                if strictly:
                    torch.cuda.set_sync_debug_mode("default")
    if monitor is not None:
        monitor.close()
    return [each.detach().cpu() for each in model.parameters()]


@pytest.mark.parametrize("probes", ["light", "default", "deep"])
def test_nothing_changes(tmp_path: Path, probes: str) -> None:
    assert all(map(torch.equal, loop("cuda", tmp_path / "run", probes), loop("cuda", None)))


def test_the_readings_are_those_on_the_host(tmp_path: Path) -> None:
    loop("cuda", tmp_path / "device")
    loop("cpu", tmp_path / "host")
    device, host = sl.load(tmp_path / "device"), sl.load(tmp_path / "host")
    for metric in ("update.norm", "drift.norm", "weight.norm", "weight.max_abs", "gradient.norm", "canary.kl"):
        for site in host.sites_of(metric):
            np.testing.assert_allclose(device.series(metric, site), host.series(metric, site), rtol=1e-3, atol=1e-7)


def test_no_hook_waits_inside_an_edit(tmp_path: Path) -> None:
    loop("cuda", tmp_path / "run", strictly=True)
    assert "probe-off" not in {note.kind for note in sl.load(tmp_path / "run").notes}
