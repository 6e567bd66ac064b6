"""A scan reads a folder of weights tensor by tensor; what it can't read is one clear line."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import stabilitylab as sl
from stabilitylab.acting.scanning.opening import open_folder
from stabilitylab.errors import SiteError, StabilityLabError, UsageError
from tests.folders import LAYERS, weights, write, write_shards

DOWN = "model.layers.1.mlp.down_proj"


def test_one_file_and_shards_and_a_live_model_say_the_same(tmp_path: Path) -> None:
    held = weights()
    one = sl.scan(write(tmp_path / "one", held)).figures
    several = sl.scan(write_shards(tmp_path / "several", held, 3)).figures
    file = sl.scan(tmp_path / "one" / "model.safetensors").figures
    assert one.tensors == several.tensors == file.tensors
    assert {tensor.name for tensor in one.tensors} == set(held)
    assert one.bytes == sum(tensor.numel() * tensor.element_size() for tensor in held.values())
    linear = torch.nn.Linear(4, 3)
    (weight, bias) = sl.scan(linear).figures.tensors
    assert (weight.name, weight.layer, bias.name, bias.layer) == ("weight", "weight", "bias", "bias")
    assert weight.norm == pytest.approx(float(linear.weight.detach().norm()), rel=1e-6)


def test_layers_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    held = {f"layers.{number}.fc.weight": torch.ones(2, 2) for number in (10, 9, 2, 0)}
    names = [tensor.name for tensor in sl.scan(write(tmp_path / "m", held)).figures.tensors]
    assert names == [f"layers.{number}.fc.weight" for number in (0, 2, 9, 10)]


def test_a_matrix_that_keeps_its_inputs_first_is_told_as_outputs_and_inputs(tmp_path: Path) -> None:
    weight = torch.rand(6, 4) + 0.5
    weight[:, 1] = 0.0
    held = {"h.0.mlp.c_fc.weight": weight}
    (conv1d,) = sl.scan(write(tmp_path / "a", held, "gpt2")).figures.tensors
    (linear,) = sl.scan(write(tmp_path / "b", held, "llama")).figures.tensors
    assert (conv1d.zero_rows.first, conv1d.zero_columns.count) == ((1,), 0)
    assert (linear.zero_columns.first, linear.zero_rows.count) == ((1,), 0)
    assert conv1d.worst_output == pytest.approx(float(weight.norm(dim=0).max()) * 6**0.5, rel=1e-6)


def test_pickled_weights_are_read_only_when_that_is_asked_for(tmp_path: Path) -> None:
    held = weights()
    torch.save(held, tmp_path / "pytorch_model.bin")
    with pytest.raises(UsageError, match=r"pytorch_model.bin is a pickle.*--pickle"):
        sl.scan(tmp_path)
    scanned = sl.scan(tmp_path, pickles=True).figures
    assert {tensor.name for tensor in scanned.tensors} == set(held)


class Planted:
    """Would run when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return (Path.touch, (Path("ran"),))  # type: ignore[return-value]


def test_a_pickle_never_runs_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": torch.ones(2, 2), "config": Planted()}, "pytorch_model.bin")
    with pytest.raises(UsageError, match="holds more than tensors"):
        sl.scan(tmp_path, pickles=True)
    assert not Path("ran").exists()


def broken_index(folder: Path, places: object) -> Path:
    write_shards(folder, weights())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


def truncated(folder: Path) -> Path:
    file = write(folder, weights()) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return folder


def of_wrong_shape(folder: Path) -> Path:
    """The header says more entries than the file holds."""
    file = write(folder, {"a.weight": torch.ones(4, 4)}) / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b"[4,4]", b"[4,5]"))
    return folder


def lacking(folder: Path) -> Path:
    (write_shards(folder, weights()) / "model-00002-of-00002.safetensors").unlink()
    return folder


def of_another_index(folder: Path) -> Path:
    write_shards(folder, weights())
    return broken_index(folder, {"nowhere.weight": "model-00001-of-00002.safetensors"})


def with_text(name: str, text: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        write_shards(folder, weights())
        (folder / name).write_text(text)
        return folder

    return make


def empty(folder: Path) -> Path:
    folder.mkdir()
    return folder


def not_a_pickle(folder: Path) -> Path:
    folder.mkdir()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps([1, 2])[:3])
    return folder


WRONG: dict[str, tuple[Callable[[Path], Path], str]] = {
    "no such folder": (lambda folder: folder, "no such folder"),
    "nothing in it": (empty, "holds no weights"),
    "truncated": (truncated, "can't be read as safetensors"),
    "wrong shape": (of_wrong_shape, "can't be read as safetensors"),
    "a shard is missing": (lacking, "lacks 1 of its 2 shards, 'model-00002-of-00002.safetensors' first"),
    "an index of another model": (of_another_index, "lacks the tensor 'nowhere.weight'"),
    "an index that names no file": (lambda folder: broken_index(folder, {}), "names no file"),
    "an index of numbers": (lambda folder: broken_index(folder, {"a": 1}), "names no file"),
    "an index that is a list": (lambda folder: broken_index(folder, [1]), "names no file"),
    "an index that leaves the folder": (lambda folder: broken_index(folder, {"a": "../b"}), "in the same folder"),
    "an index that is no JSON": (with_text("model.safetensors.index.json", "{"), "can't be read as JSON"),
    "nested too deep": (with_text("model.safetensors.index.json", "[" * 100_000), "can't be read as JSON"),
    "a config that is no JSON": (with_text("config.json", "{"), "can't be read as JSON"),
    "no pickle": (not_a_pickle, "can't be read as a file of torch.save"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_can_t_be_read_is_one_line(tmp_path: Path, wrong: str) -> None:
    make, says = WRONG[wrong]
    folder = make(tmp_path / "model")
    with pytest.raises(StabilityLabError, match=says.replace(".", r"\.")) as caught:
        sl.scan(folder, pickles=True)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_sites_are_found_by_pattern_and_decomposed(tmp_path: Path) -> None:
    held = weights()
    folder = write(tmp_path / "m", held)
    scanned = sl.scan(folder, "*.mlp.down_proj").figures
    assert scanned.sites == tuple(f"model.layers.{layer}.mlp.down_proj" for layer in range(LAYERS))
    site = next(tensor for tensor in scanned.tensors if tensor.name == f"{DOWN}.weight")
    values = torch.linalg.svdvals(held[site.name].double())
    assert site.spectral_norm == pytest.approx(float(values[0]), rel=1e-9)
    assert site.stable_rank == pytest.approx(float(values.square().sum() / values[0] ** 2), rel=1e-5)
    assert site.condition == pytest.approx(float(values[0] / values[-1]), rel=1e-5)
    assert all(tensor.spectral_norm is None for tensor in scanned.tensors if not tensor.is_site)
    with pytest.raises(SiteError, match=r"matches no layer or tensor; layers are named like '\*\.down_proj'"):
        sl.scan(folder, "*.down_porj")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("rome.yaml", "alg_name: ROME\nlayers: [1]\nrewrite_module_tmp: model.layers.{}.mlp.down_proj\n"),
        ("mend.yaml", "inner_params:\n- model.layers.1.mlp.down_proj.weight\n"),
        ("grace.yaml", "inner_params: ['model.layers[1].mlp.down_proj.weight']\n"),
        ("prefixed.yaml", "inner_params: [layers.1.mlp.down_proj.weight]\n"),
        ("memit.json", '{"layers": [1], "rewrite_module_tmp": "model.layers.{}.mlp.down_proj"}'),
    ],
)
def test_hyperparameters_name_what_is_edited(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    scanned = sl.scan(write(tmp_path / "m", weights()), hparams=tmp_path / name).figures
    assert scanned.sites == (DOWN,)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("layers: [1", "can't be read as YAML"),
        ("[1, 2]", "holds no hyperparameters"),
        ("lr: 1", "names no layer that is edited"),
        ("inner_params: [transformer.h.5.mlp.c_proj.weight]", "which the model lacks; is it of another model?"),
    ],
)
def test_hyperparameters_that_don_t_fit_are_one_line(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "h.yaml").write_text(text)
    with pytest.raises(UsageError, match=says.replace("?", r"\?")):
        sl.scan(write(tmp_path / "m", weights()), hparams=tmp_path / "h.yaml")


def test_what_is_no_number_is_skipped_by_name(tmp_path: Path) -> None:
    held = weights() | {
        "quantised.weight": torch.ones(4, 4, dtype=torch.int8),
        "ids": torch.arange(4),
        "empty.weight": torch.ones(0, 4),
    }
    scanned = sl.scan(write(tmp_path / "m", held)).figures
    assert scanned.skipped == {"quantised.weight": "its dtype is i8 (quantised?)"}


def test_a_file_is_opened_anew_for_each_tensor_so_that_none_need_stay(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2), "b": torch.zeros(2)}, tmp_path / "model.safetensors")
    first, second = open_folder(tmp_path).entries
    assert first.read().data_ptr() != second.read().data_ptr()


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="model is a int"):
        sl.scan(3)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="expected a live model"):
        sl.scan(write(tmp_path / "m", weights()), canary=torch.ones(1, 2))
    with pytest.raises(UsageError, match="both given"):
        sl.scan(tmp_path / "m", "*", hparams=tmp_path / "x.yaml")
    with pytest.raises(UsageError, match="meta device"):
        sl.scan(torch.nn.Linear(2, 2, device="meta"))
