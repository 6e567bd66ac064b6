"""Weights that are spread over processes: the figures of the whole, on each of them, by one process written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import stabilitylab as sl

pytestmark = [pytest.mark.multiprocess, pytest.mark.processes]

LOOP = Path(__file__).with_name("spread_loop.py")
OF_WEIGHTS = ("weight.", "update.", "drift.", "gradient.norm", "canary.")

Ranks = tuple[Path, list[dict[str, Any]]]


def ranks_of(folder: Path, processes: int) -> Ranks:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    subprocess.run([*torchrun, str(LOOP), str(folder)], check=True, timeout=240, capture_output=True)
    told = [json.loads((folder / f"rank{rank}.json").read_text(encoding="utf-8")) for rank in range(processes)]
    return folder, told


@pytest.fixture(scope="module", params=[pytest.param(2, id="two"), pytest.param(4, id="four")])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return ranks_of(tmp_path_factory.mktemp("ranks"), request.param)


def assert_alike(one: Path, other: Path) -> None:
    """Readings of the weights, their gradients and the canary."""
    run, true = sl.load(one), sl.load(other)
    keys = [key for key in true._keys if key[0].startswith(OF_WEIGHTS)]
    assert len(keys) > 20
    assert [key for key in keys if key not in run._keys] == []
    for key in keys:
        np.testing.assert_allclose(run.series(*key), true.series(*key), rtol=1e-5, atol=1e-9, err_msg=str(key))


def test_a_sharded_run_reads_what_a_plain_run_of_the_same_loop_reads(ranks: Ranks) -> None:
    folder, told = ranks
    assert_alike(folder / "fsdp", folder / "plain")
    assert_alike(folder / "evaluated", folder / "plain")
    if len(told) > 2:
        assert_alike(folder / "hybrid", folder / "plain")


@pytest.mark.parametrize("name", ["written", "written-late"])
def test_weights_written_in_place_beside_gathered_ones_are_read_and_their_outcomes_seen(
    ranks: Ranks, name: str
) -> None:
    """Late: each edit is read with the next, as on an accelerator."""
    folder, _ = ranks
    assert_alike(folder / name, folder / "plain-written")
    run, true = sl.load(folder / name), sl.load(folder / "plain-written")
    assert [edit.outcome for edit in run.edits] == [edit.outcome for edit in true.edits]
    assert "probe-off" not in {note.kind for note in run.notes}


def test_nothing_changes_on_any_process(ranks: Ranks) -> None:
    assert all(told["inert"] for told in ranks[1])


def test_an_edit_costs_one_exchange(ranks: Ranks) -> None:
    """Which tells what became of the edit before, too; of the last one nobody tells before the run is closed."""
    assert {told["exchanges"] for told in ranks[1]} == {4}
    assert {told["exchanges to close"] for told in ranks[1]} == {1}


def test_an_edit_has_one_collective_more_and_those_that_gather_what_moved_far_for_its_spectral_norm(
    ranks: Ranks,
) -> None:
    for told in ranks[1]:
        assert told["collectives"] == {"light": 1, "default": 1, "default, large updates": 1 + 2 * 2}


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("skips", "did not come to the end of edit 2 within 3 s; expected monitor.edit on each process"),
        ("leaves", "did not come to the look after edit 2 within 3 s; expected monitor.edit on each process"),
    ],
)
def test_a_process_that_skips_an_edit_is_named_and_the_loop_goes_on(ranks: Ranks, name: str, says: str) -> None:
    folder, told = ranks
    assert all(len(set(each["steps"])) == 1 for each in told)
    run = sl.load(folder / name)
    off = [note.says for note in run.notes if note.kind == "exchange-off"]
    assert [says in each for each in off] == [True]
    assert name == "leaves" or f"process {len(told) - 1} did" in off[0]
    assert len(run.edits) == 6
    assert np.isfinite(run.series("update.norm", "0")[1])
    assert not np.isfinite(run.series("update.norm", "0")[3:]).any()
    assert off == list(run.diagnosis().unwatched)


def test_an_edit_that_fails_in_one_process_is_measured_in_none_and_the_next_is(ranks: Ranks) -> None:
    folder, _ = ranks
    run = sl.load(folder / "raises")
    assert "probe-off" not in {note.kind for note in run.notes}
    assert np.isfinite(run.series("update.norm", "0")).tolist() == [True, True, False, True, True, True]
    assert np.isfinite(run.series("canary.kl", "model"))[1:].tolist() == [True, False, True, True, True]


def test_one_process_writes_and_the_others_know_the_same(ranks: Ranks) -> None:
    folder, told = ranks
    assert {each["path"] for each in told} == {str(folder / "fsdp")}
    assert {(each["edits"], each["verdict"]) for each in told} == {(4, sl.load(folder / "fsdp").diagnosis().verdict)}
    for name in ("fsdp", "ddp"):
        run = sl.load(folder / name)
        assert run.manifest["process"]["rank"] == 0
        assert [note.kind for note in run.notes].count("per-process") == 1
        assert len(run.edits) == 5


def test_of_a_loop_that_is_started_again_the_process_that_writes_says_where(ranks: Ranks) -> None:
    _, told = ranks
    assert [each["again"][0] for each in told] == [["again", "again-2"]] * len(told)
    (said,) = told[0]["again"][1]
    assert "this run is in" in said
    assert [each["again"][1] for each in told[1:]] == [[]] * (len(told) - 1)


@pytest.mark.parametrize("placed", ["rows", "columns", "copies"])
def test_parts_make_up_the_whole_and_copies_count_once(ranks: Ranks, placed: str) -> None:
    before = torch.linspace(-2, 2, 33 * 24).reshape(33, 24).bfloat16()
    weights = [before]
    for edit in range(2):
        weights.append(weights[-1] + torch.full_like(before, 0.25) * (edit + before.sign()))
    last = [
        float((weights[2].double() - weights[1].double()).norm()),
        float((weights[2].double() - before.double()).norm()),
        float(weights[2].double().norm()),
        float((weights[2] != weights[1]).double().mean()),
    ]
    np.testing.assert_allclose(ranks[1][0][placed], last, rtol=1e-5)


def test_who_attached_too_early_is_told_so_and_not_that_all_is_well(ranks: Ranks) -> None:
    folder, told = ranks
    run = sl.load(folder / "early")
    assert any(note.kind == "skipped-site" and "attach after fully_shard" in note.says for note in run.notes)
    read = {key[0] for key in run._keys if np.isfinite(run.series(*key)[1:]).any()}
    assert not {name for name in read if name.startswith(("update.", "gradient."))}  # a part's would be too small
    assert all("DTensor" in each["early"] for each in told)


@pytest.mark.parametrize("how", ["False", "True"])
def test_pieces_of_a_flat_vector_are_not_taken_for_weights(ranks: Ranks, how: str) -> None:
    folder, told = ranks
    for each in told:
        for name in (f"flattened, {how}", "flattened inside", "flattened late"):
            assert "FullyShardedDataParallel (FSDP1) keeps it as pieces" in each[name]
    assert not (folder / "flattened").exists()


def test_what_can_not_be_is_refused_on_each_process_and_nobody_hangs(ranks: Ranks) -> None:
    folder, told = ranks
    assert "1" in told[0]["alone"]
    assert "did not attach" in told[0]["alone"]
    assert not (folder / "alone").exists()
    for each in told:
        assert "expected sites=" in each["sites=None"]
        assert "exists; expected a new one" in each["exists"]
        assert "it has adapters and is spread over processes" in each["adapters"]
        assert "attached with sites=" in each["others"]
        assert "expected every=" in each["budget"]


def test_the_example_runs_as_its_header_says(tmp_path: Path) -> None:
    example = Path(__file__).resolve().parents[2] / "examples" / "fsdp2.py"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, str(example), "run"], cwd=tmp_path, check=True, timeout=240, capture_output=True, text=True
    )
    assert "Stable over 12 edits" in done.stdout
    run = sl.load(tmp_path / "run")
    assert (run.series("update.norm", "2.down")[1:] > 0).all()
    assert run.present("canary.kl", "model").all()
