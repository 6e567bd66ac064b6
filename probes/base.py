"""What a probe is: one kind of quantity, computed in float64 from a measurement that probes share.

Two steps keep probes cheap and simple. A *measurement* (``weight_pass``, ``gradient_factors``, ``output_pass``,
``logits_pass``, ``normaliser_pass``) reduces big tensors to a few small ones on their device, once per site. The
monitor copies all of them to the host in one go. A *probe* then is a plain formula on those numbers: it never sees the
model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from stabilitylab.readings import Metric

Host = NDArray[np.float64]
Readings = Mapping[str, float | Host]
Seen = TypeVar("Seen")


class Probe(ABC, Generic[Seen]):
    """Measures one kind of quantity at each site.

    Subclass it with the measurement it needs, describe its metrics, write `compute`, and add the class to
    `stabilitylab.probes.ALL`. The contract tests, the catalogue and the reports find it there.
    """

    needs: ClassVar[type[Any]]
    """The measurement class whose instances `compute` is given."""

    metrics: ClassVar[tuple[Metric, ...]]
    """What `compute` emits; `follows` below names what a probe of earlier readings is fed with."""

    follows: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def compute(self, seen: Seen) -> Readings:
        """Values by metric name: a float, or a float64 array of at most `Metric.length` values.

        A metric that does not apply is left out: absent is not NaN.
        """
