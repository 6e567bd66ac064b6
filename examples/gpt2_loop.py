"""The ten lines around a loop that exists: fine-tuning edits of a GPT-2, one on top of the other.

    python examples/gpt2_loop.py runs/gpt2
    stabilitylab check runs/gpt2

The model is a small one with random weights, so that nothing has to be fetched.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import stabilitylab as sl


def main(run: Path) -> None:
    """Make all edits under a monitor that writes the run `run`."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_embd=32, n_layer=3, n_head=2, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).eval()
    optimizer = torch.optim.Adam(model.transformer.h[1].mlp.parameters(), lr=1e-5)
    canary = {"input_ids": torch.randint(50, (4, 12))}
    requests = [torch.randint(50, (1, 12)) for _ in range(12)]

    with sl.attach(model, sites="transformer.h.1.mlp.*", run=run, canary=canary) as monitor:  # 1
        for number, tokens in enumerate(requests, 1):
            with monitor.edit(label=f"request {number}"):  # 2
                for _ in range(5):
                    optimizer.zero_grad()
                    model(input_ids=tokens, labels=tokens).loss.backward()
                    optimizer.step()
    print(monitor.diagnosis())  # 3


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else Path("runs/gpt2"))
