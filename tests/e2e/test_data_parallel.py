"""The loop's own gradient where it is averaged over processes: what the optimizer steps with, on every one of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

LOOP = Path(__file__).with_name("data_parallel_loop.py")


def ranks_of(folder: Path) -> list[dict[str, Any]]:
    """What each process says."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run([*torchrun, str(LOOP), str(folder)], check=True, timeout=240, capture_output=True)
    return [json.loads((folder / f"rank{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return ranks_of(tmp_path_factory.mktemp("ranks"))


@pytest.mark.multiprocess
def test_the_tracer_leaves_the_same_bits_on_every_process(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert len(set(rank["digests"].values())) == 1
        assert rank["off"] == []
        assert rank["traced"] > 0


@pytest.mark.multiprocess
def test_a_fault_is_named_where_it_was_made(ranks: list[dict[str, Any]]) -> None:
    (operator, source, made, edit) = ranks[1]["operations"][0]
    assert (operator, made, edit) == ("aten.log.default", "producer", 3)
    assert ".log() * 0" in source
    assert [made for _, _, made, _ in ranks[0]["operations"]] == ["arrived"]  # from the other process


@pytest.mark.multiprocess
def test_the_gradient_is_the_one_of_after_the_all_reduce(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        np.testing.assert_allclose(rank["told"], rank["true"], rtol=1e-5)
    assert ranks[0]["told"] == ranks[1]["told"]
