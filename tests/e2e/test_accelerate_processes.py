"""accelerate over two processes: the first one watches, and reads the gradient of both."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import stabilitylab as sl

pytestmark = [pytest.mark.multiprocess, pytest.mark.processes]


def test_the_first_process_watches_the_steps_of_all(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    loop = Path(__file__).with_name("accelerate_loop.py")
    done = subprocess.run(
        [*torchrun, str(loop), str(tmp_path)], check=False, timeout=240, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    told = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    assert [(idle, kind) for idle, kind, _ in told] == [
        (False, "DistributedDataParallel"),
        (True, "DistributedDataParallel"),
    ]
    run = sl.load(tmp_path / "run")
    assert [edit.label for edit in run.edits][1:] == ["step 1", "step 2", "step 3"]
    for _, _, norms in told:
        np.testing.assert_allclose(run.series("gradient.norm", "0")[1:], norms, rtol=1e-5)
