"""What a testbed is: a real model, streams of edits for it, and what to ask before and after."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from stabilitylab.editors.base import Batch, Prompts

SCORES = ("efficacy", "rephrase", "image_rephrase", "text_locality", "image_locality")
"""What is asked after an edit, in the order of the columns of an outcome."""
Outcomes = Tensor
"""float64 [requests, len(SCORES)]: 1 right, 0 wrong, NaN not asked. An answer with a non-finite logit is wrong."""


class Originals(Protocol):
    """What the unedited model answered; nothing is ever compared with an edited model's answers."""

    def outcomes(self, model: nn.Module, indices: Sequence[int]) -> Outcomes:
        """What `model` is worth on the requests of these places in the stream."""
        ...


class Testbed(Prompts, Protocol):
    """One real model and the requests for it."""

    name: str
    """Such as ``blip2-digits``."""
    shipped: Path | None
    """The folder of the editors' states that come with it."""

    def load(self) -> nn.Module:
        """The unedited model, in eval mode: a new object each time."""
        ...

    def learned_from(self) -> str:
        """A digest of all that `examples` and `texts` are made of: what editors learned of other things is another."""
        ...

    def describe(self) -> dict[str, Any]:
        """Plain JSON values for the manifest: the model, its precision, the file of requests."""
        ...

    def stream(self, seed: int, n: int) -> list[Any]:
        """`n` requests, the same for the same arguments; a longer stream starts with the shorter one.

        Raises:
            UsageError: there are not that many.
        """
        ...

    def label(self, request: Any) -> str:
        """A request in a few words: ``prompt → target``."""
        ...

    def canary(self) -> Batch:
        """A small fixed batch without labels, of none of the requests."""
        ...

    def originals(self, model: nn.Module, requests: Sequence[Any]) -> Originals:
        """Ask the still unedited `model`."""
        ...

    def perplexity(self, model: nn.Module) -> float:
        """exp of the mean negative log likelihood of a fixed text; NaN when a logit is, NaN for a bed without text."""
        ...

    def texts(self) -> Iterator[Batch]:
        """Ordinary text for second moments."""
        ...
