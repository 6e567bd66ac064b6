"""The layers that editors change: found by name anew at each edit, whatever the model's family calls them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from stabilitylab.errors import SiteError, did_you_mean
from stabilitylab.watching.sites import orientation_of

_STACK = re.compile(r"(?P<stack>(?:.*\.)?(?:layers|h|blocks|block))\.(?P<number>\d+)\.(?P<leaf>.+)")
_VISION = ("vision", "visual", "qformer", "encoder.")
_UP = ("fc1", "mlp.up_proj", "mlp.gate_up_proj", "mlp.c_fc", "mlp.dense_h_to_4h", "mlp.fc_in", "mlp.fc1")
_DOWN = ("fc2", "mlp.down_proj", "mlp.c_proj", "mlp.dense_4h_to_h", "mlp.fc_out", "mlp.fc2")


@dataclass(frozen=True, eq=False)
class EditedLayer:
    """A linear layer of a model: `nn.Linear`, or GPT-2's Conv1D, whose weight is transposed."""

    name: str
    module: nn.Module
    transposed: bool

    @property
    def parameter(self) -> nn.Parameter:
        """The weight as the module holds it."""
        weight = self.module.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    @property
    def matrix(self) -> Tensor:
        """The weight, detached, as [outputs, inputs]: a view, so that an in-place change of it changes the model."""
        weight = self.parameter.detach()
        return weight.T if self.transposed else weight

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs)."""
        outputs, inputs = self.matrix.shape
        return int(outputs), int(inputs)

    def as_held(self, matrix: Tensor) -> Tensor:
        """A [outputs, inputs] matrix, laid out as the module holds its weight."""
        return matrix.T if self.transposed else matrix


def edited_layers(model: nn.Module, sites: Sequence[str]) -> list[EditedLayer]:
    """The layers named `sites` in `model` as it is now.

    Raises:
        SiteError: no module of that name, or it is no linear layer.
    """
    modules = dict(model.named_modules())
    found = []
    for site in sites:
        if site not in modules:
            raise SiteError(f"the model has no layer {site!r}{did_you_mean(site, modules)}")
        orientation = orientation_of(modules[site])
        if orientation == "none":
            raise SiteError(f"the layer {site!r} is {type(modules[site]).__name__}, expected Linear or Conv1D")
        found.append(EditedLayer(site, modules[site], orientation == "in_out"))
    return found


def mlp_layers(model: nn.Module, which: str) -> dict[int, str]:
    """Names of the decoder's MLP matrices by layer number, in order; towers for images are left out.

    Args:
        model: a decoder, or a model that holds one.
        which: ``"up"``, the matrix (or, in a gated MLP, the linear one of the two) that widens the residual stream, or
            ``"down"``, the one that writes back into it: what ROME and MEMIT edit.

    Raises:
        SiteError: the model has no layers that are named so.
    """
    leaves = {"up": _UP, "down": _DOWN}[which]
    found: dict[int, str] = {}
    for name, _ in model.named_modules():
        match = _STACK.fullmatch(name)
        if match and match["leaf"] in leaves and not any(part in name for part in _VISION):
            found[int(match["number"])] = name
    if not found:
        raise SiteError(
            f"{type(model).__name__} has no decoder layers with an MLP matrix named "
            f"{', '.join(leaves)}; its linear layers are {_some(model)}"
        )
    return dict(sorted(found.items()))


def last_mlp_layers(model: nn.Module, last: int) -> tuple[str, ...]:
    """Both MLP matrices of the `last` decoder layers, in the model's order: what MEND and MALMEN edit."""
    up, down = mlp_layers(model, "up"), mlp_layers(model, "down")
    return tuple(name for number in sorted(down)[-last:] for name in (up.get(number), down[number]) if name is not None)


def _some(model: nn.Module, most: int = 3) -> str:
    names = [name for name, module in model.named_modules() if orientation_of(module) != "none"]
    return ", ".join(repr(name) for name in names[:most]) + (", …" if len(names) > most else "") if names else "none"


def moved(layer: EditedLayer, update: Tensor) -> Tensor:
    """The weight as its module holds it, with an update [outputs, inputs] added; differentiable in the update."""
    weight = layer.matrix
    return layer.as_held((weight.to(update.dtype) + update).to(weight.dtype))
