"""What an editor tells of values that live only inside its own functions. See `EditorReport`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class EditorReport:
    """Numbers of one edit at one layer that no attribute of the editor shows; any of them may be left out.

    A loop hands it over inside the edit, as often as it likes (later fields win)::

        with monitor.edit() as edit:
            edit.report("transformer.h.5.mlp.c_proj", EditorReport(key=k, direction=u, target_value=v_star))

    or the editor keeps an attribute ``reports: Mapping[str, EditorReport]``, new ones in each edit. The tensors are
    read when the edit ends, on their own device, and are never changed; keep them as they are until then.

    key k, direction u: of a rank-one update v uᵀ / (uᵀk) (ROME, arXiv 2202.05262, §3.1), [inputs], or [edits, inputs]
    for a batch. initial_value v₀, target_value v*: the layer's output at the key, before and after v* was optimised,
    [outputs] or [edits, outputs]. clamp_hits: optimisation steps after which v* − v₀ was put back onto its norm clamp.
    covariance C: of the layer's keys, [inputs, inputs]. system A, solution X, right_side B: a linear system A X = B
    that was solved, [n, n], [n, m] and [n, m], or [n] both of the latter (MEMIT, arXiv 2210.07229, §4.2; MALMEN, arXiv
    2311.04661, §3; AlphaEdit, arXiv 2410.02355, §3). update Δ: what was meant to be added to the layer's weight, of the
    weight's shape.
    """

    key: Tensor | None = None
    direction: Tensor | None = None
    initial_value: Tensor | None = None
    target_value: Tensor | None = None
    clamp_hits: Tensor | float | None = None
    covariance: Tensor | None = None
    system: Tensor | None = None
    solution: Tensor | None = None
    right_side: Tensor | None = None
    update: Tensor | None = None

    def with_later(self, later: EditorReport) -> EditorReport:
        """This report with every field that `later` fills in its place."""
        fields = {field.name: getattr(later, field.name) for field in dataclasses.fields(later)}
        return dataclasses.replace(self, **{name: value for name, value in fields.items() if value is not None})
