"""What the model is called with inside the edit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from stabilitylab.probes.input_pass import InputPass, count_bad_inputs
from stabilitylab.record.readings import MODEL_SITE
from stabilitylab.watching.hooks import plain
from stabilitylab.watching.instruments.bench import Bench
from stabilitylab.watching.model_call import tensors_in


class InputsInstrument:
    """Measures `InputPass` over the calls of one edit."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._bad: Tensor | None = None

    def begin(self) -> None:
        """A new edit."""
        self._bad = None

    def model_called(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """The model was called with these."""
        if self._bench.needed(InputPass):
            self._bench.safely("the model's inputs", lambda: self._look(args, kwargs))

    def _look(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        for tensor in tensors_in(args, kwargs):
            seen = plain(tensor) if tensor.is_floating_point() else None
            if seen is not None:
                bad = count_bad_inputs(seen)
                self._bad = bad if self._bad is None else self._bad + bad.to(self._bad.device)

    def after(self) -> None:
        """The edit is over."""
        if self._bad is not None:
            self._bench.add(MODEL_SITE, self._bad.reshape(1), InputPass.from_host)
