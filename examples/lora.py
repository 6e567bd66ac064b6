"""LoRA under transformers' Trainer: each optimizer step is an edit of the weights that the adapters make.

    pip install peft accelerate
    python examples/lora.py runs/lora
    stabilitylab check runs/lora

The layers are named as in the model without adapters, and what is measured is W + BA·scale. The model is a small one
with random weights, so that nothing has to be fetched.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from stabilitylab.integrations.transformers import StabilityCallback

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def texts(count: int) -> list[dict[str, Tensor]]:
    """Random token ids, each text its own labels."""
    tokens = torch.randint(50, (count, 12))
    return [{"input_ids": row, "labels": row} for row in tokens]


def main(run: Path) -> None:
    """Train under a callback that writes the run `run`."""
    torch.manual_seed(0)
    model = get_peft_model(
        LlamaForCausalLM(LlamaConfig(vocab_size=50, **SIZES)), LoraConfig(r=4, target_modules=["down_proj"])
    )
    canary = {"input_ids": torch.randint(50, (4, 12))}
    watch = StabilityCallback(run=run, sites="model.layers.*.mlp.down_proj", canary=canary)  # 1
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=12,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=1e-3,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        Trainer(model, arguments, train_dataset=texts(64), callbacks=[watch]).train()  # 2
    assert watch.monitor is not None
    print(watch.monitor.diagnosis())  # 3


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else Path("runs/lora"))
