"""A small real edit loop for tests: a tiny GPT-2 with dropout, edited by gradient steps on its loss."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

VOCABULARY, TOKENS = 40, 10

TEXT = {
    "input_ids": torch.arange(2 * TOKENS).reshape(2, TOKENS) % VOCABULARY,
    "attention_mask": torch.tensor([[1] * TOKENS, [1] * (TOKENS - 3) + [0] * 3]),
}
"""A canary: two rows of text, the second shorter."""


def make_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(3)
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    return GPT2LMHeadModel(config).train()


def edit_gpt2(model: GPT2LMHeadModel, rate: float = 0.1, passes: int = 2) -> list[Tensor]:
    """Gradient steps on random text, as FT makes them; returns the logits of each pass. Gradients stay in ``.grad``."""
    tokens = torch.randint(VOCABULARY, (2, TOKENS))
    seen = []
    for _ in range(passes):
        model.zero_grad()
        output = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), labels=tokens)
        output.loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= rate * parameter.grad
        seen.append(output.logits.detach())
    return seen
