"""The loop's own gradient where it is averaged over processes: what the optimizer steps with, on every one of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

LOOP = Path(__file__).with_name("data_parallel_loop.py")


@pytest.mark.multiprocess
def test_the_gradient_is_the_one_of_after_the_all_reduce(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run([*torchrun, str(LOOP), str(tmp_path)], check=True, timeout=240, capture_output=True)
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]
    for rank in ranks:
        np.testing.assert_allclose(rank["told"], rank["true"], rtol=1e-5)
    assert ranks[0]["told"] == ranks[1]["told"]
