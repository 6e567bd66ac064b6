"""The adapter on EasyEdit itself: a small GPT-2 of our own, edited by five of its methods, each bare and watched.

Needs a checkout of EasyEdit and what that imports; docs/easyedit.md says what ran. ``make test-easyedit``.
"""

from __future__ import annotations

import contextlib
import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import stabilitylab as sl
from stabilitylab.integrations.easyedit import watch
from tests import easyedit_hosts as hosts

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "easyedit_mend.py"
EDITS = 3
MEND_LAYERS = [f"transformer.h.{layer}.mlp.{part}" for layer in (4, 5) for part in ("c_fc", "c_proj")]

pytestmark = [
    pytest.mark.easyedit,
    # EasyEdit's own, on every library that it imports.
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(scope="module", autouse=True)
def _easyedit() -> None:
    reason = hosts.missing()
    if reason:
        pytest.skip(f"{reason}; run with: make test-easyedit EASYEDIT=folder PYTHON=its python")


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # EasyEdit writes logs/ where it runs


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hosts.model_folder(tmp_path_factory.mktemp("models") / "tiny-gpt2")


def mend_file(folder: Path, gpt2: Path) -> str:
    """Hyperparameters of MEND, and a hypernetwork whose statistics are those of 36 facts, which nobody has trained."""
    from easyeditor import MENDHyperParams
    from easyeditor.trainer import MEND
    from transformers import AutoModelForCausalLM, AutoTokenizer

    inner = [f"{layer}.weight" for layer in MEND_LAYERS]
    archive = folder / "mend.pt"
    other: dict[str, Any] = {"archive": str(archive), "inner_params": inner, "rank": 16, "edit_lr": 1e-4}
    file = hosts.hparams_file(folder, "MEND", gpt2, **other)
    model, words = AutoModelForCausalLM.from_pretrained(gpt2), AutoTokenizer.from_pretrained(gpt2)
    learner = MEND(model, MENDHyperParams.from_hparams(file), lambda: copy.deepcopy(model))
    learner.train()
    for fact in hosts.facts():
        batch = dict(words(fact, return_tensors="pt"))
        learner.edit({**batch, "labels": batch["input_ids"][:, -2:]})
    torch.save({"model": learner.state_dict()}, archive)
    return file


def editor_of(method: str, folder: Path, gpt2: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    import datasets
    import easyeditor
    from easyeditor.models.mend import MendRewriteExecutor
    from easyeditor.models.rome import layer_stats

    local = {"train": datasets.Dataset.from_dict({"text": hosts.facts()})}
    monkeypatch.setattr(layer_stats, "load_dataset", lambda *_: local)
    kinds = {
        "FT": (easyeditor.FTHyperParams, {"layers": [2], "batch_size": 1, "num_steps": 5}),
        "ROME": (easyeditor.ROMEHyperParams, {"layers": [2], "v_num_grad_steps": 5}),
        "MEMIT": (easyeditor.MEMITHyperParams, {"layers": [1, 2], "v_num_grad_steps": 5}),
        "GRACE": (easyeditor.GraceHyperParams, {"inner_params": ["transformer.h[3].mlp.c_fc.weight"], "n_iter": 10}),
        "MEND": (easyeditor.MENDHyperParams, {}),
    }
    kind, other = kinds[method]
    file = mend_file(folder, gpt2) if method == "MEND" else hosts.hparams_file(folder, method, gpt2, **other)
    editor = easyeditor.BaseEditor.from_hparams(kind.from_hparams(file))
    if method == "MEND":  # not the one that all editors of the process share
        editor.apply_algo = MendRewriteExecutor().apply_to_model
    return editor


def weights_after(editor: Any, watching: Callable[[Any], Any], sequential: bool) -> tuple[dict[str, Any], list[Any]]:
    torch.manual_seed(7)
    with watching(editor):
        metrics, edited, _ = editor.edit(**hosts.requests(EDITS), sequential_edit=sequential, verbose=False)
    assert isinstance(edited, nn.Module)
    return edited.state_dict(), metrics


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize(
    ("method", "sites"),
    [
        ("FT", ["transformer.h.2.mlp.c_proj"]),
        ("ROME", ["transformer.h.2.mlp.c_proj"]),
        ("MEMIT", ["transformer.h.1.mlp.c_proj", "transformer.h.2.mlp.c_proj"]),
        ("MEND", MEND_LAYERS),
        ("GRACE", ["transformer.h.3.mlp.c_fc"]),
    ],
)
def test_edits_are_counted_and_labelled_and_bit_for_bit_as_without_us(
    tmp_path: Path, gpt2: Path, monkeypatch: pytest.MonkeyPatch, method: str, sites: list[str], sequential: bool
) -> None:
    bare = editor_of(method, tmp_path, gpt2, monkeypatch)
    watched = editor_of(method, tmp_path, gpt2, monkeypatch)
    algorithm, attributes = watched.apply_algo, set(vars(watched))
    module = dict(vars(sys.modules[type(watched).__module__]))
    ids = watched.tok([f"{person} lives in Vienna" for person in hosts.PEOPLE[:1]], return_tensors="pt")["input_ids"]

    without, said = weights_after(bare, lambda editor: contextlib.nullcontext(), sequential)
    with_us, says = weights_after(
        watched, lambda editor: watch(editor, run=tmp_path / "run", canary=ids, announce=False), sequential
    )

    assert without.keys() == with_us.keys()
    assert all(torch.equal(without[name], with_us[name]) for name in without)
    assert [each["post"]["rewrite_acc"] for each in said] == [each["post"]["rewrite_acc"] for each in says]
    assert watched.apply_algo == algorithm
    assert set(vars(watched)) == attributes
    assert vars(sys.modules[type(watched).__module__]) == module
    run = sl.load(tmp_path / "run")
    assert [edit.label for edit in run.edits[1:]] == [each["requested_rewrite"]["prompt"] for each in says]
    assert {edit.row.status for edit in run.edits[1:]} == {"applied"}
    assert {edit.outcome for edit in run.edits[1:]} == {"committed" if sequential else "restored"}
    assert set(sites) <= set(run.manifest["sites"])
    kinds = [note.kind for note in run.notes]
    assert ("sequential-edits" in kinds, "single-edits" in kinds) == (sequential, not sequential)
    assert "canary-off" not in kinds


def test_the_example_with_mend_attached_in_two_lines(tmp_path: Path, gpt2: Path) -> None:
    file = mend_file(tmp_path, gpt2)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(EXAMPLE), file, "run"],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.environ[hosts.VARIABLE]},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    run = sl.load(tmp_path / "run")
    assert len(run.edits) == 7
    assert run.edits[1].label == "Which university did Watts Humphrey attend?"
    assert set(run.manifest["sites"]) == set(MEND_LAYERS)
