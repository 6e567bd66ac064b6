"""Which of a canary's tokens count: those that the unedited model can predict. Chosen once, before any edit.

A language model is asked at every token what comes next, but it knows an answer at some of them only. What it says
where it knows none is arbitrary: a decoder trained for answers alone says anything while it reads the question, and
nobody can say what follows a sentence. Changes there are no harm, and a mean over them hides harm elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from stabilitylab.probes.weight_pass import wide_dtype

KNOWN: Final = 0.1
"""Share of the next tokens that are predicted right, from which on that is no chance: the model knows such text."""
SURE: Final = 0.75
"""Probability of the most likely token, from which on the end of a row is a question that has an answer."""
IGNORED: Final = -100
"""A target that doesn't count, as torch's cross-entropy has it."""
MOST: Final = 64
"""Tokens that are kept, spread evenly: each costs a row of the vocabulary's size at every look."""


@dataclass(frozen=True, eq=False)
class CanaryPlaces:
    """rows, positions: of the tokens that count, [tokens]. logits: the unedited model's there, [tokens, vocabulary], in
    fp32 or above.
    """

    rows: Tensor
    positions: Tensor
    logits: Tensor

    def of(self, logits: Tensor) -> Tensor:
        """What another forward of the same canary says at the same tokens: [tokens, vocabulary], fp32 or above."""
        return _at(logits, self.rows, self.positions)


def _at(logits: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
    found = _three(logits)[rows, positions]
    return found.to(wide_dtype(found))


def _three(logits: Tensor) -> Tensor:
    """[batch, positions, vocabulary], whatever came: an answer of one token per row has one position."""
    wide = logits.detach()
    return wide[:, None] if wide.dim() == 2 else wide.reshape(-1, *wide.shape[-2:])


def real_tokens(batch: int, positions: int, attention_mask: Tensor | None, device: torch.device) -> Tensor:
    """Which positions hold a real token: bool [batch, positions].

    attention_mask: [batch, tokens], padding 0 on either side; where it is shorter (image tokens put before the text) it
    is aligned to the end, and what is before it doesn't count. Without a fitting one all do.
    """
    fits = attention_mask is not None and attention_mask.dim() == 2 and attention_mask.shape[0] == batch
    if attention_mask is None or not fits or not 0 < attention_mask.shape[1] <= positions:
        return torch.ones(batch, positions, dtype=torch.bool, device=device)
    real = torch.zeros(batch, positions, dtype=torch.bool, device=device)
    real[:, positions - attention_mask.shape[1] :] = attention_mask.to(device) != 0
    real[~real.any(dim=1), -1] = True  # a row of padding alone still has an end
    return real


def next_tokens(tokens: Tensor, attention_mask: Tensor | None, positions: int) -> Tensor:
    """What the logits of a text are to predict, each the token after it: int64 [batch, positions].

    tokens: [batch, length]; where there are more positions than tokens (image tokens before the text) they are aligned
    to the end. attention_mask: [batch, length], padding 0 on either side. `IGNORED` at a row's last token, at padding,
    and where there is no text.
    """
    usable = attention_mask is not None and attention_mask.shape == tokens.shape
    mask = attention_mask != 0 if attention_mask is not None and usable else torch.ones_like(tokens, dtype=torch.bool)
    targets = torch.full((tokens.shape[0], positions), IGNORED, dtype=torch.int64, device=tokens.device)
    before = positions - tokens.shape[1]
    real = (mask[:, 1:] & mask[:, :-1]).to(tokens.device)
    targets[:, before : positions - 1] = torch.where(real, tokens[:, 1:], IGNORED)
    return targets


@torch.no_grad()
def canary_places(logits: Tensor, targets: Tensor | None, attention_mask: Tensor | None) -> CanaryPlaces:
    """The tokens that count, from the unedited model's logits. Waits for an accelerator.

    These are the tokens that are predicted right, where the model knows such text at all (see ``KNOWN``), and the ends
    of rows at which it is sure. Where these are fewer than half as many as there are rows, the ends of all rows; and
    where it is nowhere sure either, every real token of a text.

    logits: [batch, positions, vocabulary] or [batch, vocabulary]. targets: [batch, positions], the token that is right
    at each, `IGNORED` where none is; None where there is no text. attention_mask: see `real_tokens`.
    """
    wide = _three(logits)
    batch, positions, _ = wide.shape
    real = real_tokens(batch, positions, attention_mask, wide.device)
    places = torch.arange(positions, device=wide.device)
    ends = places == torch.where(real, places, -1).amax(dim=1)[:, None]
    last = _at(logits, *ends.nonzero(as_tuple=True))
    sure = torch.zeros_like(real)
    sure[ends] = last.softmax(dim=-1).amax(dim=-1) >= SURE
    counts = _predicted(wide, targets, real) | sure
    if int(counts.sum()) < batch / 2:
        # Nothing is known of the text: what is asked is the end of each row, if anything is.
        counts = real if targets is not None and not bool(sure.any()) else ends
    rows, at = counts.nonzero(as_tuple=True)
    if rows.numel() > MOST:
        kept = torch.linspace(0, rows.numel() - 1, MOST, device=rows.device).long()
        rows, at = rows[kept], at[kept]
    return CanaryPlaces(rows, at, _at(logits, rows, at).clone())


def _predicted(wide: Tensor, targets: Tensor | None, real: Tensor) -> Tensor:
    """Where the target is the most likely token: bool [batch, positions]; none where that is chance."""
    none = torch.zeros_like(real)
    if targets is None or targets.shape != real.shape:
        return none
    wanted = targets.to(wide.device)
    # The ids of image tokens may lie beyond the vocabulary.
    known = (wanted >= 0) & (wanted < wide.shape[-1])
    right = known & (wide.argmax(dim=-1) == wanted)
    return none if int(right.sum()) < KNOWN * int(known.sum()) else right
