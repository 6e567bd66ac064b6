"""A scan of editors' files in the layouts that they really have, with defects planted; and of live editors."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import stabilitylab as sl
from stabilitylab.editors.mend import Mend
from stabilitylab.errors import UsageError
from stabilitylab.testbed import blip2_digits
from tests.folders import HIDDEN, WIDTH, weights, write

State = dict[str, Tensor]
DOWNS = "model.layers.0.mlp.down_proj, model.layers.1.mlp.down_proj"


def mend() -> State:
    """As the authors and EasyEdit save it: one normaliser for layers of one shape, named by that shape."""
    name = f"mend.({HIDDEN}, {WIDTH})"  # (inputs, outputs)
    return {
        "edit_lrs": torch.full((5,), 1e-4),
        f"{name}.u_mean": torch.zeros(HIDDEN),
        f"{name}.u_std": torch.rand(HIDDEN) + 0.5,
        f"{name}.v_mean": torch.zeros(WIDTH),
        f"{name}.v_std": torch.rand(WIDTH) + 0.5,
        f"{name}.u_s": torch.ones(HIDDEN),
        f"{name}.k": torch.tensor([5000]),
        f"{name}.mlp.layers.0.u": torch.rand(4, 4),
    }


def running(prefix: str = "", units: int = HIDDEN + WIDTH) -> State:
    dot = f"{prefix}." if prefix else ""
    return {
        f"{dot}n": torch.tensor([800.0]),
        f"{dot}mean": torch.zeros(1, units),
        f"{dot}var": torch.ones(1, units),
        f"{dot}std": torch.ones(1, units),
    }


def malmen() -> State:
    name = f"({HIDDEN}, {WIDTH})"  # (inputs, outputs)
    return running(f"{name}.normalizer") | {
        f"{name}.lr.weight": torch.ones(5, 1),
        f"{name}.lamda.weight": torch.ones(5, 1),
    }


def pickled(folder: Path, state: Any) -> Path:
    """Archives of MEND have no suffix, and hold the optimiser too."""
    torch.save({"model": state, "opt": {"state": {}}, "step": 3}, folder / "MEND")
    return folder / "MEND"


def moments(folder: Path, matrix: Tensor, count: int = 100_000) -> Path:
    """As ``util/runningstats.py`` of ROME and MEMIT saves a `SecondMoment`: the sum, and over how many."""
    file = folder / "model.layers.1.mlp.down_proj_float32_mom2_100000.npz"
    arrays: dict[str, Any] = {
        "mom2.constructor": "util.runningstats.SecondMoment()",
        "mom2.mom2": (matrix * count).numpy(),
        "mom2.count": count,
        "sample_size": 100_000,
    }
    np.savez(file, **arrays)
    return file


def positive(size: int = HIDDEN) -> Tensor:
    root = torch.randn(size, 4 * size)
    return root @ root.T / (4 * size)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("models") / "m", weights())


def rules(model: Path, file: Path) -> list[tuple[str, str]]:
    return [(each.rule, each.urgency) for each in sl.scan(model, editor=file, pickles=True).cautions]


def test_sound_archives_are_warned_of_nothing_and_are_read_in_full(tmp_path: Path, model: Path) -> None:
    scanned = sl.scan(model, editor=pickled(tmp_path, mend()), pickles=True)
    assert not scanned.cautions
    inputs, gradients = scanned.figures.statistics
    assert (inputs.editor, inputs.kind, inputs.units, inputs.rows) == ("MEND", "u", HIDDEN, 5000)
    assert (gradients.kind, gradients.units) == ("v", WIDTH)
    assert inputs.layers == tuple(f"model.layers.{layer}.mlp.down_proj" for layer in range(5))
    assert scanned.figures.rates[0].values == pytest.approx([1e-4] * 5)
    save_file(malmen(), tmp_path / "malmen.safetensors")
    found = sl.scan(model, editor=tmp_path / "malmen.safetensors").figures
    assert [(each.editor, each.kind, each.units) for each in found.statistics] == [
        ("MALMEN", "u", HIDDEN),
        ("MALMEN", "v", WIDTH),
    ]
    assert found.rates[0].editor == "MALMEN"
    assert rules(model, moments(tmp_path, positive())) == []


def put(name: str, change: Callable[[Tensor], object], make: Callable[[], State] = mend) -> Callable[[Path], Path]:
    def plant(folder: Path) -> Path:
        state = make()
        change(next(tensor for key, tensor in state.items() if key.endswith(name)))
        return pickled(folder, state)

    return plant


def at(*units: int, value: float) -> Callable[[Tensor], object]:
    return lambda tensor: tensor.view(-1).index_fill_(0, torch.tensor(units), value)


def projection(folder: Path, matrix: Tensor) -> Path:
    torch.save(matrix, folder / "null_space_project.pt")
    return folder / "null_space_project.pt"


def spread(count: int) -> Tensor:
    return torch.diag((torch.arange(HIDDEN) < count).float())


def asymmetric() -> Tensor:
    matrix = positive()
    matrix[0, 1] += 1.0
    return matrix


def without(row: int) -> Tensor:
    matrix = positive()
    matrix[row], matrix[:, row] = 0.0, 0.0
    return matrix


DEFECTS: dict[str, tuple[Callable[[Path], Path], tuple[str, str]]] = {
    "a spread of 0": (put("u_std", at(17, value=0.0)), ("spread-zero", "fatal")),
    "a spread that is NaN": (put("v_std", at(3, value=math.nan)), ("spread-nan", "fatal")),
    "a mean that is NaN": (put("u_mean", at(3, value=math.nan)), ("spread-nan", "fatal")),
    "next to no spread": (put("u_std", at(5, 6, value=1e-5)), ("spread-tiny", "risk")),
    "no unit with a spread": (put("u_std", at(*range(HIDDEN), value=0.0)), ("spread-zero", "fatal")),
    "one row": (put(".k", at(0, value=1)), ("spread-of-few-rows", "fatal")),
    "a few rows": (put(".k", at(0, value=4)), ("spread-of-few-rows", "risk")),
    "no row yet": (put(".k", at(0, value=0)), ("normaliser-empty", "fatal")),
    "an empty normaliser of MALMEN": (put(".n", at(0, value=0.0), malmen), ("normaliser-empty", "fatal")),
    "an empty normaliser of UltraEdit": (put("n", at(0, value=0.0), running), ("normaliser-empty", "note")),
    "a rate that is NaN": (put("edit_lrs", at(1, value=math.nan)), ("rate-nan", "fatal")),
    "a rate of 0": (put("edit_lrs", at(1, value=0.0)), ("rate-lost", "risk")),
    "a negative rate": (put("lr.weight", at(1, value=-1.0), malmen), ("rate-lost", "risk")),
    "moments that are NaN": (lambda folder: moments(folder, positive() * math.nan), ("moments-nan", "fatal")),
    "moments with a negative eigenvalue": (
        lambda folder: moments(folder, positive() - torch.eye(HIDDEN)),
        ("moments-negative", "fatal"),
    ),
    "moments that are not symmetric": (lambda folder: moments(folder, asymmetric()), ("moments-not-symmetric", "risk")),
    "moments of few tokens": (lambda folder: moments(folder, positive(), 20), ("moments-of-few-tokens", "risk")),
    "an input that was always 0": (lambda folder: moments(folder, without(3)), ("moments-zero-rows", "risk")),
    "moments of low rank": (
        lambda folder: moments(folder, torch.ones(HIDDEN, HIDDEN) + 1e-12 * torch.eye(HIDDEN)),
        ("moments-singular", "risk"),
    ),
    "a projection that is none": (lambda folder: projection(folder, positive()[None]), ("no-projection", "fatal")),
    "a projection that frees all": (
        lambda folder: projection(folder, spread(HIDDEN)[None]),
        ("projection-extreme", "note"),
    ),
    "a projection that frees next to nothing": (
        lambda folder: projection(folder, spread(2)[None]),
        ("projection-extreme", "note"),
    ),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_planted_defect_is_found_and_nothing_else(tmp_path: Path, model: Path, defect: str) -> None:
    plant, expected = DEFECTS[defect]
    assert rules(model, plant(tmp_path)) == [expected]


def test_a_sound_projection_is_warned_of_nothing(tmp_path: Path, model: Path) -> None:
    scanned = sl.scan(model, editor=projection(tmp_path, spread(HIDDEN // 2)[None].repeat(2, 1, 1)), pickles=True)
    assert not scanned.cautions
    assert [each.rank for each in scanned.figures.moments] == [HIDDEN // 2] * 2


def test_a_spread_of_zero_is_said_with_its_unit_its_layers_and_what_it_is_divided_by(
    tmp_path: Path, model: Path
) -> None:
    plant, _ = DEFECTS["a spread of 0"]
    (told,) = sl.scan(model, DOWNS.split(", "), editor=plant(tmp_path), pickles=True).cautions
    assert told.says == (
        f"Unit 17 of {DOWNS} has zero spread in MEND's statistics of the inputs: its first non-zero value is divided by"
        " 1e-7."
    )
    assert told.cause == "normaliser-zero-std"


def test_moments_are_those_of_a_naive_decomposition(tmp_path: Path, model: Path) -> None:
    matrix = positive()
    (found,) = sl.scan(model, editor=moments(tmp_path, matrix, 1_000)).figures.moments
    values = np.linalg.svd((matrix * 1_000).numpy().astype(np.float64) / 1_000, compute_uv=False)
    assert (found.layer, found.size, found.tokens, found.rank) == (
        "model.layers.1.mlp.down_proj",
        HIDDEN,
        1_000,
        HIDDEN,
    )
    assert found.largest == pytest.approx(values[0], rel=1e-6)
    assert found.condition == pytest.approx(values[0] / values[-1], rel=1e-3)


def test_our_own_files_are_known(tmp_path: Path, model: Path) -> None:
    layer = "model.layers.0.mlp.down_proj"
    save_file(
        {f"{layer}.moment": positive(), f"{layer}.power": torch.tensor(1.0)},
        tmp_path / "rome.safetensors",
        metadata={"editor": "Rome", "tokens": "20000"},
    )
    (found,) = sl.scan(model, editor=tmp_path / "rome.safetensors").figures.moments
    assert (found.layer, found.tokens) == (layer, 20_000)
    shipped = blip2_digits.CHECKPOINTS
    scanned = sl.scan(
        shipped / blip2_digits.FILE, editor=[shipped / "mend.safetensors", shipped / "malmen.safetensors"]
    )
    assert {each.editor for each in scanned.figures.statistics} == {"MEND", "MALMEN"}
    assert all(each.layers for each in scanned.figures.statistics)
    assert not [caution for caution in scanned.cautions if "MEND" in caution.says or "MALMEN" in caution.says]


def test_a_live_editor_is_looked_at_as_its_file_is() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(6, 4))
    editor = Mend({"0": (4, 6)}, batch_of=lambda request: request)
    found = sl.scan(model, "0", editor=editor)
    assert {each.kind for each in found.figures.statistics} == {"u", "v"}
    keeps = SimpleNamespace(P=torch.eye(6)[None], cache_c=torch.zeros(1, 6, 6), COV_CACHE={("m", "0"): positive(6)})
    assert {each.what for each in sl.scan(model, editor=keeps).figures.moments} == {"moments", "projection", "cache"}


def named_in_no_alphabet() -> bytes:
    """An archive one of whose names says that it is UTF-8, and is not."""
    written = io.BytesIO()
    np.savez(written, a=np.ones(2))
    data = bytearray(written.getvalue())
    entry = data.index(b"PK\x01\x02")
    data[entry + 9] |= 8
    data[entry + 46] = 0xFF
    return bytes(data)


class Config:
    """An object beside the tensors, as the archives of MEND's authors have."""


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda folder: folder / "nothing", "no such file"),
        (lambda folder: folder, "is a folder"),
        (lambda folder: pickled(folder, {"a": torch.ones(2)}), "holds the state of no editor that is known"),
        (lambda folder: pickled(folder, mend() | {"cfg": Config()}), "holds more than tensors"),
        (lambda folder: put("u_std", lambda _: None)(folder).write_bytes(b"\x80\x02"), "can't be read"),
        (lambda folder: (folder / "x.npz").write_bytes(b"PK\x03\x04 no zip"), "can't be read as .npz"),
        (lambda folder: (folder / "x.npz").write_bytes(named_in_no_alphabet()), "can't be read as .npz"),
        (lambda folder: (folder / "x.safetensors").write_bytes(b"12345678{"), "can't be read as safetensors"),
        (lambda folder: (folder / "x").write_bytes(b"text"), "can't be read"),
    ],
)
def test_what_is_no_archive_is_one_line(tmp_path: Path, model: Path, make: Callable[[Path], Any], says: str) -> None:
    made = make(tmp_path)
    file = made if isinstance(made, Path) else next(each for each in tmp_path.iterdir())
    with pytest.raises(UsageError, match=says) as caught:
        sl.scan(model, editor=file, pickles=True)
    assert "\n" not in str(caught.value)


def test_a_pickle_needs_leave_and_an_archive_the_right_model(tmp_path: Path, model: Path) -> None:
    with pytest.raises(UsageError, match="--pickle"):
        sl.scan(model, editor=pickled(tmp_path, mend()))
    other = write(tmp_path / "other", {"layer.weight": torch.rand(7, 9)})
    with pytest.raises(UsageError, match="is of another model"):
        sl.scan(other, editor=pickled(tmp_path, mend()), pickles=True)


@pytest.mark.parametrize(("value", "what"), [(0.0, "are 0:"), (-1.0, "are 0 or below:")])
def test_rates_that_are_lost_are_called_what_they_are(tmp_path: Path, model: Path, value: float, what: str) -> None:
    put("edit_lrs", at(1, value=value))(tmp_path)
    scanned = sl.scan(model, editor=next(iter(tmp_path.glob("*"))), pickles=True)
    (says,) = [caution.says for caution in scanned.cautions if caution.rule == "rate-lost"]
    assert what in says
