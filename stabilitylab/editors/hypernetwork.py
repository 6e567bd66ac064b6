"""What MEND and MALMEN share: a hypernetwork for the layers of each shape, how it is trained, saved and restored."""

from __future__ import annotations

import copy
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor, nn

from stabilitylab.editors.base import Batch, Example, Progress, Prompts, quiet
from stabilitylab.editors.factors import Factors, gradient_factors, used_tokens
from stabilitylab.editors.layers import edited_layers, last_mlp_layers
from stabilitylab.editors.meta_training import VALIDATION_EXAMPLES, Training, judge, train
from stabilitylab.editors.saving import read_state, write_state
from stabilitylab.errors import UsageError

RANK = 64
H = TypeVar("H", bound="HypernetworkEditor")


class Transform(Protocol):
    """The hypernetwork of all edited layers of one shape."""

    def observe(self, u: Tensor, v: Tensor, /) -> None:
        """Take rows of raw factors u [tokens, inputs] and v [tokens, outputs] into the statistics that normalise."""
        ...


class HypernetworkEditor(nn.Module, ABC):
    """An editor that transforms the gradient's factors at each site. It does not hold the model that it edits.

    A subclass says what a transform is, and what is added to the weights when it has been asked.
    """

    name: ClassVar[str]
    file: str
    training_settings: Training
    """Of `prepare`."""
    as_it_is: ClassVar[tuple[str, ...]]
    """Ends of the names of what is saved in its own dtype; the rest, the hypernetworks' weights, in float16."""

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
                {_key((m, n)): self.transform(n, m, rank, len(sites)) for (m, n), sites in kinds.items()}
            )

    @abstractmethod
    def transform(self, inputs: int, outputs: int, rank: int, layers: int) -> nn.Module:
        """A new `Transform` for `layers` layers of one shape."""

    @abstractmethod
    def updates(self, factors: Factors) -> list[Tensor]:
        """What is added to each site's weight, float32 [outputs, inputs], from raw factors; differentiable."""

    @classmethod
    def for_model(
        cls: type[H],
        model: nn.Module,
        sites: Sequence[str] | None = None,
        *,
        batch_of: Callable[[Any], Batch],
        rank: int = RANK,
        seed: int = 0,
        **settings: Any,
    ) -> H:
        """An untrained editor of `sites` of `model`, by default both MLP matrices of the decoder's last two layers.

        batch_of, rank, seed, settings: of the constructor.
        """
        layers = edited_layers(model, default_sites(model) if sites is None else sites)
        shapes = {layer.name: layer.shape for layer in layers}
        found = cls(shapes, batch_of=batch_of, rank=rank, seed=seed, **settings)
        return found.to(layers[0].matrix.device) if layers else found

    @classmethod
    def load(
        cls: type[H],
        model: nn.Module,
        path: str | PathLike[str],
        *,
        batch_of: Callable[[Any], Batch],
        **settings: Any,
    ) -> H:
        """The editor saved in the folder `path`, for `model`.

        batch_of, settings: as in `for_model`.

        Raises:
            UsageError: no checkpoint in `path`, one that can't be read, or one of layers of another shape.
            SiteError: the model lacks a layer that the checkpoint edits.
        """
        folder = Path(path)
        about, _ = cls._read(folder)
        sites, rank = about["sites"].split(","), int(about["rank"])
        found = cls.for_model(model, sites, batch_of=batch_of, rank=rank, **settings)
        found.restore(folder)
        return found.requires_grad_(False).eval()

    @classmethod
    def _read(cls, folder: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
        file = folder / cls.file
        state, about = read_state(
            file, "prepare and save make one; for the digit model: python -m stabilitylab.testbed.train"
        )
        if "sites" not in about or "rank" not in about:
            raise UsageError(
                f"{file} is no {cls.name} checkpoint of stabilitylab; expected 'sites' and 'rank' in its metadata"
            )
        return about, state

    def restore(self, folder: str | PathLike[str]) -> None:
        """Take over what `save` wrote into `folder`.

        Raises:
            UsageError: no such file, not one of this editor's, or one of other layers.
        """
        about, state = self._read(Path(folder))
        file = Path(folder) / self.file
        if about["sites"] != ",".join(self.sites):
            raise UsageError(f"{file} is of the layers {about['sites']}; expected {','.join(self.sites)}")
        try:
            self.load_state_dict(state)
        except RuntimeError:
            raise UsageError(
                f"{file} is not of this {self.name}: its layers have other shapes, or its rank is not {self.rank}"
            ) from None

    def save(self, path: str | PathLike[str]) -> Path:
        """Write the editor's `file` into the folder `path`; the hypernetworks in float16, the rest as it is.

        The statistics of δ are too small for float16. The file is there whole or not at all.
        """
        state = {
            name: value if name.endswith(self.as_it_is) else value.half() for name, value in self.state_dict().items()
        }
        return write_state(Path(path) / self.file, state, {"sites": ",".join(self.sites), "rank": str(self.rank)})

    def round_to_stored(self) -> None:
        """Round the hypernetworks to the float16 that `save` writes, in place."""
        with torch.no_grad():
            for name, value in self.state_dict().items():
                if not name.endswith(self.as_it_is):
                    value.copy_(value.half())

    def factors(self, model: nn.Module, batch: Batch) -> Factors:
        """The raw factors of one edit's gradient, by one forward and one backward of `model`."""
        return gradient_factors(model, self.sites, batch)[0]

    def placed(self, factors: Factors) -> Iterator[tuple[Any, int, Tensor, Tensor]]:
        """For each site: its transform, its index there, and the float32 factors of the tokens that count."""
        for site, (u, v) in zip(self.sites, factors, strict=True):
            key, index = self._place[site]
            used = used_tokens(u, v)
            yield self.transforms[key], index, u[used].float(), v[used].float()

    def observe(self, factors: Factors) -> None:
        """Show raw factors to the normalisers."""
        for transform, _, u, v in self.placed(factors):
            transform.observe(u, v)

    @property
    def learned_with(self) -> Mapping[str, Any]:
        """Rank and training settings."""
        return {"rank": self.rank, **dataclasses.asdict(self.training_settings)}

    def train_on(
        self,
        model: nn.Module,
        examples: Iterator[Example],
        *,
        seed: int,
        settings: Training | None = None,
        validate: Callable[[Any], float] | None = None,
        progress: Progress = quiet,
    ) -> float:
        """Train on `examples`; see `stabilitylab.editors.meta_training.train`, whose arguments these are.

        (`train` itself is torch's name for switching a module to training mode.)
        """
        settings = settings or self.training_settings
        return train(self, model, examples, settings, seed=seed, validate=validate, progress=progress)

    def prepare(self, model: nn.Module, prompts: Prompts, *, seed: int, progress: Progress = quiet) -> None:
        """Train on the prompts' examples and keep the state that was best on their validation examples.

        A model of which a part is in 16 bit is trained for as a float32 copy of it: the losses' gradients are too small
        for float16.
        """
        wide = all(parameter.dtype in (torch.float32, torch.float64) for parameter in model.parameters())
        trained_for = model if wide else copy.deepcopy(model).float()
        examples = prompts.examples(seed)
        aside = list(islice(prompts.examples(seed, "validation"), VALIDATION_EXAMPLES))
        validate = judge(trained_for, aside, most=self.training_settings.sizes[1])
        self.train_on(trained_for, examples, seed=seed, validate=validate, progress=progress)
        self.round_to_stored()


def default_sites(model: nn.Module, last: int = 2) -> tuple[str, ...]:
    """Names of both MLP matrices of the decoder's `last` layers.

    Raises:
        SiteError: the model has no such layers.
    """
    return last_mlp_layers(model, last)


def _key(shape: tuple[int, int]) -> str:
    return f"{shape[0]}x{shape[1]}"
