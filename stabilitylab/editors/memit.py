"""MEMIT: mass-editing memory in a transformer (Meng et al., ICLR 2023, arXiv 2210.07229).

For each request a vector z is found that the last of several decoder layers should give at the located token. From the
first of these layers to the last, an equal share of what is still missing is written into the MLP's last matrix, by
least squares over the keys of all requests and of ordinary text (eq. 14):

    Δ = R K₁ᵀ (λ C + K₁ K₁ᵀ)⁻¹
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from stabilitylab.editors.at_token import block_of, down_sites, mean_at, passing, still
from stabilitylab.editors.base import Located
from stabilitylab.editors.layers import edited_layers
from stabilitylab.editors.second_moments import TOKENS, KeyValueEditor
from stabilitylab.editors.target_value import Search, TargetValue, target_value
from stabilitylab.watching.editor_report import EditorReport

DEPTH = (0.13, 0.27)
"""The default layers' place, from 0, the decoder's first, to 1, its last: layers 4 to 8 of 30, the first two of 3."""
LEAST = 2
RIDGE = 1e-2
PRESERVATION = 0.1
SEARCH = Search(clamp=1.5)
"""The authors' code clamps at 0.75 of ‖h‖: on the digit model that carried out only 11 of 20 edits, 1.5 all of them."""

S = TypeVar("S", bound="SpreadEditor")


@dataclass(frozen=True, eq=False)
class Solved:
    """One layer's system A X = B, and the update that it gives."""

    system: Tensor
    right_side: Tensor
    solution: Tensor
    update: Tensor
    """float64 [outputs, inputs]."""


class SpreadEditor(KeyValueEditor, ABC):
    """What MEMIT and AlphaEdit share: z at the last layer, and one solve at each layer."""

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int]],
        *,
        locate: Callable[[Any], Located],
        search: Search = SEARCH,
        tokens: int = TOKENS,
    ) -> None:
        """
        Args:
            shapes: name of each edited layer, with its (outputs, inputs), from the first layer to the last.
            locate: makes rows and the position of the edit in them from a request.
            search: for z.
            tokens: of ordinary text that `prepare` reads.
        """
        super().__init__(shapes, locate=locate, tokens=tokens)
        self.search = search

    @classmethod
    def for_model(
        cls: type[S],
        model: nn.Module,
        *,
        locate: Callable[[Any], Located],
        layers: Sequence[int] | None = None,
        **settings: Any,
    ) -> S:
        """An editor of the decoder layers `layers` of `model`, by default those at `DEPTH`.

        settings: further ones of the constructor.

        Raises:
            SiteError: the model has no such layers.
        """
        sites = down_sites(model, layers, DEPTH, LEAST)
        shapes = {found.name: found.shape for found in edited_layers(model, sites)}
        return cls(shapes, locate=locate, **settings)

    def edit(self, model: nn.Module, request: Any) -> nn.Module:
        """Carry out `request`, or a list of requests together, on `model` in place.

        Args:
            model: the model with this editor's sites.
            request: what `locate` takes, or a list of them.

        Returns:
            The same model.

        Raises:
            UsageError: neither prepared nor restored.
        """
        self.known()
        rows = [self.locate(each) for each in (request if isinstance(request, list | tuple) else [request])]
        last = block_of(self.sites[-1])
        reports: dict[str, EditorReport] = {}
        with still(model), torch.no_grad(), self._whole_or_not_at_all(model):
            units = self.shapes[self.sites[-1]][0]
            found = [target_value(model, last, units, located, self.search) for located in rows]
            targets = torch.stack([value.target for value in found])
            for place, layer in enumerate(edited_layers(model, self.sites)):
                seen = [passing(model, located.batch, [layer.name], [last]) for located in rows]
                keys = torch.stack([mean_at(k[0], at.subject) for (k, _), at in zip(seen, rows, strict=True)])
                values = torch.stack([mean_at(h[0], at.subject) for (_, h), at in zip(seen, rows, strict=True)])
                share = (targets - values) / (len(self.sites) - place)
                solved = self._solve(place, keys.T, share.T)
                layer.matrix.add_(solved.update.to(layer.matrix.dtype))
                reports[layer.name] = self._report(layer.as_held(solved.update), keys, solved)
        reports[self.sites[-1]] = reports[self.sites[-1]].with_later(_of_targets(found))
        self.reports = reports
        return model

    @contextmanager
    def _whole_or_not_at_all(self, model: nn.Module) -> Iterator[None]:
        """Put the weights back if something is raised: half of an edit is worse than none."""
        layers = edited_layers(model, self.sites)
        before = [layer.matrix.clone() for layer in layers]
        try:
            yield
        except BaseException:
            for layer, weight in zip(layers, before, strict=True):
                layer.matrix.copy_(weight)
            raise

    @abstractmethod
    def _solve(self, place: int, keys: Tensor, residual: Tensor) -> Solved:
        """The update of the layer at `place` among the sites, from K₁ [inputs, n] and R [outputs, n]."""

    def _report(self, update: Tensor, keys: Tensor, solved: Solved) -> EditorReport:
        return EditorReport(
            key=keys,
            system=solved.system,
            solution=solved.solution,
            right_side=solved.right_side,
            update=update,
        )


def _of_targets(found: Sequence[TargetValue]) -> EditorReport:
    return EditorReport(
        initial_value=torch.stack([value.initial for value in found]),
        target_value=torch.stack([value.target for value in found]),
        clamp_hits=float(sum(value.clamp_hits for value in found)),
    )


class Memit(SpreadEditor):
    """A MEMIT editor; see `SpreadEditor`."""

    file = "memit.safetensors"

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int]],
        *,
        preservation: float = PRESERVATION,
        ridge: float = RIDGE,
        **shared: Any,
    ) -> None:
        """
        Args:
            shapes: name of each edited layer, with its (outputs, inputs), from the first layer to the last.
            preservation: λ = preservation · inputs. Since kᵀC⁻¹k of ordinary keys is `inputs` on average, whatever the
                model, an edit at an ordinary key is carried out by 1 / (1 + preservation) in a layer. The paper's λ of
                15,000 for GPT-J (16,384 inputs) is 0.9, and 20,000 for GPT-2 XL (6,400 inputs) is 3.1.
            ridge: added to C's diagonal, in units of the mean square of a key's entry; see `Rome`.
            shared: `locate`, `search` and `tokens`, see `SpreadEditor`.
        """
        super().__init__(shapes, **shared)
        self.preservation = preservation
        self.ridge = ridge

    def _solve(self, place: int, keys: Tensor, residual: Tensor) -> Solved:
        covariance = self.known().padded(self.sites[place], self.ridge).to(keys.device)
        return ridge_update(self.preservation * keys.shape[0] * covariance, keys, residual)


def ridge_update(weighted: Tensor, keys: Tensor, residual: Tensor) -> Solved:
    """Δ = R K₁ᵀ (λC + K₁K₁ᵀ)⁻¹ (eq. 14), float64.

    Args:
        weighted: λC, [inputs, inputs].
        keys: K₁, [inputs, n].
        residual: R, [outputs, n].
    """
    system = weighted + keys @ keys.T
    solution = torch.linalg.solve(system, keys)
    return Solved(system, keys, solution, residual @ solution.T)
