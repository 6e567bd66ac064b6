"""``stabilitylab scan``: what it prints, and how it exits."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.folders import weights, write, write_shards
from tests.unit.test_cli import run_cli

DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("models") / "sound", weights())


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    held = weights()
    held[f"{DOWN}.weight"][3, 5] = math.nan
    held[f"{DOWN}.bias"] *= 0.0
    return write(tmp_path_factory.mktemp("models") / "broken", held)


def test_a_sound_model_and_a_broken_one(sound: Path, broken: Path) -> None:
    fine = run_cli("scan", sound)
    assert fine.returncode == 0, fine.stderr
    bad = run_cli("scan", broken)
    assert bad.returncode == 1
    assert "not finite" in " ".join(bad.stdout.split())
    assert DOWN in bad.stdout.replace("\n", "")
    assert all(len(line) <= 80 for line in [*fine.stdout.splitlines(), *bad.stdout.splitlines()])
    assert not fine.stderr
    assert not bad.stderr


def test_json_has_the_figures_and_what_they_warn_of(broken: Path) -> None:
    done = run_cli("scan", broken, "--sites", "*.down_proj", "--json")
    found = json.loads(done.stdout, parse_constant=lambda token: pytest.fail(f"{token} is no JSON"))
    assert done.returncode == 1
    assert [(caution["rule"], caution["urgency"]) for caution in found["cautions"]] == [("nonfinite-weight", "fatal")]
    assert len(found["sites"]) == 5
    assert {tensor["name"] for tensor in found["tensors"]} >= {f"{DOWN}.weight", f"{DOWN}.bias"}


def test_the_page_is_written_where_it_is_told(broken: Path, tmp_path: Path) -> None:
    page = tmp_path / "pages" / "scan.html"
    done = run_cli("scan", broken, "-o", page)
    assert f"page: {page}" in done.stdout
    assert DOWN in page.read_text()
    assert json.loads(page.with_suffix(".json").read_text())["cautions"]


@pytest.mark.parametrize(("fail_on", "code"), [("fatal", 0), ("risk", 1), ("note", 1), ("nothing", 2)])
def test_fail_on(tmp_path: Path, fail_on: str, code: int) -> None:
    held = {name: tensor.half() for name, tensor in weights().items()}
    assert run_cli("scan", write(tmp_path / "half", held), "--fail-on", fail_on).returncode == code


def test_every_error_is_one_line(tmp_path: Path, sound: Path) -> None:
    missing = write_shards(tmp_path / "shards", weights())
    (missing / "model-00001-of-00002.safetensors").unlink()
    (tmp_path / "empty").mkdir()
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"\x80\x02")
    for arguments in (
        (tmp_path / "nowhere",),
        (missing,),
        (tmp_path / "empty",),
        (tmp_path / "pickled",),
        (tmp_path / "pickled", "--pickle"),
        (sound, "--sites", "*.nothing"),
        (sound, "--hparams", tmp_path / "none.yaml"),
        (sound, "-o", tmp_path),
    ):
        done = run_cli("scan", *arguments)
        assert done.returncode == 2, arguments
        assert done.stderr.startswith("stabilitylab: ")
        assert len(done.stderr.splitlines()) == 1, done.stderr
