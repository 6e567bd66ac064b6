"""Attention inside the edit: which calls are reduced, and the mask that the model was called with."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from stabilitylab.probes.attention_pass import AttentionPass, reduce_attention, reduce_attention_logits
from stabilitylab.probes.mask_pass import MaskPass, reduce_mask
from stabilitylab.record.readings import MODEL_SITE
from stabilitylab.watching.calls import AttentionCall, watch_attention
from stabilitylab.watching.instruments.bench import Bench


class AttentionInstrument:
    """Measures `AttentionPass` at each attention of the model, and `MaskPass` of its call."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._said: set[str] = set()
        self._mask_read_at: int | None = None

    def enter(self, stack: contextlib.ExitStack, model: nn.Module) -> None:
        """Watch the attention of one edit until `stack` is closed, if a probe that is due needs it; else do nothing."""
        if self._bench.needed(AttentionPass):
            reason = self._bench.safely(
                "attention", lambda: watch_attention(stack, model, self._on_attention, self._on_logits)
            )
            if reason is not None and reason not in self._said:
                self._said.add(reason)
                self._bench.note("capture", f"attention left out: {reason}")

    def model_called(self, kwargs: Mapping[str, Any]) -> None:
        """The model was called with these keyword arguments; the first mask inside an edit is measured."""
        mask = kwargs.get("attention_mask")
        if not isinstance(mask, Tensor) or self._mask_read_at == self._bench.edit or not self._bench.needed(MaskPass):
            return
        self._mask_read_at = self._bench.edit
        with self._bench.probe_time:
            self._bench.safely("attention mask", lambda: self._mask(mask))

    def _mask(self, mask: Tensor) -> None:
        packed = reduce_mask(mask)
        if packed is not None:
            self._bench.add(MODEL_SITE, packed, MaskPass.from_host)

    def _on_attention(self, site: str, call: AttentionCall) -> None:
        def reduce() -> Tensor:
            return reduce_attention(call.query, call.key, call.mask, call.is_causal, call.scale)

        self._reduce(site, reduce)

    def _on_logits(self, site: str, logits: Tensor) -> None:
        self._reduce(site, lambda: reduce_attention_logits(logits))

    def _reduce(self, site: str, reduce: Callable[[], Tensor]) -> None:
        if self._bench.needed(AttentionPass, site):
            with self._bench.probe_time:
                self._bench.safely(
                    f"attention of {site}", lambda: self._bench.add(site, reduce(), AttentionPass.from_host)
                )
