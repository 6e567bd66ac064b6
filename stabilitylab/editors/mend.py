"""MEND: model editor networks with gradient decomposition (Mitchell et al., ICLR 2022, arXiv 2110.11309).

The gradient of the loss of the wanted answer is, at each edited layer, a sum over tokens of δ uᵀ. A small hypernetwork
turns u and δ into other factors, and the layer's weight moves by minus a learned rate times their product. There are no
guards here: whatever comes out is added to the weights, as in the editors that people use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stabilitylab.editors.base import Batch, Example
from stabilitylab.editors.factors import gradient_factors, used_tokens
from stabilitylab.editors.layers import edited_layers, last_mlp_layers
from stabilitylab.editors.transform import GradientTransform
from stabilitylab.errors import UsageError

FILE = "mend.safetensors"
RANK = 64
EDIT_LR = 1e-3
"""What the learned edit rates start from."""
_AS_IT_IS = ("rows", "u_mean", "u_std", "v_mean", "v_std", "edit_lrs")
"""Ends of the names of what is saved in its own dtype; the rest, the hypernetworks' weights, in float16."""


def default_sites(model: nn.Module, last: int = 2) -> tuple[str, ...]:
    """Names of both MLP matrices of the decoder's `last` layers.

    Raises:
        SiteError: the model has no such layers.
    """
    return last_mlp_layers(model, last)


class Mend(nn.Module):
    """A trained (or, from the constructor, an untrained) MEND editor. It does not hold the model that it edits."""

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int]],
        *,
        batch_of: Callable[[Any], Batch],
        rank: int = RANK,
        seed: int = 0,
    ) -> None:
        """
        Args:
            shapes: name of each edited layer, with its (outputs, inputs).
            batch_of: makes the model's arguments, with labels, from a request.
            rank: rank of the hypernetworks' layers.
            seed: of the hypernetworks' first weights.
        """
        super().__init__()
        self.sites: tuple[str, ...] = tuple(shapes)
        self.batch_of = batch_of
        self.rank = rank
        kinds: dict[tuple[int, int], list[str]] = {}
        for site, shape in shapes.items():
            kinds.setdefault(shape, []).append(site)
        self._place = {site: (_key(shape), kinds[shape].index(site)) for site, shape in shapes.items()}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.transforms = nn.ModuleDict(
                {_key((m, n)): GradientTransform(n, m, rank, len(sites)) for (m, n), sites in kinds.items()}
            )
        self.edit_lrs = nn.Parameter(torch.full((len(self.sites),), EDIT_LR))

    @classmethod
    def for_model(
        cls,
        model: nn.Module,
        sites: Sequence[str] | None = None,
        *,
        batch_of: Callable[[Any], Batch] | None = None,
        rank: int = RANK,
        seed: int = 0,
    ) -> Mend:
        """An untrained editor of `sites` of `model`, by default both MLP matrices of the decoder's last two layers."""
        sites = default_sites(model) if sites is None else tuple(sites)
        shapes = {layer.name: layer.shape for layer in edited_layers(model, sites)}
        return cls(shapes, batch_of=batch_of or _testbed_batch(), rank=rank, seed=seed)

    @classmethod
    def load(
        cls,
        model: nn.Module,
        path: str | PathLike[str] | None = None,
        *,
        batch_of: Callable[[Any], Batch] | None = None,
    ) -> Mend:
        """The editor saved in the folder `path`, for `model`; the testbed's, shipped with the package, if not given.

        Raises:
            UsageError: no checkpoint in `path`, one that can't be read, or one of layers of another shape.
            SiteError: the model lacks a layer that the checkpoint edits.
        """
        from safetensors import SafetensorError, safe_open

        file = Path(path or _shipped()) / FILE
        if not file.is_file():
            made_by = f"python -m stabilitylab.testbed.train --out {file.parent}"
            raise UsageError(f"no checkpoint {file}; make one with: {made_by}")
        try:
            with safe_open(file, framework="pt") as opened:
                about = opened.metadata() or {}
                state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise UsageError(f"{file} can't be read as safetensors: {error}") from None
        if "sites" not in about or "rank" not in about:
            raise UsageError(
                f"{file} is no MEND checkpoint of stabilitylab; expected 'sites' and 'rank' in its metadata"
            )
        found = cls.for_model(model, about["sites"].split(","), batch_of=batch_of, rank=int(about["rank"]))
        try:
            found.load_state_dict(state)
        except RuntimeError:
            raise UsageError(f"{file} was made for layers of other shapes than this {type(model).__name__}") from None
        return found.requires_grad_(False).eval()

    def save(self, path: str | PathLike[str]) -> Path:
        """Write ``mend.safetensors`` into the folder `path`; the hypernetworks in float16, the rest as it is.

        The statistics of δ are too small for float16.
        """
        from safetensors.torch import save_file

        file = Path(path) / FILE
        file.parent.mkdir(parents=True, exist_ok=True)
        state = {
            name: (value if name.endswith(_AS_IT_IS) else value.half()).detach().contiguous()
            for name, value in self.state_dict().items()
        }
        save_file(state, file, metadata={"sites": ",".join(self.sites), "rank": str(self.rank)})
        return file

    def round_to_stored(self) -> None:
        """Round the hypernetworks to the float16 that `save` writes, in place."""
        with torch.no_grad():
            for name, value in self.state_dict().items():
                if not name.endswith(_AS_IT_IS):
                    value.copy_(value.half())

    def placed(
        self, factors: Sequence[tuple[Tensor, Tensor]]
    ) -> Iterator[tuple[GradientTransform, int, Tensor, Tensor]]:
        """For each site: its transform, its index there, and the float32 factors of the tokens that count."""
        for site, (u, v) in zip(self.sites, factors, strict=True):
            key, index = self._place[site]
            transform = self.transforms[key]
            assert isinstance(transform, GradientTransform)
            used = used_tokens(u, v)
            yield transform, index, u[used].float(), v[used].float()

    def updates(self, factors: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
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
        factors, _ = gradient_factors(model, self.sites, self.batch_of(request))
        with torch.no_grad():
            updates = self.updates(factors)
            for layer, update in zip(edited_layers(model, self.sites), updates, strict=True):
                layer.matrix.add_(update.to(layer.matrix.dtype))
        return model

    def train_on(self, model: nn.Module, examples: Iterator[Example], **settings: Any) -> float:
        """Train on `examples`; see `stabilitylab.editors.mend_training.train`, whose arguments these are.

        (`train` itself is torch's name for switching a module to training mode.)
        """
        from stabilitylab.editors.mend_training import train

        return train(self, model, examples, **settings)


def _key(shape: tuple[int, int]) -> str:
    return f"{shape[0]}x{shape[1]}"


def _shipped() -> Path:
    from stabilitylab.testbed.blip2_digits import CHECKPOINTS

    return CHECKPOINTS


def _testbed_batch() -> Callable[[Any], Batch]:
    from stabilitylab.testbed.mend_data import edit_batch

    return edit_batch
