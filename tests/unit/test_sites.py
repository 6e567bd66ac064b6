"""Names, patterns and what is found where."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from stabilitylab.errors import SiteError
from stabilitylab.watching.sites import all_sites, find_sites, locate, why_unmeasurable


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.norm = nn.Linear(4, 8), nn.Linear(8, 4), nn.LayerNorm(4)
        self.proj = Conv1D(4, 4)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.ModuleDict({"layers": nn.ModuleList([Block(), Block()])})
        self.scale = nn.Parameter(torch.ones(()))


def names(patterns: str | list[str]) -> list[str]:
    return [site.name for site in find_sites(Model(), patterns)]


def test_a_star_crosses_dots() -> None:
    expected = [f"decoder.layers.{layer}.fc{number}" for layer in (0, 1) for number in (1, 2)]
    assert names("decoder.*.fc[12]") == expected


def test_a_parameter_name_is_its_layer() -> None:
    assert names("decoder.layers.0.fc1.weight") == ["decoder.layers.0.fc1"]
    assert names("decoder.layers.0.fc1.bias") == ["decoder.layers.0.fc1.bias"]
    assert names("scale") == ["scale"]


def test_patterns_add_up_in_model_order() -> None:
    expected = ["decoder.layers.0.fc1", "decoder.layers.1.fc1", "decoder.layers.1.fc2"]
    assert names(["*.1.fc2", "*.0.fc1", "*.fc1"]) == expected


def test_orientation() -> None:
    sites = all_sites(Model())
    found = {name: sites[f"decoder.layers.0.{name}"].orientation for name in ("fc1", "proj", "norm", "fc1.bias")}
    assert found == {"fc1": "out_in", "proj": "in_out", "norm": "none", "fc1.bias": "none"}


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("decoder.layers.0.fc3", r"matches no layer or parameter of Model; did you mean 'decoder.layers.0.fc\d'"),
        ("*.fcl", r"matches no layer.*'.*fc\d"),
        ("decoder.layers.1", "which has no weight of its own; expected a layer, such as 'decoder.layers.1.fc1'"),
        ("zzz", "matches no layer"),
    ],
)
def test_no_match_names_what_is_near(pattern: str, says: str) -> None:
    with pytest.raises(SiteError, match=says) as caught:
        find_sites(Model(), pattern)
    assert "\n" not in str(caught.value)


def test_no_pattern_at_all() -> None:
    with pytest.raises(SiteError, match="no site pattern given"):
        find_sites(Model(), [])


class Adapter(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.key = layer, nn.Parameter(torch.zeros(3))


def test_sites_are_found_anew_in_swapped_wrapped_and_copied_models() -> None:
    model = Model()
    (site,) = find_sites(model, "*.0.fc2")
    original = model.decoder["layers"][0].fc2
    assert locate(model, site)[0] is original
    model.decoder["layers"][0].fc2 = Adapter(original)  # GRACE
    assert locate(model, site)[0] is original
    replacement = model.decoder["layers"][0].fc2 = copy.deepcopy(original)
    assert locate(model, site)[0] is replacement
    wrapper = nn.Module()
    wrapper.model = model
    assert locate(wrapper, site)[0] is replacement
    del model.decoder["layers"][0].fc2
    assert locate(model, site) is None


def test_what_can_not_be_measured_says_why() -> None:
    layer = nn.Linear(2, 2)
    layer.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.uint8), requires_grad=False)
    assert "uint8" in why_unmeasurable(layer.weight)
    with torch.device("meta"):
        meta = nn.Sequential(nn.Linear(2, 2))
    assert "meta device" in why_unmeasurable(meta[0].weight)


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("*.fcl", r"did you mean '\*\.fc1' \(2 layers\), '\*\.fc2' \(2 layers\)"),
        ("decoder.*.fcl", r"did you mean 'decoder\.\*\.fc1' \(2 layers\)"),
        ("encoder.*.fc1", r"did you mean 'decoder\.\*\.fc1' \(2 layers\)\?"),
        ("decodr.*", r"did you mean 'decoder\.\*' \(\d+ layers\)\?"),
        ("decoder.[01].fc1", r"did you mean '\*\.fc1' \(2 layers\)\?"),
    ],
)
def test_a_wrong_pattern_is_answered_by_patterns_and_what_each_would_match(wrong: str, near: str) -> None:
    with pytest.raises(SiteError, match=near):
        find_sites(Model(), wrong)


def test_a_layer_itself_is_no_name_of_one_and_the_error_tells_its_name() -> None:
    model = Model()
    layer = model.get_submodule("decoder.layers.0.fc1")
    for given in (layer, [layer]):
        with pytest.raises(
            SiteError, match=r"sites=<Linear> is no name; .* 'decoder\.layers\.0\.fc1', which is its name"
        ):
            find_sites(model, given)  # type: ignore[arg-type]
    with pytest.raises(SiteError, match=r"sites=<int> is no name; expected names of layers or patterns .* such as '"):
        find_sites(model, 3)  # type: ignore[arg-type]
