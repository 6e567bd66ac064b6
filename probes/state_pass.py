"""Whether anything in the model holds a NaN or an infinity, beside the weights that are watched: one cheap look."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stabilitylab.probes.base import BySite, Host
from stabilitylab.probes.native_scan import count_nonfinite_in, table_of
from stabilitylab.probes.weight_pass import count_nonfinite, extremes, on_cpu, wide_dtype
from stabilitylab.record.readings import MODEL_SITE

SAMPLE = 1024
"""Entries, at most about twice as many, of a tensor that shows no sign of having been written to."""
NAMED = 8
"""Bad tensors that are told by name."""


@dataclass(frozen=True)
class StatePass:
    """How much of the model beside the watched weights is bad. tensors: how many of them. All float64."""

    tensors: float


@dataclass(frozen=True)
class BadTensor:
    """One tensor that is. nonfinite: how many of the entries that were looked at are NaN or infinite; float64."""

    nonfinite: float


def sample_of(tensor: Tensor) -> Tensor:
    """A view of some entries [n], evenly spread, of a contiguous tensor."""
    flat = tensor.detach().reshape(-1)
    return flat[:: step_of(tensor)]


def step_of(tensor: Tensor) -> int:
    """Of its sample: each so-manieth entry is in it."""
    return max(1, tensor.numel() // SAMPLE)


def _count(tensor: Tensor) -> Tensor:
    """How many entries are not finite, as a float64 scalar; without a copy of the tensor on a CPU."""
    tensor = tensor.detach()
    if not on_cpu(tensor):
        return torch.isfinite(tensor).logical_not().sum().double()
    low, high = extremes(tensor)
    if bool(torch.isfinite(low) & torch.isfinite(high)):
        return torch.zeros((), dtype=torch.float64)
    return count_nonfinite(tensor.to(wide_dtype(tensor)), low, high).double()


@torch.no_grad()
def count_bad(whole: Sequence[Tensor], sampled: Sequence[Tensor]) -> Tensor:
    """How many entries of each tensor are not finite: float64 [whole and then sampled], on their device.

    whole: looked at in full. sampled: contiguous, `SAMPLE` entries or so of each; on an accelerator, where counting
    them would be a kernel for each, 1 stands for any number of bad ones. All on one device, at least one tensor.
    """
    if all(map(on_cpu, (*whole, *sampled))) and all(tensor.is_contiguous() for tensor in whole):
        table = table_of([(tensor, 1) for tensor in whole] + [(tensor, step_of(tensor)) for tensor in sampled])
        if table is not None:
            return torch.from_numpy(count_nonfinite_in(table).astype(np.float64))
    counts = [_count(tensor).reshape(1) for tensor in whole]
    if sampled:
        views = [sample_of(tensor) for tensor in sampled]
        # 0 · x is NaN where x is not finite, and 0 elsewhere: no sum of it can overflow.
        norms = torch.stack([norm.double() for norm in torch._foreach_norm(torch._foreach_mul(views, 0))])
        bad = torch.isnan(norms).double()
        if on_cpu(bad):
            for at in bad.nonzero().flatten().tolist():
                bad[at] = _count(views[at])
        counts.append(bad)
    return torch.cat(counts)


def state_of(values: Host, names: Sequence[str]) -> BySite:
    """The measurements of a whole model from the counts [tensors] of its tensors, in the order of their names."""
    bad = np.flatnonzero(values > 0)
    named = {names[at]: BadTensor(float(values[at])) for at in bad[:NAMED].tolist()}
    return BySite({MODEL_SITE: StatePass(float(bad.size)), **named})
