"""The attention mask that a model was called with: which query rows can see no key."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stabilitylab.probes.attention_pass import MASKED_BELOW
from stabilitylab.probes.base import Host
from stabilitylab.probes.weight_pass import as_array, on_cpu

_PADDING, _FULL = 2, 4  # dimensions
_WHOLE = (torch.int64, torch.int32, torch.uint8)
"""What a mask of padding mostly is made of."""


@dataclass(frozen=True)
class MaskPass:
    """Of one attention mask. masked_rows: query rows without a key to see, over the batch (and the heads of a mask that
    has them). masked_sequences: rows of the batch of which that is true of every query: nothing but padding.
    """

    masked_rows: float
    masked_sequences: float

    @classmethod
    def from_host(cls, values: Host) -> MaskPass:
        """From the two numbers that `reduce_mask` packed."""
        return cls(*(float(value) for value in values))


@torch.no_grad()
def reduce_mask(mask: Tensor) -> Tensor | None:
    """The numbers of `MaskPass` as a float64 tensor of shape [2] on the mask's device; None for another shape.

    mask: [batch, tokens], 0 at padding, read as a causal decoder does: query t sees the real tokens up to t. Or
    [batch, heads or 1, queries, keys]: boolean or whole numbers (0: not seen), or additive.
    """
    if mask.numel() == 0 or mask.dim() not in (_PADDING, _FULL):
        return None
    mask = mask.detach()
    if mask.dim() == _PADDING and on_cpu(mask) and mask.dtype in _WHOLE:  # in a third of the time of as many tensors
        seen = as_array(mask) != 0
        starts = np.where(seen.any(axis=1), seen.argmax(axis=1), seen.shape[1])
        counts = [float(starts.sum()), float(np.count_nonzero(starts == seen.shape[1]))]
        return torch.tensor(counts, dtype=torch.float64)
    if mask.dim() == _PADDING:
        places = torch.arange(mask.shape[1], device=mask.device)
        first = torch.where(mask != 0, places, mask.shape[1]).amin(dim=1)
        rows, sequences = first.sum(), (first == mask.shape[1]).sum()
    else:
        hidden = mask <= MASKED_BELOW if mask.is_floating_point() else mask == 0
        blind = hidden.all(dim=-1)
        rows, sequences = blind.sum(), blind.flatten(start_dim=1).all(dim=1).sum()
    return torch.stack([rows, sequences]).double()
