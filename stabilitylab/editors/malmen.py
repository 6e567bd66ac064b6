"""MALMEN: massive editing by meta learning (Tan, Zhang and Fu, ICLR 2024, arXiv 2311.04661).

As in MEND, a hypernetwork turns each token's key u and value gradient δ into others, ũ and δ̃. They are not added to the
weight, but say by how much the layer's output at that token should change: d = -η (uᵀũ) δ̃. One shift S of the weight
for all tokens of all edits is then the regularised least-squares solution of S u = d,

    minimise Σ ‖S u - d‖² + λ ‖S‖²:   Sᵀ = (KᵀK + λ I)⁻¹ Kᵀ D,

with a row of K and D for each token. η and λ are learned for each layer, through the solve. The tokens are those that
predict a word of the answer: with all tokens of the prompt, less success came with less locality.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from stabilitylab.editors.base import Batch
from stabilitylab.editors.factors import Factors, joined
from stabilitylab.editors.hypernetwork import RANK, HypernetworkEditor
from stabilitylab.editors.layers import EditedLayer, edited_layers
from stabilitylab.editors.meta_training import Training
from stabilitylab.editors.transform import LowRankLayer, take_in
from stabilitylab.errors import UsageError
from stabilitylab.watching.editor_report import EditorReport

FILE = "malmen.safetensors"
ETA = 1e-2
"""What the learned rates η start from."""
_IGNORED = -100  # transformers' label of a token that is no part of the loss
_ROWS_AND_TOKENS = 2


class RunningStatistics(nn.Module):
    """Normalises the concatenated factors by their mean and standard deviation over the `n` tokens seen in training.

    `mean` and `var` are in float64. `std` is in float32, the precision of what is normalised; its machine epsilon is
    added to it, as in the authors' code: a unit that never fired has a deviation of zero.
    """

    n: Tensor
    mean: Tensor
    var: Tensor
    std: Tensor
    clamp: float | None = None
    """How many standard deviations a normalised input may be away from its mean; None: any number, as in the paper."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("n", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(size, dtype=torch.double))
        self.register_buffer("var", torch.ones(size, dtype=torch.double))
        self.register_buffer("std", torch.ones(size))

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Take more rows [tokens, units] into the statistics; see `take_in`."""
        if len(x) == 0:
            return
        take_in(x, int(self.n), self.mean, self.var)
        self.std.copy_(self.var.sqrt())
        self.n.add_(len(x))

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, units], normalised; the statistics stay."""
        x = (x - self.mean.to(x.dtype)) / (self.std + torch.finfo(self.std.dtype).eps)
        return x if self.clamp is None else x.clamp(-self.clamp, self.clamp)


class ShiftTransform(nn.Module):
    """The hypernetwork of all edited layers of one shape, and their learned η (`lr`) and log λ (`lamda`)."""

    def __init__(self, inputs: int, outputs: int, rank: int, layers: int) -> None:
        super().__init__()
        self.key_size = inputs
        size = inputs + outputs
        self.normaliser = RunningStatistics(size)
        self.hidden = LowRankLayer(size, rank, layers, rectified=True)
        self.output = LowRankLayer(size, rank, layers, rectified=False)
        self.lr = nn.Embedding(layers, 1)
        self.lamda = nn.Embedding(layers, 1)
        nn.init.constant_(self.lr.weight, ETA)
        nn.init.zeros_(self.lamda.weight)

    def observe(self, u: Tensor, v: Tensor) -> None:
        """Take rows of raw factors u [tokens, inputs] and v [tokens, outputs] into the statistics."""
        self.normaliser.observe(torch.cat([u, v], dim=-1))

    def forward(self, u: Tensor, v: Tensor, layer_index: int) -> tuple[Tensor, Tensor]:
        """Pseudo keys [tokens, inputs] and pseudo value gradients [tokens, outputs] from RAW factors.

        The index counts the edited layers of this shape. At the start of training what comes out is what went in,
        normalised.
        """
        x = self.normaliser(torch.cat([u, v], dim=-1))
        x = self.output(self.hidden(x, layer_index), layer_index)
        return x[:, : self.key_size], x[:, self.key_size :]

    def differences(self, u: Tensor, v: Tensor, layer_index: int) -> Tensor:
        """d = -η (uᵀũ) δ̃ [tokens, outputs]: how the layer's output at each token should change."""
        pseudo_u, pseudo_v = self(u, v, layer_index)
        found: Tensor = -self.lr.weight[layer_index] * (u * pseudo_u).sum(-1, keepdim=True) * pseudo_v
        return found

    def regularisation(self, layer_index: int) -> Tensor:
        """λ of one layer, float64, without dimensions."""
        return self.lamda.weight[layer_index, 0].double().exp()


def ridge(keys: Tensor, differences: Tensor, regularisation: Tensor) -> Tensor:
    """The S [outputs, inputs] that minimises Σ ‖S u - d‖² + λ ‖S‖² over rows u of `keys` and d of `differences`.

    Solved by the normal equations or, for fewer tokens than inputs, by the smaller system of
    Kᵀ (K Kᵀ + λ I)⁻¹ D = (KᵀK + λ I)⁻¹ Kᵀ D. Differentiable in all three.
    """
    tokens, inputs = keys.shape
    if tokens < inputs:
        found: Tensor = keys.T @ torch.linalg.solve(_regular(keys @ keys.T, regularisation), differences)
    else:
        found = torch.linalg.solve(_regular(keys.T @ keys, regularisation), keys.T @ differences)
    return found.T


def _regular(gram: Tensor, regularisation: Tensor) -> Tensor:
    return gram + regularisation * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)


@dataclass(frozen=True, eq=False)
class Aggregate:
    """All edits of one layer since it was unedited, as their normal equations.

    original: the unedited weight [outputs, inputs], in the model's dtype. gram KᵀK [inputs, inputs], moment KᵀD
    [inputs, outputs], shift S [outputs, inputs]: float64. left: the weight as the last edit left it, in the model's
    dtype: original + shift, or what a limit around the editor made of it.
    """

    original: Tensor
    gram: Tensor
    moment: Tensor
    shift: Tensor
    left: Tensor

    @classmethod
    def of(cls, layer: EditedLayer) -> Aggregate:
        """Of no edit yet."""
        original, (outputs, inputs) = layer.matrix.clone(), layer.shape
        gram = original.new_zeros(inputs, inputs, dtype=torch.double)
        moment = original.new_zeros(inputs, outputs, dtype=torch.double)
        return cls(original, gram, moment, moment.T, original)

    def with_edit(self, gram: Tensor, moment: Tensor, shift: Tensor) -> Aggregate:
        """Of one edit more."""
        left = (self.original.double() + shift).to(self.original.dtype)
        return Aggregate(self.original, gram, moment, shift, left)

    def is_of(self, layer: EditedLayer) -> bool:
        """Whether the layer's weight is the one that these edits left."""
        found, left = layer.matrix, self.left
        alike = found.shape == left.shape and found.dtype == left.dtype and found.device == left.device
        return alike and torch.equal(found, left)


class Malmen(HypernetworkEditor):
    """A trained (or, from the constructor, an untrained) MALMEN editor. It does not hold the model that it edits.

    Of a stream of edits, it keeps at each site the unedited weight and two float64 matrices, [inputs, inputs] and
    [inputs, outputs]: an edit adds its tokens to these, and the weight becomes the unedited one plus the least-squares
    shift of all edits so far. The factors are those of the unedited weights, which are put back while they are taken.
    So a stream of edits equals one batch of them, in whatever order, and no edit reads what the earlier ones did. A
    model with other weights at the sites than the last edit left (a new one, or one that was restored) is taken as
    unedited, and the stream begins anew.
    """

    name = "MALMEN"
    file = FILE
    as_it_is = ("normaliser.n", ".mean", ".var", ".std", "lr.weight", "lamda.weight")
    training_settings = Training(
        steps=200, sizes=(1, 16), learning_rate=1e-3, rates={"lr.weight": 3e-5, "lamda.weight": 2e-2}, keep_weight=2.0
    )
    """For a model of which an example takes a second; the digit model's editor is trained for longer."""

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int]],
        *,
        batch_of: Callable[[Any], Batch],
        rank: int = RANK,
        seed: int = 0,
        aggregate: bool = True,
    ) -> None:
        """
        Args:
            shapes, batch_of, rank, seed: see `HypernetworkEditor`.
            aggregate: whether the edits of a stream are solved for together. If not, each call of `edit` is solved for
                by itself, on the model as the call before left it.
        """
        super().__init__(shapes, batch_of=batch_of, rank=rank, seed=seed)
        self.aggregate = aggregate
        self.reports: dict[str, EditorReport] = {}
        """Of the last edit, by site: the system that was solved, and the change of the weight."""
        self._aggregates: list[Aggregate] = []

    def transform(self, inputs: int, outputs: int, rank: int, layers: int) -> nn.Module:
        """A new `ShiftTransform`."""
        return ShiftTransform(inputs, outputs, rank, layers)

    def factors(self, model: nn.Module, batch: Batch) -> Factors:
        """The raw factors of one edit's gradient at the tokens that predict its answer.

        Raises:
            UsageError: the batch has no labels [rows, tokens], or a site sees other tokens than they say.
        """
        chosen = predicting(batch).flatten()
        found = super().factors(model, batch)
        for site, (u, _) in zip(self.sites, found, strict=True):
            if len(u) != len(chosen):
                raise UsageError(f"the layer {site!r} sees {len(u)} tokens; expected {len(chosen)}, as many as labels")
        return [(u[chosen], v[chosen]) for u, v in found]

    def equations(self, factors: Factors) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """For each site the keys K [tokens, inputs], the differences D [tokens, outputs] and λ, in float64."""
        for transform, index, u, v in self.placed(factors):
            yield u.double(), transform.differences(u, v, index).double(), transform.regularisation(index)

    def updates(self, factors: Factors) -> list[Tensor]:
        """What is added to each site's unedited weight, float32 [outputs, inputs], from raw factors of its edits."""
        return [ridge(*equation).float() for equation in self.equations(factors)]

    def edit(self, model: nn.Module, request: Any) -> nn.Module:
        """Carry out one request, or a list or tuple of them, on `model` in place, by one shift of each site's weight.

        Each request takes one forward and one backward. Nothing is checked or undone.

        Returns:
            The same model.

        Raises:
            UsageError: an empty list.
        """
        requests = request if isinstance(request, list | tuple) else [request]
        if not requests:
            raise UsageError("no request to edit with; expected one, or a list of at least one")
        layers = edited_layers(model, self.sites)
        before = self._aggregates if self.aggregate and self._continue(layers) else [Aggregate.of(a) for a in layers]
        with _unedited(layers, before), torch.no_grad():
            factors = joined([self.factors(model, self.batch_of(one)) for one in requests])
        after, self.reports = [], {}
        with torch.no_grad():
            for layer, past, (keys, differences, lamda) in zip(layers, before, self.equations(factors), strict=True):
                gram, moment = past.gram + keys.T @ keys, past.moment + keys.T @ differences
                system = _regular(gram, lamda)
                solution = torch.linalg.solve(system, moment)
                now = past.with_edit(gram, moment, solution.T)
                after.append(now)
                self.reports[layer.name] = EditorReport(
                    system=system, solution=solution, right_side=moment, update=layer.as_held(now.shift - past.shift)
                )
            for layer, now in zip(layers, after, strict=True):
                layer.matrix.copy_(now.left)
        self._aggregates = after if self.aggregate else []
        return model

    def take_over(self, model: nn.Module) -> None:
        """Let the stream go on from the weights in `model`, which a limit moved after the last edit.

        The equations stay as they are: the next edit again solves for all edits, and the limit holds its result.
        """
        layers = edited_layers(model, self.sites)
        self._aggregates = [
            replace(past, left=layer.matrix.clone()) for past, layer in zip(self._aggregates, layers, strict=False)
        ]

    def _continue(self, layers: Sequence[EditedLayer]) -> bool:
        return bool(self._aggregates) and all(
            past.is_of(layer) for past, layer in zip(self._aggregates, layers, strict=True)
        )


def predicting(batch: Batch) -> Tensor:
    """bool [rows, tokens]: the tokens of a causal language model that predict a label, each the next one's.

    Raises:
        UsageError: the batch has no labels [rows, tokens].
    """
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or labels.dim() != _ROWS_AND_TOKENS:
        had = f"labels of shape {list(labels.shape)}" if isinstance(labels, Tensor) else "no labels"
        raise UsageError(f"an edit with {had}; expected labels [rows, tokens], {_IGNORED} at all but the answer")
    found = torch.zeros_like(labels, dtype=torch.bool)
    found[:, :-1] = labels[:, 1:] != _IGNORED
    return found


@contextmanager
def _unedited(layers: Sequence[EditedLayer], aggregates: Sequence[Aggregate]) -> Iterator[None]:
    """The layers with their unedited weights, for a while."""
    edited = [layer.matrix.clone() for layer in layers]
    try:
        for layer, aggregate in zip(layers, aggregates, strict=True):
            layer.matrix.copy_(aggregate.original)
        yield
    finally:
        for layer, weight in zip(layers, edited, strict=True):
            layer.matrix.copy_(weight)
