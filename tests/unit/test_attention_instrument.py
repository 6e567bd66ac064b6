"""The attention instrument: due or not, which sites, the mask, and what it says when it can't watch."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
import torch._dynamo
import transformers
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack

from stabilitylab.probes.attention import AttentionEntropy, AttentionLogits, MaskedRows
from stabilitylab.probes.attention_pass import AttentionPass
from stabilitylab.probes.mask_pass import MaskPass
from stabilitylab.watching.instruments.attention import AttentionInstrument
from stabilitylab.watching.instruments.bench import Bench
from tests.loops import hooks_on

IDS = torch.tensor([[0, 0, 5, 7], [3, 4, 5, 6]])
MASK = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])


@pytest.fixture(autouse=True)
def _nothing_compiled() -> None:
    torch._dynamo.reset()  # by another test: nothing would be watched


@pytest.fixture
def model() -> nn.Module:
    config = transformers.GPT2Config(
        n_embd=16, n_layer=2, n_head=2, n_positions=16, vocab_size=20, bos_token_id=1, eos_token_id=2
    )
    return transformers.GPT2LMHeadModel(config).eval()


class Recording(Bench):
    """Rebuilds what is handed over at once."""

    def __init__(self, *probes: Any) -> None:
        self.notes: list[str] = []
        self.seen: list[tuple[str, Any]] = []
        super().__init__(probes, lambda kind, says: self.notes.append(f"{kind}: {says}"))

    def add(self, site: str, packed: Tensor, rebuild: Any) -> None:
        self.seen.append((site, rebuild(packed.numpy())))


def edit(instrument: AttentionInstrument, model: nn.Module, **inputs: Any) -> None:
    with contextlib.ExitStack() as stack:
        instrument.enter(stack, model)
        instrument.model_called(inputs)
        model(**inputs)
        instrument.model_called(inputs)  # a second pass inside the edit


def test_nothing_is_entered_unless_it_is_due(model: nn.Module) -> None:
    bench = Recording(AttentionLogits())
    bench.begin(9)
    with contextlib.ExitStack() as stack:
        AttentionInstrument(bench).enter(stack, model)
        assert hooks_on(model) == 0
        assert _get_current_function_mode_stack() == []
    assert bench.seen == []


def test_each_attention_is_measured_once_and_the_mask_once_an_edit(model: nn.Module) -> None:
    bench = Recording(AttentionLogits(), AttentionEntropy(), MaskedRows())
    instrument = AttentionInstrument(bench)
    for number in (9, 10):
        bench.begin(number)
        edit(instrument, model, input_ids=IDS, attention_mask=MASK)
        seen, bench.seen = bench.seen, []
        sites = ["transformer.h.0.attn", "transformer.h.1.attn"] if number == 10 else []
        assert [site for site, _ in seen] == ["model", *sites]
        assert seen[0][1] == MaskPass(2, 0)
        for _, found in seen[1:]:
            assert isinstance(found, AttentionPass)
            assert (found.visible_rows, found.masked_rows) == (12, 4)
    assert bench.probe_time.take() > 0
    assert bench.notes == []
    assert hooks_on(model) == 0


def test_only_at_the_sites_that_a_probe_is_for(model: nn.Module) -> None:
    bench = Recording(AttentionEntropy(every=1, sites="*.1.attn"))
    bench.begin(1)
    edit(AttentionInstrument(bench), model, input_ids=IDS)
    assert [site for site, _ in bench.seen] == ["transformer.h.1.attn"]


def test_a_model_that_is_left_alone_is_named_once() -> None:
    bench = Recording(AttentionLogits(every=1))
    instrument = AttentionInstrument(bench)
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    for number in (1, 2):
        bench.begin(number)
        with contextlib.ExitStack() as stack:
            instrument.enter(stack, model)
    assert bench.notes == [
        "capture: attention left out: 0 is a TransformerEncoderLayer, which rounds differently while it is watched"
    ]


def test_a_mask_of_no_known_kind_gives_no_reading() -> None:
    bench = Recording(MaskedRows())
    instrument = AttentionInstrument(bench)
    for mask in (None, {"full_attention": MASK}, torch.ones(4)):
        bench.begin(bench.edit + 1)
        instrument.model_called({"attention_mask": mask})
    assert bench.seen == []
    assert bench.notes == []
