"""An edit loop as someone may already have it: fine-tuning a small GPT-2, watched by one line."""

from __future__ import annotations

import sys

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import stabilitylab as sl

torch.manual_seed(0)
torch.set_num_threads(1)
model = GPT2LMHeadModel(GPT2Config(vocab_size=100, n_positions=16, n_embd=32, n_layer=2, n_head=2)).eval()
canary = {"input_ids": torch.randint(100, (4, 8))}
requests = [torch.randint(100, (2, 8)) for _ in range(12)]
optimizer = torch.optim.SGD(model.transformer.h[1].mlp.parameters(), lr=1e-3)

with sl.attach(model, sites="*.mlp.c_*", run=sys.argv[1], canary=canary) as monitor:
    for number, ids in enumerate(requests):
        with monitor.edit(label=f"request {number}"):
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
print(monitor.diagnosis())
