"""Second moments C = E[k kᵀ] of the keys of edited layers: what ordinary text looks like from inside the model.

A key is what enters the matrix that writes an MLP's output (Meng et al., NeurIPS 2022, arXiv 2202.05262, section 3.1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stabilitylab.editors.at_token import passing, still, used_tokens
from stabilitylab.editors.base import Batch, Located, Progress, Prompts, quiet
from stabilitylab.editors.layers import edited_layers
from stabilitylab.editors.saving import read_state, write_state
from stabilitylab.errors import UsageError
from stabilitylab.watching.editor_report import EditorReport

TOKENS = 20_000
"""How many tokens of ordinary text are read."""


@dataclass(frozen=True, eq=False)
class SecondMoments:
    """What is known of the keys of each site.

    matrices: float32 [inputs, inputs], E[k kᵀ] over all tokens, each row's first too. power: the mean of k² over inputs
    and tokens, without each row's first: a model may have a massive key there (on SmolLM2-135M it outweighs all others
    together), and as a unit of what is small or large it would be useless. tokens: how many were seen.
    """

    matrices: Mapping[str, Tensor]
    power: Mapping[str, float]
    tokens: int

    def padded(self, site: str, ridge: float) -> Tensor:
        """float64 C + ridge · power · I."""
        matrix = self.matrices[site].double()
        return matrix + ridge * self.power[site] * torch.eye(matrix.shape[0], dtype=matrix.dtype, device=matrix.device)


def second_moments(
    model: nn.Module, sites: Sequence[str], texts: Iterable[Batch], tokens: int = TOKENS, progress: Progress = quiet
) -> SecondMoments:
    """Gather them over `texts` until `tokens` tokens that are no padding were seen, or the texts end.

    Sums are float64, whatever the model's dtype. The sums stay on the model's device.

    Raises:
        UsageError: no row of two tokens or more.
    """
    sums: dict[str, Tensor] = {}
    squares = dict.fromkeys(sites, 0.0)
    seen = later = 0
    with still(model):
        for batch in texts:
            used = used_tokens(batch)
            beyond = used & (used.long().cumsum(dim=1) > 1)
            for site, entered in zip(sites, passing(model, batch, inputs=sites)[0], strict=True):
                keys = entered[used.to(entered.device)].double()
                sums[site] = sums.get(site, 0) + keys.T @ keys
                squares[site] += float(entered[beyond.to(entered.device)].double().square().mean(dim=1).sum())
            seen += int(used.sum())
            later += int(beyond.sum())
            progress(min(seen, tokens), tokens, "tokens read")
            if seen >= tokens:
                break
    if not later:
        raise UsageError("the texts hold no row of two tokens or more; second moments of keys need ordinary text")
    matrices = {site: (total / seen).float() for site, total in sums.items()}
    return SecondMoments(matrices, {site: total / later for site, total in squares.items()}, seen)


class KeyValueEditor:
    """What ROME, MEMIT and AlphaEdit share: sites, how a request is located, and second moments of keys.

    It does not hold the model that it edits.
    """

    file: str
    """The name of its state's file; each method has its own."""

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int]],
        *,
        locate: Callable[[Any], Located],
        tokens: int = TOKENS,
    ) -> None:
        """
        Args:
            shapes: name of each edited layer, with its (outputs, inputs), from the first layer to the last.
            locate: makes rows and the position of the edit in them from a request.
            tokens: of ordinary text that `prepare` reads.
        """
        self.sites: tuple[str, ...] = tuple(shapes)
        self.shapes = dict(shapes)
        self.locate = locate
        self.tokens = tokens
        self.moments: SecondMoments | None = None
        self.reports: dict[str, EditorReport] = {}
        """Of the last edit, by site."""

    @property
    def learned_with(self) -> Mapping[str, Any]:
        """How many tokens are read."""
        return {"tokens": self.tokens}

    def prepare(self, model: nn.Module, prompts: Prompts, *, seed: int, progress: Progress = quiet) -> None:
        """Gather second moments over ``prompts.texts()``. Nothing is drawn at random: `seed` changes nothing."""
        edited_layers(model, self.sites)
        self._learned(second_moments(model, self.sites, prompts.texts(), self.tokens, progress))

    def save(self, folder: str | Path) -> Path:
        """Write the second moments (float32, as they are kept) into `folder`."""
        moments = self.known()
        state: dict[str, Tensor] = {}
        for site in self.sites:
            state[f"{site}.moment"] = moments.matrices[site]
            state[f"{site}.power"] = torch.tensor(moments.power[site], dtype=torch.float64)
        about = {"editor": type(self).__name__, "sites": ",".join(self.sites), "tokens": str(moments.tokens)}
        return write_state(Path(folder) / self.file, state, about)

    def restore(self, folder: str | Path) -> None:
        """Take over what `save` wrote.

        Raises:
            UsageError: no such file, not one of this editor's, or one of other layers.
        """
        file = Path(folder) / self.file
        who = type(self).__name__
        state, about = read_state(file, f"{who}.prepare and save make one of second moments of keys")
        if about.get("editor") != who or "tokens" not in about:
            raise UsageError(
                f"{file} holds no state of {who}; it was written by {about.get('editor', 'something else')}"
            )
        if about.get("sites") != ",".join(self.sites):
            raise UsageError(f"{file} is of the layers {about.get('sites')}; this editor edits {','.join(self.sites)}")
        matrices = {site: state[f"{site}.moment"] for site in self.sites}
        for site, matrix in matrices.items():
            inputs = self.shapes[site][1]
            if tuple(matrix.shape) != (inputs, inputs):
                raise UsageError(f"{file} was made for {site} of {matrix.shape[0]} inputs; the layer has {inputs}")
        power = {site: float(state[f"{site}.power"]) for site in self.sites}
        self._learned(SecondMoments(matrices, power, int(about["tokens"])))

    def known(self) -> SecondMoments:
        """The second moments.

        Raises:
            UsageError: neither prepared nor restored.
        """
        if self.moments is None:
            raise UsageError(
                f"{type(self).__name__} knows no second moments of the keys of {', '.join(self.sites)}; "
                "call prepare(model, prompts, seed=…) or restore(folder) before the first edit"
            )
        return self.moments

    def _learned(self, moments: SecondMoments) -> None:
        self.moments = moments
