"""Causal language models of a few thousand weights, with a byte-level tokenizer, as folders that transformers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = "The capital of France is Paris. In Japan, most people speak Japanese. A week has seven days and the sun rises."


def tokenizer() -> PreTrainedTokenizerFast:
    """Trained on one sentence: what it never saw falls into bytes."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    raw.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer: Any = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator([WORDS] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>")


def folder(path: Path, family: str) -> Path:
    """A model with random weights of one family ("llama" or "gpt2") and the tokenizer, saved in `path`."""
    words = tokenizer()
    size = len(words)
    torch.manual_seed(0)
    model: Any
    if family == "llama":
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=size,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=256,
                initializer_range=0.2,
            )
        )
    else:
        model = GPT2LMHeadModel(
            GPT2Config(vocab_size=size, n_embd=32, n_layer=2, n_head=4, n_positions=256, initializer_range=0.2)
        )
    model.save_pretrained(path)
    words.save_pretrained(path)
    return path
