"""AlphaEdit: null-space constrained editing (Fang et al., ICLR 2025, arXiv 2410.02355).

As MEMIT, but the update is projected so that it answers the keys of ordinary text with nothing, and it keeps what the
keys K_p of all earlier edits got (eq. 14):

    Δ = R K₁ᵀ P (K_p K_pᵀ P + K₁ K₁ᵀ P + I)⁻¹
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stabilitylab.editors.memit import Solved, SpreadEditor
from stabilitylab.editors.second_moments import SecondMoments

NULL_SHARE = 0.02
L2 = 1e-2


class AlphaEdit(SpreadEditor):
    """An AlphaEdit editor; see `SpreadEditor`. All edited layers have the same number of inputs.

    P: float32 [layers, inputs, inputs], the projections; None before `prepare` or `restore`. cache_c: float32 of the
    same shape, K_p K_pᵀ at each layer: it belongs to this object and starts at zero.
    """

    file = "alphaedit.safetensors"

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int]],
        *,
        null_share: float = NULL_SHARE,
        l2: float = L2,
        **shared: Any,
    ) -> None:
        """
        Args:
            shapes: name of each edited layer, with its (outputs, inputs), from the first layer to the last.
            null_share: the null space is spanned by C's eigenvectors of the smallest eigenvalues, as many as hold at
                most this share of an ordinary key's mean square norm. (The paper takes eigenvalues below 2e-2, a number
                that has units. Small models leave no room below it: on SmolLM2-135M the share 0.02 gives 220 of 1,536
                dimensions, which hold 11% of a subject's key.)
            l2: the weight of I, in units of the mean square norm of a key. (The paper's is 1, absolute.)
            shared: `locate`, `search` and `tokens`, see `SpreadEditor`.
        """
        super().__init__(shapes, **shared)
        self.null_share = null_share
        self.l2 = l2
        self.P: Tensor | None = None
        self.cache_c: Tensor | None = None

    def _learned(self, moments: SecondMoments) -> None:
        super()._learned(moments)
        found = []
        for site in self.sites:
            matrix = moments.matrices[site]
            found.append(null_space(matrix, self.null_share * moments.power[site] * matrix.shape[0]))
        self.P = torch.stack(found).float()
        self.cache_c = torch.zeros_like(self.P)

    @contextmanager
    def _whole_or_not_at_all(self, model: nn.Module) -> Iterator[None]:
        cache = None if self.cache_c is None else self.cache_c.clone()
        try:
            with super()._whole_or_not_at_all(model):
                yield
        except BaseException:
            self.cache_c = cache
            raise

    def _solve(self, place: int, keys: Tensor, residual: Tensor) -> Solved:
        assert self.P is not None
        assert self.cache_c is not None
        weight = self.l2 * keys.shape[0] * self.known().power[self.sites[place]]
        projection, cache = (held[place].to(keys.device).double() for held in (self.P, self.cache_c))
        solved = projected_update(projection, cache, keys, residual, weight)
        # The keys of a layer hang on earlier layers only, which are edited by now: these are the edited model's.
        self.cache_c[place] += (keys @ keys.T).to(self.cache_c)
        return solved


def null_space(moment: Tensor, most: float) -> Tensor:
    """P [inputs, inputs], float64: projects onto the eigenvectors of the smallest eigenvalues, which sum to `most`."""
    values, vectors = torch.linalg.eigh(moment.double())
    kept: Tensor = vectors[:, values.clamp(min=0).cumsum(dim=0) <= most]
    return kept @ kept.T


def projected_update(projection: Tensor, cache: Tensor, keys: Tensor, residual: Tensor, weight: float) -> Solved:
    """Δ = R K₁ᵀP (K_pK_pᵀP + K₁K₁ᵀP + weight · I)⁻¹ (eq. 14), float64, solved in its transposed form.

    Args:
        projection: P, [inputs, inputs].
        cache: K_pK_pᵀ, [inputs, inputs].
        keys: K₁, [inputs, n].
        residual: R, [outputs, n].
        weight: of the identity; the paper's is 1.
    """
    identity = torch.eye(keys.shape[0], dtype=keys.dtype, device=keys.device)
    system = projection @ (cache + keys @ keys.T) + weight * identity
    right_side = projection @ keys
    solution = torch.linalg.solve(system, right_side)
    return Solved(system, right_side, solution, residual @ solution.T)
