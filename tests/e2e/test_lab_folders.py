"""The lab on a user's own model: any local folder of a causal language model, every editor, Linear and Conv1D."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import stabilitylab as sl
from stabilitylab.commands import cli
from stabilitylab.editors import hypernetwork
from stabilitylab.editors.base import Prepared
from stabilitylab.editors.malmen import Malmen
from stabilitylab.editors.mend import Mend
from stabilitylab.editors.registry import KINDS, make
from stabilitylab.editors.rome import Rome
from stabilitylab.errors import SiteError, StabilityLabError
from stabilitylab.testbed.causal import CausalBed
from stabilitylab.testbed.lab import _state_folder, run_lab
from tests import tiny_lm

FAMILIES = {"llama": "fp32", "gpt2": "bf16"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = tmp_path_factory.mktemp("models")
    return {family: tiny_lm.folder(made / family, family) for family in FAMILIES}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Hypernetworks that are hardly trained, and a cache of the test's own."""
    monkeypatch.setenv("STABILITYLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hypernetwork, "VALIDATION_EXAMPLES", 4)
    for editor in (Mend, Malmen):
        short = dataclasses.replace(editor.training_settings, steps=2, groups=1, sizes=(1, 2), first_look=4)
        monkeypatch.setattr(editor, "training_settings", short)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", [kind.name for kind in KINDS])
def test_every_editor_edits_a_model_of_ones_own(
    name: str, family: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    bed = CausalBed.from_folder(folders[family], FAMILIES[family])
    row = run_lab(bed, name, edits=2, seed=0, run=tmp_path / "run")
    assert row.failed == 0
    assert row.first_nonfinite_edit is None
    assert row.model == family
    run = sl.load(row.run)
    assert [edit.status for edit in run.edits] == ["start", "applied", "applied"]
    assert {detail["kind"] for detail in run.manifest["site_details"].values()} == {
        "linear" if family == "llama" else "conv1d"
    }
    assert row.drift_ratio is not None
    assert (row.drift_ratio > 0) == (name != "grace")
    assert not [note for note in run.notes if note.kind == "probe-off"], run.notes


@pytest.mark.usefixtures("quick")
def test_what_an_editor_learned_is_kept_for_these_very_weights(folders: dict[str, Path], tmp_path: Path) -> None:
    def run(family: str, name: str) -> None:
        bed = CausalBed.from_folder(folders[family], FAMILIES[family])
        run_lab(bed, "rome", edits=1, seed=0, run=tmp_path / name)

    cache = tmp_path / "cache" / "editors"
    run("llama", "first")
    (kept,) = cache.rglob("rome.safetensors")
    written = kept.stat().st_mtime_ns
    run("llama", "second")
    assert kept.stat().st_mtime_ns == written
    run("gpt2", "third")
    assert len(list(cache.rglob("rome.safetensors"))) == 2
    # A damaged state can be learned again.
    kept.write_bytes(b"")
    run("llama", "fourth")
    assert kept.stat().st_size > 0


def test_a_state_is_taken_up_only_for_the_same_model_text_and_settings(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    bed = CausalBed.from_folder(folders["llama"])
    model = bed.load()
    editor = make("rome", model, bed)
    assert isinstance(editor, Prepared)
    first = _state_folder(editor, model, bed)
    moved = CausalBed.from_folder(shutil.copytree(folders["llama"], tmp_path / "llama"))
    assert _state_folder(editor, moved.load(), moved) == first
    text = tmp_path / "text.txt"
    text.write_text("Another text. " * 400)
    other_text = CausalBed.from_folder(folders["llama"], text=text)
    assert _state_folder(editor, model, other_text) != first
    few = Rome.for_model(model, locate=bed.located, tokens=300)
    assert _state_folder(few, model, bed) != first
    with torch.no_grad():  # not a weight that is edited
        next(model.parameters())[0, 0] += 1
    assert _state_folder(editor, model, bed) != first


def test_the_command_line_takes_a_folder_and_names_what_is_wrong_with_another(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    arguments = ["lab", "run", "--editor", "finetune", "--edits", "1", "--run", str(run), "--model"]
    done = CliRunner().invoke(cli.app, [*arguments, str(folders["gpt2"])])
    assert done.exit_code == 0, done.output
    assert "perpl" in done.output
    assert len(sl.load(run)) == 1
    (tmp_path / "empty").mkdir()
    for wrong, says in ((tmp_path / "empty", "no config.json"), (tmp_path / "none", "no model")):
        done = CliRunner().invoke(cli.app, [*arguments, str(wrong)])
        assert isinstance(done.exception, StabilityLabError)
        assert says in str(done.exception)


def test_a_model_without_the_layers_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    bed = CausalBed.from_folder(folders["llama"])
    model = bed.load()
    layers = model.model.layers  # type: ignore[union-attr]
    for layer in layers:  # type: ignore[union-attr]
        layer.mlp.out = layer.mlp.down_proj
        del layer.mlp.down_proj
    bed._loaded = model
    with pytest.raises(SiteError, match=r"LlamaForCausalLM has no decoder layers with an MLP matrix named fc2, "):
        run_lab(bed, "rome", edits=1, seed=0, run=tmp_path / "run")
    assert not (tmp_path / "run").exists()
