"""Archives as the authors' own code names and shapes them: which layers they serve, and what is told of each."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import stabilitylab as sl
from stabilitylab.acting.scanning.editors import scan_editor
from stabilitylab.errors import UsageError
from tests.folders import HIDDEN, LAYERS, WIDTH, weights, write

State = dict[str, Tensor]
ROWS = 500
DOWN = tuple(f"model.layers.{layer}.mlp.down_proj" for layer in range(LAYERS))
UP = tuple(f"model.layers.{layer}.mlp.up_proj" for layer in range(LAYERS))


def mend(name: str, inputs: int, outputs: int) -> State:
    """``mend.(inputs, outputs)`` where layers of a shape share one, else ``mend.`` and the parameter's name with #."""
    state = {f"{name}.k": torch.tensor([float(ROWS)])}
    for kind, units in (("u", inputs), ("v", outputs)):
        state |= {f"{name}.{kind}_mean": torch.zeros(units), f"{name}.{kind}_std": torch.ones(units)}
        state |= {f"{name}.{kind}_s": torch.ones(units)}
    return state


def malmen(inputs: int, outputs: int) -> State:
    """A net for each shape, (inputs, outputs): keys first, then gradients."""
    name = f"({inputs}, {outputs})"
    state = {f"{name}.normalizer.{each}": torch.ones(inputs + outputs) for each in ("mean", "var", "std")}
    state[f"{name}.normalizer.n"] = torch.tensor([float(ROWS)])
    return state | {f"{name}.lr.weight": torch.full((2, 1), 1e-6), f"{name}.lamda.weight": torch.zeros(2, 1)}


def stored(folder: Path, state: State) -> Path:
    file = folder / "editor.safetensors"
    save_file(state, file)
    return file


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("models") / "m", weights())


def test_malmen_keeps_keys_first_and_its_name_says_inputs_first(tmp_path: Path, model: Path) -> None:
    state = malmen(HIDDEN, WIDTH)
    state[f"({HIDDEN}, {WIDTH}).normalizer.std"][HIDDEN - 1] = 0.0
    inputs, gradients = sl.scan(model, editor=stored(tmp_path, state)).figures.statistics
    assert (inputs.kind, inputs.units, inputs.layers) == ("u", HIDDEN, DOWN)
    assert (gradients.kind, gradients.units, gradients.layers) == ("v", WIDTH, DOWN)
    assert inputs.zero.first == (HIDDEN - 1,)
    assert not gradients.zero.count


def test_an_editor_of_more_layers_than_the_chosen_sites_is_still_of_this_model(tmp_path: Path, model: Path) -> None:
    state = mend(f"mend.({HIDDEN}, {WIDTH})", HIDDEN, WIDTH) | mend(f"mend.({WIDTH}, {HIDDEN})", WIDTH, HIDDEN)
    found = sl.scan(model, "*.down_proj", editor=stored(tmp_path, state)).figures.statistics
    assert {each.name: each.layers for each in found} == {
        f"mend.({HIDDEN}, {WIDTH})": DOWN,
        f"mend.({WIDTH}, {HIDDEN})": UP,
    }


@pytest.mark.parametrize("pattern", [None, "*.c_proj"])
def test_a_conv1d_keeps_inputs_first(tmp_path: Path, pattern: str | None) -> None:
    layers = {"h.0.mlp.c_fc.weight": torch.randn(WIDTH, HIDDEN), "h.0.mlp.c_proj.weight": torch.randn(HIDDEN, WIDTH)}
    gpt2 = write(tmp_path / "gpt2", layers, "gpt2")
    file = stored(tmp_path, mend(f"mend.({HIDDEN}, {WIDTH})", HIDDEN, WIDTH))
    for each in sl.scan(gpt2, pattern, editor=file).figures.statistics:
        assert each.layers == ("h.0.mlp.c_proj",)


def test_one_that_is_named_by_its_parameter_serves_that_layer_alone(tmp_path: Path, model: Path) -> None:
    file = stored(tmp_path, mend("mend.model#layers#3#mlp#down_proj#weight", HIDDEN, WIDTH))
    assert {each.layers for each in sl.scan(model, editor=file).figures.statistics} == {(DOWN[3],)}


def test_a_mend_that_was_never_shown_a_row_is_empty_and_not_broken(tmp_path: Path, model: Path) -> None:
    state = {name: torch.full_like(held, math.nan) for name, held in mend("mend.x", HIDDEN, WIDTH).items()}
    (told,) = sl.scan(model, editor=stored(tmp_path, state)).cautions
    assert (told.rule, told.urgency) == ("normaliser-empty", "fatal")


def test_what_else_of_a_hypernetwork_is_nan_is_told(tmp_path: Path, model: Path) -> None:
    state = malmen(HIDDEN, WIDTH)
    state[f"({HIDDEN}, {WIDTH}).lamda.weight"][1] = math.nan
    (told,) = sl.scan(model, editor=stored(tmp_path, state)).cautions
    assert (told.rule, told.urgency) == ("hypernetwork-nan", "fatal")
    assert "lamda.weight" in told.says


def test_a_spread_of_zero_in_float16_may_be_one_that_was_rounded(tmp_path: Path, model: Path) -> None:
    state = {name: held.half() for name, held in mend(f"mend.({HIDDEN}, {WIDTH})", HIDDEN, WIDTH).items()}
    state[f"mend.({HIDDEN}, {WIDTH}).u_std"][4] = 1e-9  # below what float16 can hold
    (told,) = sl.scan(model, editor=stored(tmp_path, state)).cautions
    assert told.rule == "spread-zero"
    assert "float16" in told.says


def test_the_least_spreads_are_named_first(tmp_path: Path, model: Path) -> None:
    state = mend(f"mend.({HIDDEN}, {WIDTH})", HIDDEN, WIDTH)
    state[f"mend.({HIDDEN}, {WIDTH}).u_std"][:10] = torch.linspace(9e-4, 1e-5, 10)
    found = sl.scan(model, editor=stored(tmp_path, state)).figures.statistics[0].tiny
    assert (found.count, found.first[0]) == (10, 9)


@pytest.mark.parametrize(
    ("state", "says"),
    [
        (mend("mend.(9, 7)", 9, 7), "mend.(9, 7) is of layers of 9 inputs and 7 outputs; the model has none"),
        (malmen(9, 7), "is of layers of 9 inputs and 7 outputs; the model has none"),
        ({"cache_c": torch.zeros(2, 9, 9)}, "of layers of 9 inputs; the model has none"),
    ],
)
def test_an_archive_of_another_model_is_one_line(tmp_path: Path, model: Path, state: State, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        sl.scan(model, editor=stored(tmp_path, state))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


class ULTRAEDIT:
    """As the authors' class is called, and EasyEdit's."""

    def __init__(self) -> None:
        self.lifelong_normalizer = nn.Module()
        for name in ("n", "mean", "var", "std"):
            units = 1 if name == "n" else HIDDEN + WIDTH
            self.lifelong_normalizer.register_buffer(name, torch.zeros(units))


def test_a_live_ultraedit_is_meant_to_be_empty(model: Path) -> None:
    live = nn.Sequential(nn.Linear(HIDDEN, WIDTH))
    (told,) = [each for each in sl.scan(live, editor=ULTRAEDIT()).cautions if each.rule == "normaliser-empty"]
    assert told.urgency == "note"


def test_a_cache_of_keys_is_told_of_once_and_only_where_it_holds_some(tmp_path: Path, model: Path) -> None:
    cache = torch.zeros(3, HIDDEN, HIDDEN)
    file = stored(tmp_path, {"cache_c": cache})
    assert not sl.scan(model, editor=file).cautions
    cache[1, 2, 2] = cache[2, 5, 5] = 4.0
    (told,) = sl.scan(model, editor=stored(tmp_path, {"cache_c": cache})).cautions
    assert (told.rule, told.urgency, told.cause) == ("cache-not-empty", "note", "cache-leaked")
    assert "cache_c.1, cache_c.2" in told.says
    live = type("Held", (), {"cache_c": cache})()
    assert [each.what for each in scan_editor(live).moments] == ["cache"] * 3


@pytest.mark.parametrize("named", ["null_space_project.pt", "P.pt", "mine.pt"])
def test_a_projection_alone_in_a_file_is_known_by_what_it_is(tmp_path: Path, model: Path, named: str) -> None:
    half = torch.diag((torch.arange(HIDDEN) < HIDDEN // 2).float())
    torch.save(half[None].repeat(2, 1, 1), tmp_path / named)
    found = sl.scan(model, editor=tmp_path / named, pickles=True).figures.moments
    assert [(each.what, each.rank) for each in found] == [("projection", HIDDEN // 2)] * 2


def test_square_weights_of_a_hypernetwork_are_no_projection(tmp_path: Path, model: Path) -> None:
    state = mend(f"mend.({HIDDEN}, {WIDTH})", HIDDEN, WIDTH) | {"mend.mlp1.layers.0.weight": torch.eye(HIDDEN)}
    save_file(state, tmp_path / "project.safetensors")
    assert not sl.scan(model, editor=tmp_path / "project.safetensors").figures.moments
