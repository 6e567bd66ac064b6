"""GRACE's codebook against a naive float64 re-implementation; its lookup to the bit."""

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

import stabilitylab
from stabilitylab.editors.base import Editor, Prepared
from stabilitylab.editors.grace import Grace, GraceAdapter, adapter_of
from stabilitylab.errors import UsageError
from stabilitylab.testbed import blip2_digits, digits
from stabilitylab.testbed.evaluation import Originals
from stabilitylab.testbed.mend_data import edit_batch
from stabilitylab.watching.editor_parts import codebook_of


class Naive:
    """Algorithm 1 by Python lists."""

    def __init__(self, radius: float) -> None:
        self.radius = radius
        self.entries: list[dict[str, Any]] = []

    def take_in(self, key: Tensor, value: Tensor, answer: tuple[int, ...]) -> int:
        key = key.double()
        found = [(float((key - entry["key"]).square().sum().sqrt()), n) for n, entry in enumerate(self.entries)]
        distance, nearest = min(found, default=(float("inf"), -1))
        new = {"key": key, "value": value, "answer": answer, "epsilon": self.radius}
        if not found or distance > self.entries[nearest]["epsilon"] + self.radius:
            self.entries.append(new)
            return len(self.entries) - 1
        close = self.entries[nearest]
        if close["answer"] == answer:
            close["epsilon"] = max(close["epsilon"], distance)
            return nearest
        if distance == 0:
            close.update(answer=answer, value=value)
            return nearest
        close["epsilon"] = min(close["epsilon"], distance / 2)
        self.entries.append({**new, "epsilon": min(self.radius, distance / 2)})
        return len(self.entries) - 1

    def answer(self, x: Tensor, own: Tensor) -> tuple[Tensor, float]:
        """The output at one token, and how far from the edge of a ball the decision was."""
        distances = [float((x.double() - entry["key"]).square().sum().sqrt()) for entry in self.entries]
        nearest = min(range(len(distances)), key=distances.__getitem__)
        gap = distances[nearest] - self.entries[nearest]["epsilon"]
        ties = sorted(distances)[:2]
        return (self.entries[nearest]["value"] if gap <= 0 else own), min(abs(gap), *(ties[1:] and [ties[1] - ties[0]]))


def layer_of(kind: str, dtype: torch.dtype) -> nn.Module:
    return (nn.Linear(6, 4) if kind == "Linear" else Conv1D(4, 6)).to(dtype)


@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("seed", range(3))
def test_streams_of_keys_are_taken_in_as_by_algorithm_1(kind: str, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    layer = layer_of(kind, dtype)
    adapter, naive = GraceAdapter(layer, 6, 4), Naive(radius=1.0)
    centres = torch.randn(8, 6) * 2
    keys: list[Tensor] = []
    for _ in range(80):
        again = keys and random.random() < 0.2
        key = random.choice(keys) if again else (random.choice(centres) + torch.randn(6) * 0.5).to(dtype)
        keys.append(key)
        value, answer = torch.randn(4).to(dtype), (random.randrange(3),)
        assert adapter.take_in(key, value, answer, 1.0) == naive.take_in(key, value, answer)
    expected = torch.tensor([[entry["epsilon"]] for entry in naive.entries], dtype=torch.float64)
    torch.testing.assert_close(adapter.epsilons.double(), expected, atol=1e-6, rtol=1e-5)
    assert float(adapter.epsilons.min()) >= 0
    assert adapter.answers == [entry["answer"] for entry in naive.entries]
    assert torch.equal(adapter.keys.double(), torch.stack([entry["key"] for entry in naive.entries]))
    x = (centres.repeat(6, 1) + torch.randn(48, 6) * 0.4).to(dtype).reshape(4, 12, 6)
    with torch.no_grad():
        own, found = layer(x), adapter(x)
    replaced = 0
    for row, token in ((row, token) for row in range(4) for token in range(12)):
        wanted, margin = naive.answer(x[row, token], own[row, token])
        if margin > 1e-4:
            assert torch.equal(found[row, token], wanted)
            replaced += not torch.equal(wanted, own[row, token])
    assert 0 < replaced < 48


def test_the_edge_belongs_to_the_ball_and_a_nan_hits_nothing() -> None:
    layer = nn.Linear(2, 2)
    adapter = GraceAdapter(layer, 2, 2)
    adapter.take_in(torch.tensor([3.0, 0.0]), torch.tensor([7.0, 8.0]), (1,), 0.5)
    x = torch.tensor([[3.0, 0.0], [3.5, 0.0], [3.51, 0.0], [float("nan"), 0.0]])
    with torch.no_grad():
        found, own = adapter(x), layer(x)
    assert torch.equal(found[:2], torch.tensor([[7.0, 8.0], [7.0, 8.0]]))
    assert torch.equal(found[2], own[2])
    assert found[3].isnan().all()


def test_large_keys_are_at_no_distance_from_themselves() -> None:
    adapter = GraceAdapter(nn.Linear(64, 2), 64, 2)
    keys = torch.randn(40, 64) * 1e3
    for number, key in enumerate(keys):
        adapter.take_in(key, torch.zeros(2), (number,), 1e-6)
    distance, nearest = adapter.nearest(keys)
    assert float(distance.max()) == 0
    assert nearest.tolist() == list(range(40))


@pytest.fixture
def gpt2() -> Any:
    config = GPT2Config(n_layer=3, n_embd=32, n_head=2, vocab_size=50, n_positions=32, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).eval()


def gpt2_batch(request: list[int]) -> dict[str, Tensor]:
    """The last two tokens are the answer."""
    ids = torch.tensor([request])
    labels = ids.clone()
    labels[:, :-2] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def outputs_of(model: nn.Module, site: str, ids: Tensor, **rest: Any) -> tuple[Tensor, Tensor]:
    """Input and output of the module at `site`."""
    seen: list[tuple[Tensor, Tensor]] = []
    handle = model.get_submodule(site).register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
    with torch.no_grad():
        model(input_ids=ids, **rest)
    handle.remove()
    return seen[0]


def test_an_edit_of_gpt2_is_stored_and_everything_else_is_the_layers_own(gpt2: Any) -> None:
    grace = Grace.for_model(gpt2, batch_of=gpt2_batch)
    site = grace.sites[0]
    assert site == "transformer.h.1.mlp.c_proj"
    layer, before = gpt2.get_submodule(site), copy.deepcopy(gpt2.state_dict())
    request = [5, 6, 7, 8, 9, 10]
    start = float(gpt2(**gpt2_batch(request)).loss.detach())
    assert grace.edit(gpt2, request) is gpt2
    adapter = adapter_of(gpt2, site)
    assert adapter is not None
    assert adapter.layer is layer
    assert adapter.weight is layer.weight
    assert float(gpt2(**gpt2_batch(request)).loss.detach()) < start
    assert adapter.answers == [(9, 10)]
    book = codebook_of(adapter)
    assert book is not None
    assert book.keys.shape == (1, 128)
    # With and without the answer, padded on the left, beside a stranger: the token is found wherever it stands.
    ids = torch.tensor([[0, 0, 5, 6, 7, 8], [11, 12, 13, 14, 15, 16]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    x, found = outputs_of(gpt2, site, ids, attention_mask=mask, position_ids=positions)
    assert torch.equal(found[0, 5], adapter.values[0])
    with torch.no_grad():
        own = layer(x)
    assert torch.equal(found[0, :5], own[0, :5])
    assert torch.equal(found[1], own[1])
    held = {name.replace(".layer.", "."): value for name, value in gpt2.state_dict().items()}
    assert all(torch.equal(held[name], value) for name, value in before.items())
    grace.edit(gpt2, [20, 21, 22, 23, 24, 25])
    assert adapter_of(gpt2, site) is adapter
    assert len(adapter.keys) == 2
    assert all(parameter.grad is None and parameter.requires_grad for parameter in gpt2.parameters())
    assert sum(len(m._forward_hooks) for m in gpt2.modules()) == 0


def test_a_repeated_request_keeps_its_radius_and_a_new_answer_replaces_the_old(gpt2: Any) -> None:
    grace = Grace.for_model(gpt2, batch_of=gpt2_batch)
    for _ in range(2):
        grace.edit(gpt2, [5, 6, 7, 8, 9, 10])
    adapter = adapter_of(gpt2, grace.sites[0])
    assert adapter is not None
    radius = 0.1 * float(adapter.keys[0].norm())
    assert adapter.epsilons.tolist() == [[pytest.approx(radius, rel=1e-5)]]
    grace.edit(gpt2, [5, 6, 7, 8, 11, 12])
    assert adapter.answers == [(11, 12)]
    assert adapter.epsilons.tolist() == [[pytest.approx(radius, rel=1e-5)]]


@pytest.mark.parametrize("earlier", [0, 1])
def test_an_exception_leaves_the_model_as_it_was(gpt2: Any, earlier: int) -> None:
    grace = Grace.for_model(gpt2, batch_of=gpt2_batch)
    for _ in range(earlier):
        grace.edit(gpt2, [5, 6, 7, 8, 9, 10])
    before, names, calls = copy.deepcopy(gpt2.state_dict()), [name for name, _ in gpt2.named_modules()], 0

    def fail(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise RuntimeError("broken model")

    handle = gpt2.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="broken model"):
        grace.edit(gpt2, [30, 31, 32, 33, 34, 35])
    handle.remove()
    assert [name for name, _ in gpt2.named_modules()] == names
    after = gpt2.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert sum(len(m._forward_hooks) for m in gpt2.modules()) == 0


def test_a_saved_codebook_is_put_back(gpt2: Any, tmp_path: Path) -> None:
    fresh = copy.deepcopy(gpt2)
    grace = Grace.for_model(gpt2, batch_of=gpt2_batch)
    with pytest.raises(UsageError, match="no codebook yet"):
        grace.save(gpt2, tmp_path)
    with pytest.raises(UsageError, match=r"expected what Grace\.save wrote"):
        grace.restore(gpt2, tmp_path)
    for request in ([5, 6, 7, 8, 9, 10], [20, 21, 22, 23, 24, 25]):
        grace.edit(gpt2, request)
    assert grace.save(gpt2, tmp_path).name == "grace.safetensors"
    assert len(list(tmp_path.iterdir())) == 1
    assert grace.restore(fresh, tmp_path) is fresh
    ids = torch.tensor([[5, 6, 7, 8], [20, 21, 22, 23]])
    with torch.no_grad():
        assert torch.equal(fresh(input_ids=ids).logits, gpt2(input_ids=ids).logits)
    mine, theirs = adapter_of(gpt2, grace.sites[0]), adapter_of(fresh, grace.sites[0])
    assert mine is not None
    assert theirs is not None
    assert mine.answers == theirs.answers
    other = Grace.for_model(fresh, "transformer.h.0.mlp.c_proj", batch_of=gpt2_batch)
    with pytest.raises(UsageError, match=r"codebook of 'transformer\.h\.1"):
        other.restore(fresh, tmp_path)
    (tmp_path / "grace.safetensors").write_bytes(b"nothing")
    with pytest.raises(UsageError, match="can't be read"):
        grace.restore(fresh, tmp_path)


def test_batches_without_a_prompt_or_an_answer_are_refused(gpt2: Any) -> None:
    batch = gpt2_batch([5, 6, 7, 8, 9, 10])
    grace = Grace.for_model(gpt2, batch_of=lambda labels: {**batch, "labels": labels})
    for labels in (torch.full((1, 6), -100), batch["input_ids"]):
        with pytest.raises(UsageError, match="expected a prompt"):
            grace.edit(gpt2, labels)
    for wrong in (None, batch["labels"].repeat(2, 1)):
        with pytest.raises(UsageError, match="one row"):
            grace.edit(gpt2, wrong)
    assert adapter_of(gpt2, grace.sites[0]) is None


def test_digit_edits_in_float16_take_are_kept_and_are_watched(tmp_path: Path) -> None:
    model, tokenizer = blip2_digits.load("fp16")
    records = digits.edit_stream(0, 6, "validation")
    originals = Originals.of(model, tokenizer, records)
    grace = Grace.for_model(model, batch_of=edit_batch)
    assert isinstance(grace, Editor)
    assert not isinstance(grace, Prepared)
    right = 0
    with stabilitylab.attach(model, sites=grace.sites, run=tmp_path / "run", editor=grace) as monitor:
        for index, record in enumerate([*records, records[0]]):
            with monitor.edit() as edit:
                edit.returns(grace.edit(model, record))
            right += bool(originals.outcome(model, tokenizer, index % 6)[0])
    assert right >= 6
    run = stabilitylab.load(tmp_path / "run")
    site = grace.sites[0]
    assert run.series("drift.norm", site).tolist() == [0.0] * 8
    keys = run.series("editor.keys", site)
    assert keys[-1] == len(model.get_submodule(site).keys)
