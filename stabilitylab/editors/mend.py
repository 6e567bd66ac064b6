"""MEND: model editor networks with gradient decomposition (Mitchell et al., ICLR 2022, arXiv 2110.11309).

The gradient of the loss of the wanted answer is, at each edited layer, a sum over tokens of δ uᵀ. A small hypernetwork
turns u and δ into other factors, and the layer's weight moves by minus a learned rate times their product. There are no
guards here: whatever comes out is added to the weights, as in the editors that people use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stabilitylab.editors.base import Batch
from stabilitylab.editors.factors import Factors
from stabilitylab.editors.hypernetwork import RANK, HypernetworkEditor, default_sites
from stabilitylab.editors.layers import edited_layers
from stabilitylab.editors.meta_training import Training
from stabilitylab.editors.transform import GradientTransform

__all__ = ["Mend", "default_sites"]

FILE = "mend.safetensors"
EDIT_LR = 1e-3
"""What the learned edit rates start from."""


class Mend(HypernetworkEditor):
    """A trained (or, from the constructor, an untrained) MEND editor. It does not hold the model that it edits."""

    name = "MEND"
    file = FILE
    as_it_is = ("rows", "u_mean", "u_std", "v_mean", "v_std", "edit_lrs")
    training_settings = Training(groups=4, rates={"edit_lrs": 3e-5})
    """The locality KL weighs 30 against 1 of the edit loss; the authors weigh them 1 and 0.1. Less makes larger updates
    and an earlier NaN."""

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int]],
        *,
        batch_of: Callable[[Any], Batch],
        rank: int = RANK,
        seed: int = 0,
    ) -> None:
        """See `HypernetworkEditor`."""
        super().__init__(shapes, batch_of=batch_of, rank=rank, seed=seed)
        self.edit_lrs = nn.Parameter(torch.full((len(self.sites),), EDIT_LR))

    def transform(self, inputs: int, outputs: int, rank: int, layers: int) -> nn.Module:
        """A new `GradientTransform`."""
        return GradientTransform(inputs, outputs, rank, layers)

    def updates(self, factors: Factors) -> list[Tensor]:
        """What is added to each site's weight, float32 [outputs, inputs], from its raw factors (u, δ)."""
        found = []
        for rate, (transform, index, raw_u, raw_v) in zip(self.edit_lrs, self.placed(factors), strict=True):
            u, v = transform(raw_u, raw_v, index)
            found.append(-rate * (v.T @ u))
        return found

    def edit(self, model: nn.Module, request: Any) -> nn.Module:
        """Carry out `request` on `model` in place, by one forward and one backward; nothing is checked or undone.

        Args:
            model: the model with this editor's sites.
            request: what `batch_of` takes; for the testbed's an `EditRecord` or a mapping of its fields.

        Returns:
            The same model.
        """
        factors = self.factors(model, self.batch_of(request))
        with torch.no_grad():
            updates = self.updates(factors)
            for layer, update in zip(edited_layers(model, self.sites), updates, strict=True):
                layer.matrix.add_(update.to(layer.matrix.dtype))
        return model
