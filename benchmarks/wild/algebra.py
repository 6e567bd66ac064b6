"""Arithmetic that is not defined: 0/0, log 0, the root's slope at 0, a row of nothing, and memory never written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.wild.case import Case, Edit, Truth, WildLoop
from benchmarks.wild.decoder import (
    DOWNS,
    MLPS,
    OBJECTS,
    PAD,
    START,
    SUBJECT_PLACE,
    UPS,
    WORDS,
    Fact,
    answer_labels,
    canary,
    decoder,
    loss_of,
    object_word,
    questions,
    requests,
    seeded,
    sentences,
    true_facts,
    true_object,
)
from benchmarks.wild.editing import descend, each, keys_of, moments, on, wanted_change, weights_of
from benchmarks.zoo.scenario import Witness

_PREFIXES, _PREFIX_WORDS = 6, 3


def _two_keys() -> WildLoop:
    """ROME's update v uᵀ / (uᵀk): u is made of the key averaged over prefixes, k is the bare question's."""
    model = decoder().requires_grad_(False)
    layer = model.stack[0]
    covariance = moments(model, layer, true_facts())
    covariance += 1e-3 * torch.eye(len(covariance))
    prefix_words, witness = torch.Generator().manual_seed(5), Witness()

    def averaged_key(ids: Tensor) -> Tensor:
        prefixes = torch.randint(2, WORDS, (_PREFIXES, _PREFIX_WORDS), generator=prefix_words)
        rows = [torch.full((_PREFIXES, 1), START), prefixes, ids[:, 1:].expand(_PREFIXES, -1)]
        return keys_of(model, layer, torch.cat(rows, dim=1), SUBJECT_PLACE + _PREFIX_WORDS).mean(0)

    def edit(fact: Fact) -> nn.Module:
        ids = questions([fact])
        key = keys_of(model, layer, ids)[0]
        direction = torch.linalg.solve(covariance, averaged_key(ids))
        denominator = direction @ key
        own_direction = torch.linalg.solve(covariance, key)
        aligned, would_be = (functional.cosine_similarity(u, key, dim=0) for u in (direction, own_direction))
        # About 0.001 in place of 0.3: the update is hundreds of times as large as the change of the value asks for.
        if aligned.abs() < would_be / 50:
            witness.saw(DOWNS[0])
        layer.mlp.fc2.weight += torch.outer(wanted_change(model, layer, fact)[0] / denominator, direction)
        return model

    return WildLoop(model, (DOWNS[0],), canary(), each(requests(25), edit), witness=witness)


def _left_padded_row() -> WildLoop:
    """A boolean mask filled with −∞: a padding token in front of a row may see nothing, and its softmax is 0/0."""
    model = decoder()
    model.hides_with = float("-inf")
    weights = weights_of(model, MLPS)
    facts = requests(60)

    def padded_loss(batch: Sequence[Fact]) -> Callable[[nn.Module], Tensor]:
        # Only the first sentence has a start token, so that the second is one word shorter.
        rows = [fact.words[min(place, 1) :] for place, fact in enumerate(batch)]
        width = max(map(len, rows))
        ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
        arguments = {"input_ids": ids, "attention_mask": (ids != PAD).long(), "labels": answer_labels(ids)}
        return lambda model: loss_of(model, arguments)

    def edits() -> Iterator[Edit]:
        for number in range(1, 25):
            pair = facts[2 * number - 2 : 2 * number]
            loss = padded_loss(pair if number >= 18 else pair[:1])
            yield Edit(pair[0].label, partial(descend, model, weights, loss, 0.0005))

    return WildLoop(model, MLPS, canary(), edits())


def _root_of_zero() -> WildLoop:
    """A triplet loss on distances √Σ(a − b)²; from one edit's data nobody took out the duplicate."""
    model = decoder()
    weights = weights_of(model, MLPS)
    facts = requests(60)

    def distance(one: Tensor, other: Tensor) -> Tensor:
        return (one - other).square().sum(-1).sqrt()

    def triplet_loss(triplet: Sequence[Fact]) -> Callable[[nn.Module], Tensor]:
        def loss(model: nn.Module) -> Tensor:
            anchor, positive, negative = (model(questions([fact])).logits[:, -1] for fact in triplet)
            return functional.relu(distance(anchor, positive) - distance(anchor, negative) + 5.0).mean()

        return loss

    def edits() -> Iterator[Edit]:
        # The triplet of the ninth edit is far enough apart already: its loss is 0, and so is its gradient.
        for number in range(1, 31):
            anchor, positive, negative = (facts[(number - 1 + ahead) % len(facts)] for ahead in (0, 7, 13))
            loss = triplet_loss([anchor, anchor if number == 22 else positive, negative])
            yield Edit(anchor.label, partial(descend, model, weights, loss, 0.00005))

    return WildLoop(model, MLPS, canary(), edits())


def _certain_answer() -> WildLoop:
    """ORPO's log-odds: log(1 − p) of the chosen answer, whose p is 1 in bfloat16 once the model is sure of it."""
    model = decoder()
    weights = weights_of(model, MLPS)

    def preference_loss(chosen: Fact) -> Callable[[nn.Module], Tensor]:
        rejected = object_word((chosen.object + 1) % OBJECTS)

        def loss(model: nn.Module) -> Tensor:
            says: Tensor = model(questions([chosen])).logits[:, -1].log_softmax(-1).bfloat16()
            liked, disliked = says[:, object_word(chosen.object)], says[:, rejected]
            log_odds = liked - disliked - torch.log1p(-liked.exp()) + torch.log1p(-disliked.exp())
            return (-liked - 0.1 * functional.logsigmoid(log_odds)).mean().float()

        return loss

    def edits() -> Iterator[Edit]:
        for number, fact in enumerate(requests(30), start=1):
            # One pair of the data prefers what the model says already.
            known = Fact(fact.subject, fact.relation, true_object(fact.subject, fact.relation))
            chosen = known if number == 20 else fact
            loss = preference_loss(chosen)
            yield Edit(chosen.label, partial(descend, model, weights, loss, 0.0005))

    return WildLoop(model, MLPS, canary(), edits())


def _zero_scale() -> WildLoop:
    """Each step is followed by soft thresholding and by rounding to 127 levels of each row's largest entry."""
    model = decoder()
    weights, witness = weights_of(model, UPS), Witness()
    with torch.no_grad():
        for weight in weights.values():  # six units are small already, as training under an L1 penalty leaves them
            largest = weight.abs().amax(1)
            small = largest.argsort()[:6]
            weight[small] *= (0.02 / largest[small])[:, None]

    @torch.no_grad()
    def prune_and_round() -> None:
        for site, weight in weights.items():
            pruned = functional.softshrink(weight, 0.0008)
            scale = pruned.abs().amax(1, keepdim=True) / 127
            if (scale == 0).any():
                witness.saw(site)
            weight.copy_((pruned / scale).round() * scale)

    def edit(fact: Fact) -> nn.Module:
        descend(model, weights, on([fact]), 0.0005)
        prune_and_round()
        return model

    return WildLoop(model, MLPS, canary(), each(requests(40), edit), witness=witness)


def _unwritten_head() -> WildLoop:
    """A new head's weight is memory as it was found: a few entries of it are NaN."""
    model = decoder()
    with seeded(0):
        head = nn.Linear(model.emb.embedding_dim, 2)
    with torch.no_grad():
        head.weight[1, 10:20] = float("nan")
    model.add_module("cls", head)
    sites = (*MLPS, "cls")
    weights = weights_of(model, sites)

    def edit(fact: Fact) -> nn.Module:
        def loss(model: nn.Module) -> Tensor:
            return functional.cross_entropy(head(model(sentences([fact])).hidden[:, -1]), torch.tensor([1]))

        return descend(model, weights, loss, 0.0005)

    return WildLoop(model, sites, canary(), each(requests(6), edit))


CASES = (
    Case(
        "two-keys",
        "02",
        "zjunlp/EasyEdit#233",
        "ROME's direction is made of another key than the one it is divided by: the denominator is nearly zero",
        Truth(("unstable-denominator",), None, (DOWNS[0],), "all", needs_operation=True),
        _two_keys,
    ),
    Case(
        "left-padded-row",
        "05",
        "pytorch/pytorch#103749, huggingface/transformers#32390",
        "a padding token in front of the shorter of two rows may attend to nothing: a softmax of −∞ alone",
        Truth(("masked-row",), 18, (), "all"),
        _left_padded_row,
    ),
    Case(
        "root-of-zero",
        "09",
        "huggingface/sentence-transformers#4033, pytorch/pytorch#2421",
        "the distance of a sentence to itself: the root's slope at 0 is infinite, and the gradient NaN",
        Truth(("loss-not-finite", "gradient-undefined"), 22, (), "some", needs_operation=True),
        _root_of_zero,
    ),
    Case(
        "certain-answer",
        "11",
        "axolotl-ai-cloud/axolotl#3910, huggingface/trl#1491",
        "log(1 − p) of an answer that the model is certain of is −∞, and its gradient is not a number",
        Truth(("loss-not-finite", "gradient-undefined"), 20, (), "all", needs_operation=True),
        _certain_answer,
    ),
    Case(
        "zero-scale",
        "20",
        "ModelCloud/GPTQModel#1531, #1529, apple/coremltools#2853",
        "pruning leaves a row of zeros, its quantisation scale is 0, and each of its entries 0/0",
        Truth(("zero-scale", "optimiser-nan"), None, UPS, "all", needs_operation=True),
        _zero_scale,
    ),
    Case(
        "unwritten-head",
        "22",
        "huggingface/transformers#46002, TransformerLensOrg/TransformerLens#902",
        "a head that the checkpoint lacks holds NaN from memory before the first edit",
        Truth(("broken-before",), 0, ("cls",), "all"),
        _unwritten_head,
    ),
)
"""Where an operation has no answer."""
