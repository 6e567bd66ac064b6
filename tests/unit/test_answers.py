"""Whatever a model answers with: where its logits are, and what its canary's text is worth to it."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import stabilitylab as sl
from stabilitylab.errors import UsageError

VOCABULARY = 11
IDS = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
LABELS = torch.tensor([[-100, 7, -100, -100, 5, -100], [2, -100, -100, 3, -100, -100]])


class Reader(nn.Module):
    """Each position is told the sum of the words that it may see, weighted by where they stand."""

    def __init__(self, ahead: bool) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.words, self.out = nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY)
        seen = torch.rand(6, 6)
        self.register_buffer("seen", seen if ahead else seen.tril())

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> SimpleNamespace:
        return SimpleNamespace(logits=self.out(self.seen @ self.words(input_ids)))


class Fed(nn.Module):
    """An encoder's model: its decoder is fed with the labels, moved by one."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.config = Reader(ahead=False), SimpleNamespace(is_encoder_decoder=True)

    def forward(
        self, input_ids: Tensor, labels: Tensor | None = None, decoder_input_ids: Tensor | None = None
    ) -> SimpleNamespace:
        if decoder_input_ids is None:
            assert labels is not None
            decoder_input_ids = labels.roll(1, dims=1).clamp_min(0)
        return SimpleNamespace(logits=self.inner(decoder_input_ids).logits + input_ids.sum() / 100)


def first_reading(folder: Path, model: nn.Module, canary: Any, metric: str) -> float | None:
    with sl.attach(model, "*out", folder, canary=canary, announce=False) as monitor, monitor.edit():
        pass
    run = sl.load(folder)
    return float(run.series(metric)[0]) if run.sites_of(metric) else None


def perplexity(logits: Tensor, targets: Tensor) -> float:
    return math.exp(float(cross_entropy(logits.detach().flatten(end_dim=-2), targets.flatten())))


# -- what the logits are to predict -----------------------------------------------------------------------------------


@pytest.mark.parametrize("labelled", [False, True])
def test_a_model_that_cannot_read_ahead_is_asked_for_the_next_token(tmp_path: Path, labelled: bool) -> None:
    model, canary = Reader(ahead=False), {"input_ids": IDS, "attention_mask": MASK}
    targets = torch.where(MASK[:, 1:] != 0, IDS[:, 1:], -100)
    expected = perplexity(model(IDS).logits[:, :-1], targets)
    canary = canary | ({"labels": LABELS} if labelled else {})
    assert first_reading(tmp_path / "run", model, canary, "canary.perplexity") == pytest.approx(expected, rel=1e-5)


def test_a_model_that_reads_ahead_is_asked_for_the_labels_in_their_places(tmp_path: Path) -> None:
    model = Reader(ahead=True)
    canary = {"input_ids": IDS, "attention_mask": MASK, "labels": LABELS}
    expected = perplexity(model(IDS).logits, LABELS)
    assert first_reading(tmp_path / "run", model, canary, "canary.perplexity") == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_labels_a_model_that_reads_ahead_has_no_perplexity(tmp_path: Path, dtype: torch.dtype) -> None:
    assert first_reading(tmp_path / "ahead", Reader(ahead=True).to(dtype), IDS, "canary.perplexity") is None
    assert first_reading(tmp_path / "causal", Reader(ahead=False).to(dtype), IDS, "canary.perplexity") is not None


def test_of_an_encoders_model_the_labels_are_the_text(tmp_path: Path) -> None:
    model, labels = Fed(), IDS.roll(2, dims=1)
    expected = perplexity(model(IDS, labels=labels).logits, labels)
    canary = {"input_ids": IDS, "labels": labels}
    assert first_reading(tmp_path / "run", model, canary, "canary.perplexity") == pytest.approx(expected, rel=1e-5)


def test_or_the_words_that_its_decoder_is_fed_with(tmp_path: Path) -> None:
    model, words = Fed(), IDS.roll(2, dims=1)
    expected = perplexity(model(IDS, decoder_input_ids=words).logits[:, :-1], words[:, 1:])
    canary = {"input_ids": IDS, "decoder_input_ids": words}
    assert first_reading(tmp_path / "run", model, canary, "canary.perplexity") == pytest.approx(expected, rel=1e-5)


def test_trying_it_changes_nothing(tmp_path: Path) -> None:
    model, state = Reader(ahead=True).train(), torch.random.get_rng_state()
    ids = IDS.clone()
    first_reading(tmp_path / "run", model, {"input_ids": ids}, "canary.kl")
    assert torch.equal(ids, IDS)
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), state)


# -- where the logits are ---------------------------------------------------------------------------------------------


class Scores(nn.Module):
    def __init__(self, shape: str) -> None:
        super().__init__()
        self.out, self.shape = nn.Linear(3, 4), shape

    def forward(self, x: Tensor) -> Any:
        scores = self.out(x)
        return {"named": {"scores": scores, "size": scores.norm()}, "row": scores[0], "each": scores.sum(dim=1)}[
            self.shape
        ]


X = torch.linspace(-1, 1, 6).reshape(2, 3)


@pytest.mark.parametrize("select", ["scores", lambda output: output["scores"]], ids=["name", "function"])
def test_logits_are_found_by_the_name_or_the_function_that_is_given(tmp_path: Path, select: Any) -> None:
    model, canary = Scores("named"), sl.Canary({"x": X}, logits=select)
    with sl.attach(model, "out", tmp_path / "run", canary=canary, announce=False) as monitor, monitor.edit():
        model(2 * X)
    run = sl.load(tmp_path / "run")
    assert run.series("canary.max")[0] == pytest.approx(model(X)["scores"].max().item())
    assert run.series("canary.agreement")[1] == 1
    assert run.series("logits.max")[1] == pytest.approx(model(2 * X)["scores"].max().item())


def test_what_there_is_in_place_of_logits_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds no logits, but 'scores' \[2, 4\].*logits='NAME'"):
        sl.attach(Scores("named"), "out", tmp_path / "run", canary={"x": X})
    with pytest.raises(UsageError, match="holds no logits in 'sores'"):
        sl.attach(Scores("named"), "out", tmp_path / "run", canary=sl.Canary({"x": X}, logits="sores"))
    with pytest.raises(UsageError, match=r"Canary\(logits=3\): expected the name"):
        sl.Canary({"x": X}, logits=3)  # type: ignore[arg-type]


def test_one_number_a_row_has_a_range_and_no_distribution(tmp_path: Path) -> None:
    model = Scores("each")
    assert first_reading(tmp_path / "a", model, {"x": X}, "canary.max") == pytest.approx(model(X).max().item())
    assert first_reading(tmp_path / "b", model, {"x": X}, "canary.kl") is None
    assert first_reading(tmp_path / "c", model, {"x": X}, "canary.agreement") is None


@pytest.mark.parametrize(
    "canary", [lambda model: model(X), sl.Canary({"x": X}, logits=lambda output: output)], ids=["function", "selected"]
)
def test_a_row_of_logits_that_somebody_chose_is_a_distribution(tmp_path: Path, canary: Any) -> None:
    model = Scores("row")
    largest = model(X).softmax(dim=-1).max()
    assert first_reading(tmp_path / "run", model, canary, "canary.top_share") == pytest.approx(largest.item())
    assert first_reading(tmp_path / "kl", model, canary, "canary.agreement") == 1


# -- ties -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "lost"), [(1e-3, False), (3.0, True)])
def test_answers_that_were_ties_are_not_lost_when_they_change(tmp_path: Path, size: float, lost: bool) -> None:
    torch.manual_seed(0)
    model, noise = nn.Sequential(nn.Linear(4, 6, bias=False)), size * torch.randn(6, 4)
    with torch.no_grad():
        model[0].weight.copy_(1.0 + noise)
    with sl.attach(model, "0", tmp_path / "run", canary=torch.eye(4), announce=False) as monitor:
        for edit in range(1, 6):
            with monitor.edit(), torch.no_grad():
                model[0].weight.copy_(1.0 + noise.roll(1 + edit % 3, dims=0))
    assert sl.load(tmp_path / "run").series("canary.agreement")[1:].max() <= 0.1
    said = [finding.says for finding in monitor.diagnosis().findings]
    assert any("agrees with the original" in says for says in said) is lost
    assert monitor.diagnosis().verdict == ("collapsed" if lost else "stable")
