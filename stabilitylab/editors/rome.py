"""ROME: rank-one model editing (Meng et al., NeurIPS 2022, arXiv 2202.05262).

One MLP's last matrix W is taken for a memory of values by keys. Of all matrices that answer the key k* with the value
v*, the one that is nearest to W as measured on ordinary keys is Ŵ = W + Λ (C⁻¹k*)ᵀ (eq. 2). k* is a mean over the rows
of a located request (`at_token.mean_at`), on both sides of the formula: mixing it with the key of one row is what makes
single edits destroy a model (Gupta et al., "Rebuilding ROME", arXiv 2403.07175). There are no guards here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stabilitylab.editors.at_token import down_sites, mean_at, passing, still
from stabilitylab.editors.base import Located
from stabilitylab.editors.layers import edited_layers
from stabilitylab.editors.second_moments import TOKENS, KeyValueEditor
from stabilitylab.editors.target_value import Search, target_value
from stabilitylab.watching.editor_report import EditorReport

DEPTH = 0.17
"""The default layer's place, from 0, the decoder's first layer, to 1, its last: layer 5 of 30, 1 of 3."""
RIDGE = 1e-2


class Rome(KeyValueEditor):
    """A ROME editor of one layer; see `KeyValueEditor`."""

    file = "rome.safetensors"

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int]],
        *,
        locate: Callable[[Any], Located],
        search: Search = Search(),  # noqa: B008 - frozen
        ridge: float = RIDGE,
        tokens: int = TOKENS,
    ) -> None:
        """
        Args:
            shapes: name of the edited layer, with its (outputs, inputs).
            locate: makes rows and the position of the edit in them from a request.
            search: for v*.
            ridge: added to C's diagonal, in units of the mean square of a key's entry: C of few tokens, or with a unit
                that never fired on them, has no inverse. 0 is the paper's formula.
            tokens: of ordinary text that `prepare` reads.
        """
        super().__init__(shapes, locate=locate, tokens=tokens)
        self.search = search
        self.ridge = ridge

    @classmethod
    def for_model(
        cls,
        model: nn.Module,
        *,
        locate: Callable[[Any], Located],
        layer: int | None = None,
        search: Search = Search(),  # noqa: B008 - frozen
        ridge: float = RIDGE,
        tokens: int = TOKENS,
    ) -> Rome:
        """An editor of the decoder layer `layer` of `model`, by default the one at `DEPTH`.

        Raises:
            SiteError: the model has no such layer.
        """
        sites = down_sites(model, None if layer is None else [layer], (DEPTH, DEPTH))
        shapes = {found.name: found.shape for found in edited_layers(model, sites)}
        return cls(shapes, locate=locate, search=search, ridge=ridge, tokens=tokens)

    def edit(self, model: nn.Module, request: Any) -> nn.Module:
        """Carry out `request` on `model` in place.

        Args:
            model: the model with this editor's site.
            request: what `locate` takes.

        Returns:
            The same model.

        Raises:
            UsageError: neither prepared nor restored.
        """
        site = self.sites[0]
        moments = self.known()
        located = self.locate(request)
        with still(model):
            layer = edited_layers(model, [site])[0]
            key = mean_at(passing(model, located.batch, inputs=[site])[0][0], located.subject)
            found = target_value(model, site, layer.shape[0], located, self.search)
            covariance = moments.padded(site, self.ridge).to(key.device)
            update, direction = rank_one_update(covariance, key, found.shift)
            with torch.no_grad():
                layer.matrix.add_(update.to(layer.matrix.dtype))
        self.reports = {
            site: EditorReport(
                key=key,
                direction=direction,
                initial_value=found.initial,
                target_value=found.target,
                clamp_hits=found.clamp_hits,
                covariance=covariance,
                update=layer.as_held(update),
            )
        }
        return model


def rank_one_update(covariance: Tensor, key: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Λ uᵀ [outputs, inputs] with Λ = (v* − W k*) / (uᵀk*), and its direction u = C⁻¹k* [inputs] (eq. 2).

    Args:
        covariance: C, [inputs, inputs], float64.
        key: k*, [inputs].
        shift: v* − W k*, [outputs].
    """
    direction = torch.linalg.solve(covariance, key)
    return torch.outer(shift / (direction @ key), direction), direction
