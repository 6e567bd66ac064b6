"""Each example runs as its header says, from another folder, and what it shows is what it says it shows."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import stabilitylab as sl

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run_example(name: str, folder: Path, **environment: str) -> str:
    inherited = {key: value for key, value in os.environ.items() if key != "STABILITYLAB_TRACE"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), "run"],
        cwd=folder,
        env=inherited | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_example_here(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same in this process: importing a host's libraries takes longer than the example."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [name, "run"])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def check(folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "stabilitylab", "check", "run"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    return " ".join(done.stdout.split())


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("traced")
    run_example("own_loop.py", folder, STABILITYLAB_TRACE="12")
    return folder


def test_the_loop_of_ones_own_breaks_where_it_says(traced: Path) -> None:
    diagnosis = sl.load(traced / "run").diagnosis()
    assert (diagnosis.verdict, diagnosis.first_nonfinite_edit) == ("non-finite", 12)


def test_the_variable_has_the_operation_named_by_its_line_with_its_values(traced: Path) -> None:
    operation = sl.load(traced / "run").diagnosis().operation
    assert operation is not None
    assert (operation.short, operation.direction, operation.node) == ("div", "backward", "SqrtBackward0")
    assert operation.place.source == "return (one - other).square().sum(-1).sqrt()"
    assert (operation.place.function, operation.reach) == ("distance", "weight")
    assert all((values.least, values.greatest) == (0.0, 0.0) for values in operation.operands[1:])
    said = check(traced)
    assert "by div, in the backward of line" in said
    assert "return (one - other).square().sum(-1).sqrt()" in said


def test_a_variable_that_can_t_be_read_is_one_clear_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "own_loop.py"), "run"],
        cwd=tmp_path,
        env=os.environ | {"STABILITYLAB_TRACE": "twelve"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "STABILITYLAB_TRACE='twelve' can't be read; expected edits such as '26', '25-27' or 'all'" in done.stderr
    assert not (tmp_path / "run").exists()


def test_the_ten_lines_around_a_gpt2_loop(tmp_path: Path) -> None:
    assert "over 12 edits" in run_example("gpt2_loop.py", tmp_path)
    run = sl.load(tmp_path / "run")
    assert [edit.row.label for edit in run.edits[1:3]] == ["request 1", "request 2"]
    assert set(run.manifest["sites"]) >= {"transformer.h.1.mlp.c_fc", "transformer.h.1.mlp.c_proj"}
    assert (run.series("update.norm", "transformer.h.1.mlp.c_fc")[1:] > 0).all()


def test_a_script_with_its_state_in_the_variables_of_main(tmp_path: Path) -> None:
    run_example("alphaedit_main.py", tmp_path)
    run = sl.load(tmp_path / "run")
    assert len(run.edits) == 13
    (cache,) = run.sites_of("editor.cache_energy")
    assert (run.series("editor.cache_energy", cache)[1:] > 0).all()
    (projection,) = run.sites_of("editor.null_space_share")
    assert run.series("editor.null_space_share", projection)[0] == pytest.approx(0.6, abs=0.02)


def test_a_script_that_puts_the_weights_back_after_each_case(tmp_path: Path) -> None:
    run_example("memit_script.py", tmp_path)
    run = sl.load(tmp_path / "run")
    assert [edit.row.label for edit in run.edits[1:3]] == ["case 0", "case 1"]
    assert {edit.outcome for edit in run.edits[1:]} == {"restored"}
    for site in ("transformer.h.1.mlp.c_proj", "transformer.h.2.mlp.c_proj"):
        assert run.series("drift.norm", site)[1:] == pytest.approx(run.series("update.norm", site)[1:], rel=1e-4)
    assert run.diagnosis().verdict == "stable"


def test_a_plain_loop_with_all_that_it_may_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_example_here("plain_torch.py", tmp_path, monkeypatch)
    assert "Stable over 16 edits" in capsys.readouterr().out
    run, site = sl.load(tmp_path / "run"), "blocks.1.down_proj"
    norms, scales = run.series("gradient.norm", site)[1:], run.series("gradient.loss_scale", site)[1:]
    assert norms.max() < 5 * norms.min()
    assert set(scales) == {2.0**19, 2.0**20}
    skipped = run.series("update.norm", site)[1:] == 0
    assert 0 < skipped.sum() < 8
    assert (run.series("gradient.norm_stepped", site)[1:][~skipped] <= 1).all()
    assert (run.series("gradient.passes", site)[1:] == 4).all()


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers about itself
def test_lora_under_a_trainer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_example_here("lora.py", tmp_path, monkeypatch)
    assert "Stable over 12 edits" in capsys.readouterr().out
    run = sl.load(tmp_path / "run")
    assert [edit.row.label for edit in run.edits[1:3]] == ["step 1", "step 2"]
    assert len(run.manifest["sites"]) == 2
    for site in run.manifest["sites"]:
        assert (run.series("drift.ratio", site)[1:] > 0.01).all()
