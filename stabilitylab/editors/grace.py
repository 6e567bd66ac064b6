"""GRACE: an external memory of edits around one layer (Hartvigsen et al., NeurIPS 2023, arXiv 2211.11031).

No weight moves. An adapter takes the place of a layer and keeps a codebook: keys (inputs of the layer at the tokens
that were edited), values (what the layer answers instead) and radii ε. A token whose input lies in the ball of the key
nearest to it gets that key's value, bit for bit; every other token gets the layer's own output, bit for bit. The lookup
is made at each token by itself, so it asks for no position: padding, batches and generation need no care.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stabilitylab.editors.base import Batch
from stabilitylab.editors.layers import edited_layers, mlp_layers
from stabilitylab.editors.saving import read_state, write_state
from stabilitylab.errors import UsageError

FILE = "grace.safetensors"
RADIUS = 0.1
"""ε of a new key, as a share of the key's norm: norms differ between layers and models, such shares much less.

On the digits' validation streams, 0.05 hardly ever reaches a rephrased question, and 0.2 answers for other images.
"""
STEPS = 100
LEARNING_RATE = 0.3
"""Adam's step at a value, as a share of the root mean square of the layer's own output at the key."""
LOSS_ENOUGH = 1e-2
"""The value is good, and left as it is, when the edit's loss is below."""
_IGNORED = -100
_Answer = tuple[int, ...]


class GraceAdapter(nn.Module):
    """A linear layer with a codebook.

    ``keys`` [n, inputs] and ``values`` [n, outputs] have the dtypes of the layer's input and output, ``epsilons``
    [n, 1] is float32 (float64 where the input is). ``answers``: the label tokens of each key. ``key_id``: the position
    of the token that the edit under way asks for, which the lookup has no use for but a watcher has; -1 between edits.
    """

    keys: Tensor
    values: Tensor
    epsilons: Tensor

    def __init__(self, layer: nn.Module, inputs: int, outputs: int) -> None:
        super().__init__()
        self.layer = layer
        assert isinstance(layer.weight, Tensor)
        like = layer.weight.detach()
        self.register_buffer("keys", like.new_zeros(0, inputs))
        self.register_buffer("values", like.new_zeros(0, outputs))
        self.register_buffer("epsilons", like.new_zeros(0, 1, dtype=_at_least_float32(like)))
        self.answers: list[_Answer] = []
        self.key_id = -1
        self.train(layer.training)

    @property
    def weight(self) -> Any:
        """The layer's, which stays as it is."""
        return self.layer.weight

    @property
    def bias(self) -> Any:
        """The layer's."""
        return self.layer.bias

    def nearest(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Distance to the key nearest to each row of x [..., inputs], and its number; both [...]."""
        dtype = _at_least_float32(x)
        # The faster way by inner products finds distances of 1e-3 between a large row and itself.
        distances = torch.cdist(
            x.reshape(-1, x.shape[-1]).to(dtype),
            self.keys.to(dtype),
            compute_mode="donot_use_mm_for_euclid_dist",
        )
        smallest, number = distances.min(dim=-1)
        return smallest.reshape(x.shape[:-1]), number.reshape(x.shape[:-1])

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] to [..., outputs]."""
        own: Tensor = self.layer(x)
        if len(self.keys) == 0:
            return own
        with torch.no_grad():
            distance, number = self.nearest(x)
            inside = distance <= self.epsilons[:, 0][number]
        return torch.where(inside.unsqueeze(-1), self.values[number].to(own.dtype), own)

    def take_in(self, key: Tensor, output: Tensor, answer: _Answer, radius: float) -> int:
        """Make the codebook answer at `key`, by Algorithm 1; returns the number of the key that does.

        d is the distance to the nearest key, ε its radius:

        - d > ε + `radius`, or no key at all: the key is added with `radius` and `output` as its value;
        - else, the same answer: ε grows to d where it is smaller, and the key that is there serves both;
        - else: the key is added; both radii become d/2 where they are larger, so that neither ball ever grows here;
        - d = 0 with another answer: two balls of radius 0 around one point could not be told apart, so the newer
          answer takes the place of the older.

        Args:
            key: [inputs], the layer's input at the edited token.
            output: [outputs], what the layer itself makes of it.
            answer: the wanted tokens.
            radius: ε of a new key.
        """
        if len(self.keys) == 0:
            return self._add(key, output, answer, radius)
        smallest, number = self.nearest(key)
        distance, nearest = float(smallest), int(number)
        epsilon = float(self.epsilons[nearest, 0])
        if distance > epsilon + radius:
            return self._add(key, output, answer, radius)
        if self.answers[nearest] == answer:
            self._set_radius(nearest, max(epsilon, distance))
            return nearest
        if distance == 0:
            self.set_value(nearest, output)
            self.answers = [*self.answers[:nearest], answer, *self.answers[nearest + 1 :]]
            return nearest
        self._set_radius(nearest, min(epsilon, distance / 2))
        return self._add(key, output, answer, min(radius, distance / 2))

    def set_value(self, number: int, value: Tensor) -> None:
        """Let key `number` have `value` [outputs]; the gradient goes through to it."""
        row = value.to(self.values.dtype).unsqueeze(0)
        self.values = torch.cat([self.values[:number], row, self.values[number + 1 :]])

    @contextmanager
    def whole_or_not_at_all(self) -> Iterator[None]:
        """Put the codebook back as it was if something is raised inside. Nothing in it is ever changed in place."""
        before = (self.keys, self.values, self.epsilons, self.answers)
        try:
            yield
        except BaseException:
            self.keys, self.values, self.epsilons, self.answers = before
            raise

    def _add(self, key: Tensor, output: Tensor, answer: _Answer, radius: float) -> int:
        self.keys = torch.cat([self.keys.to(key.dtype), key.unsqueeze(0)])
        self.values = torch.cat([self.values.to(output.dtype), output.unsqueeze(0)])
        self.epsilons = torch.cat([self.epsilons, self.epsilons.new_full((1, 1), radius)])
        self.answers = [*self.answers, answer]
        return len(self.answers) - 1

    def _set_radius(self, number: int, radius: float) -> None:
        self.epsilons = self.epsilons.clone()
        self.epsilons[number] = radius


class Grace:
    """An editor that fills a codebook. The codebook is part of the model; the editor keeps nothing of it."""

    def __init__(
        self,
        site: str,
        *,
        batch_of: Callable[[Any], Batch],
        radius: float = RADIUS,
        steps: int = STEPS,
        learning_rate: float = LEARNING_RATE,
    ) -> None:
        """
        Args:
            site: name of the layer that the adapter takes the place of.
            batch_of: makes the model's arguments, one row with labels, from a request.
            radius: ε of a new key, as a share of its norm.
            steps: Adam's steps at most.
            learning_rate: Adam's, as a share of the root mean square of the layer's own output at the key.
        """
        self.sites: tuple[str, ...] = (site,)
        self.batch_of = batch_of
        self.radius = radius
        self.steps = steps
        self.learning_rate = learning_rate

    @classmethod
    def for_model(
        cls,
        model: nn.Module,
        site: str | None = None,
        *,
        batch_of: Callable[[Any], Batch],
        radius: float = RADIUS,
        steps: int = STEPS,
        learning_rate: float = LEARNING_RATE,
    ) -> Grace:
        """An editor for `site` of `model`, by default the MLP's down matrix at two thirds of the decoder's depth.

        Raises:
            SiteError: the model has no such layer.
        """
        if site is None:
            down = list(mlp_layers(model, "down").values())
            site = down[2 * (len(down) - 1) // 3]
        if adapter_of(model, site) is None:
            edited_layers(model, [site])
        return cls(site, batch_of=batch_of, radius=radius, steps=steps, learning_rate=learning_rate)

    def edit(self, model: nn.Module, request: Any) -> nn.Module:
        """Make the codebook in `model` answer `request`: a key at the last token of the prompt, a value by Adam.

        The value starts from the layer's own output (a key that serves already, from its value) and is optimised in
        float32 on the loss of the wanted answer; nothing else learns. If something is raised, the model is as before.

        Returns:
            The same model, with an adapter in the place of the layer.

        Raises:
            UsageError: the batch is not one row with labels behind a prompt.
        """
        batch = self.batch_of(request)
        position, answer = _prompt_end(batch)
        adapter = adapter_of(model, self.sites[0])
        if adapter is not None:
            self._extend(adapter, model, batch, position, answer)
            return model
        adapter = _wrap(model, self.sites[0])
        try:
            self._extend(adapter, model, batch, position, answer)
        except BaseException:
            _put(model, self.sites[0], adapter.layer)
            raise
        return model

    def save(self, model: nn.Module, folder: str | Path) -> Path:
        """Write the codebook in `model` as ``grace.safetensors`` into `folder`, whole or not at all.

        Raises:
            UsageError: there is none yet.
        """
        adapter = adapter_of(model, self.sites[0])
        if adapter is None:
            raise UsageError(f"the layer {self.sites[0]!r} has no codebook yet; expected at least one edit before")
        longest = max(map(len, adapter.answers), default=0)
        padded = [[*answer, *[_IGNORED] * (longest - len(answer))] for answer in adapter.answers]
        state = dict(adapter.named_buffers(recurse=False))
        state["answers"] = torch.tensor(padded, dtype=torch.long).reshape(len(padded), longest)
        return write_state(Path(folder) / FILE, state, {"site": self.sites[0]})

    def restore(self, model: nn.Module, folder: str | Path) -> nn.Module:
        """Put the codebook that `save` wrote around the layer of `model`, in place of one that may be there.

        Returns:
            The same model.

        Raises:
            UsageError: no such file, no codebook, or one of another layer or of another shape.
        """
        file = Path(folder) / FILE
        state, about = read_state(file, "expected what Grace.save wrote")
        site = about.get("site")
        if set(state) != {"keys", "values", "epsilons", "answers"}:
            raise UsageError(f"{file} is no codebook; expected keys, values, epsilons and answers")
        if site != self.sites[0]:
            raise UsageError(f"{file} is the codebook of {site!r}, not of {self.sites[0]!r}")
        held = adapter_of(model, self.sites[0])
        layer = edited_layers(held, ["layer"])[0] if held else edited_layers(model, self.sites)[0]
        outputs, inputs = layer.shape
        if (state["keys"].shape[-1], state["values"].shape[-1]) != (inputs, outputs):
            raise UsageError(f"{file} was made for a layer of another shape than {inputs} inputs, {outputs} outputs")
        adapter = held or _wrap(model, self.sites[0])
        device = adapter.keys.device
        adapter.keys, adapter.values = state["keys"].to(device), state["values"].to(device)
        adapter.epsilons = state["epsilons"].to(device)
        adapter.answers = [tuple(token for token in row if token != _IGNORED) for row in state["answers"].tolist()]
        return model

    def _extend(self, adapter: GraceAdapter, model: nn.Module, batch: Batch, position: int, answer: _Answer) -> None:
        adapter.key_id = position
        try:
            with adapter.whole_or_not_at_all():
                key, output = _at_token(adapter.layer, model, batch, position)
                radius = self.radius * float(torch.linalg.vector_norm(key, dtype=_at_least_float32(key)))
                number = adapter.take_in(key, output, answer, radius)
                rate = self.learning_rate * float(output.float().square().mean().sqrt())
                self._learn_value(adapter, number, model, batch, rate)
        finally:
            adapter.key_id = -1

    def _learn_value(self, adapter: GraceAdapter, number: int, model: nn.Module, batch: Batch, rate: float) -> None:
        # In float16 Adam's epsilon of 1e-8 is zero, and a step may divide by it: so the steps are taken in float32.
        value = adapter.values[number].to(_at_least_float32(adapter.values)).requires_grad_(True)
        optimiser = torch.optim.Adam([value], lr=rate)
        with torch.enable_grad():
            for _ in range(self.steps):
                adapter.set_value(number, value)
                loss = model(**batch).loss
                if loss < LOSS_ENOUGH:
                    break
                (value.grad,) = torch.autograd.grad(loss, value)
                adapter.values = adapter.values.detach()
                optimiser.step()
        adapter.values = adapter.values.detach()
        adapter.set_value(number, value.detach())


def adapter_of(model: nn.Module, site: str) -> GraceAdapter | None:
    """The adapter that stands at `site` in `model`, if one does."""
    found = dict(model.named_modules()).get(site)
    return found if isinstance(found, GraceAdapter) else None


def _at_least_float32(like: Tensor) -> torch.dtype:
    return torch.promote_types(like.dtype, torch.float32)


def _wrap(model: nn.Module, site: str) -> GraceAdapter:
    layer = edited_layers(model, [site])[0]
    outputs, inputs = layer.shape
    adapter = GraceAdapter(layer.module, inputs, outputs)
    _put(model, site, adapter)
    return adapter


def _put(model: nn.Module, site: str, module: nn.Module) -> None:
    parent, _, leaf = site.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _prompt_end(batch: Batch) -> tuple[int, _Answer]:
    """The position of the last token before the answer, and the answer's tokens."""
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or len(labels) != 1:
        raise UsageError("GRACE edits one row with labels at a time; batch_of gave another number of them, or none")
    places = (labels[0] != _IGNORED).nonzero().flatten().tolist()
    if not places or places[0] == 0:
        raise UsageError("the labels of an edit are all -100 or begin at the first token; expected a prompt, an answer")
    return places[0] - 1, tuple(labels[0][places].tolist())


def _at_token(layer: nn.Module, model: nn.Module, batch: Batch, position: int) -> tuple[Tensor, Tensor]:
    """The layer's input and output at a position of the one row, by one forward."""
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        x = args[0].detach()
        seen.append(
            (x.reshape(-1, x.shape[-1])[position].clone(), output.detach().flatten(end_dim=-2)[position].clone())
        )

    handle = layer.register_forward_hook(keep)
    try:
        with torch.no_grad():
            model(**batch)
    finally:
        handle.remove()
    if not seen:
        raise UsageError(f"the layer took no part when {type(model).__name__} was asked")
    return seen[0]
