"""Folders of weights for the scan's tests: sound ones, and ones with a defect planted."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

LAYERS, WIDTH, HIDDEN, WORDS = 5, 24, 48, 40


def weights(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A decoder's weights as trained ones are: of the same size in each layer, nothing out of line."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) * shape[-1] ** -0.5).to(dtype)

    held = {"model.embed_tokens.weight": drawn(WORDS, WIDTH)}
    for layer in range(LAYERS):
        name = f"model.layers.{layer}"
        held[f"{name}.self_attn.q_proj.weight"] = drawn(WIDTH, WIDTH)
        held[f"{name}.mlp.up_proj.weight"] = drawn(HIDDEN, WIDTH)
        held[f"{name}.mlp.down_proj.weight"] = drawn(WIDTH, HIDDEN)
        held[f"{name}.mlp.down_proj.bias"] = drawn(WIDTH)
        held[f"{name}.norm.weight"] = torch.ones(WIDTH, dtype=dtype)
    return held


def write(folder: Path, held: Mapping[str, Tensor], model_type: str = "llama") -> Path:
    """One file of them, with a config."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in held.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


def write_shards(folder: Path, held: Mapping[str, Tensor], parts: int = 2) -> Path:
    """Several files and their index, tensors in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    places = {name: f"model-{number % parts + 1:05}-of-{parts:05}.safetensors" for number, name in enumerate(held)}
    for file in set(places.values()):
        save_file({name: held[name].contiguous() for name in held if places[name] == file}, folder / file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder
