"""What EasyEdit needs to edit a small model of our own: a folder that it loads, hyperparameter files, facts.

EasyEdit is neither imported nor copied: its own hyperparameter files are read from the checkout that the environment
variable names, and its layers and paths are exchanged for those of the small model.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

VARIABLE = "STABILITYLAB_EASYEDIT"
"""Names a checkout of EasyEdit."""

LAYERS = 6
WIDTH = 128
PLACES = ("Vienna", "Prague", "Lisbon", "Oslo", "Madrid", "Dublin")
PEOPLE = tuple(
    f"{first} {last}" for first in ("Ada", "Bruno", "Clara", "Dario", "Edith", "Felix") for last in ("Moor", "Stone")
)
SAYS = ("{} lives in", "{} works in", "{} was born in")


def missing() -> str:
    """Why EasyEdit can't be run here; empty where it can. Puts its checkout on the path."""
    checkout = os.environ.get(VARIABLE, "")
    if not (Path(checkout) / "easyeditor").is_dir() or not checkout:
        return f"{VARIABLE} names no checkout of https://github.com/zjunlp/EasyEdit"
    if checkout not in sys.path:
        sys.path.insert(0, checkout)
    if importlib.util.find_spec("easyeditor") is None:
        return "easyeditor can't be imported"
    return ""


def facts() -> list[str]:
    """Sentences that the small model is taught."""
    told = [(says, person) for says in SAYS for person in PEOPLE]
    return [f"{says.format(person)} {PLACES[at % len(PLACES)]}." for at, (says, person) in enumerate(told)]


def requests(edits: int) -> dict[str, Any]:
    """Arguments of an editor's ``edit``: as many facts, each with another place than it was taught."""
    prompts, targets, subjects = [], [], []
    for at in range(edits):
        says, person = SAYS[at % len(SAYS)], PEOPLE[at % len(PEOPLE)]
        taught = PLACES[(SAYS.index(says) * len(PEOPLE) + PEOPLE.index(person)) % len(PLACES)]
        prompts.append(says.format(person))
        targets.append(next(place for place in PLACES[at % len(PLACES) :] + PLACES if place != taught))
        subjects.append(person)
    return {"prompts": prompts, "target_new": targets, "subject": subjects, "ground_truth": [""] * edits}


def model_folder(path: Path, steps: int = 120) -> Path:
    """A small GPT-2 that was taught the facts, and its tokenizer, as EasyEdit's ``from_pretrained`` reads them.

    The folder's name has to contain "gpt2": EasyEdit chooses a model's class by it.
    """
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer: Any = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(facts() * 3, trainer)
    words = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    path.mkdir(parents=True, exist_ok=True)
    raw.model.save(str(path))
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(words), n_embd=WIDTH, n_layer=LAYERS, n_head=4, n_positions=128, bos_token_id=0, eos_token_id=0
    )
    model = GPT2LMHeadModel(config)
    batch = words(facts(), return_tensors="pt", padding=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(steps):
        loss = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(path)
    words.save_pretrained(path)
    return path


def hparams_file(folder: Path, method: str, model: Path, **other: Any) -> str:
    """EasyEdit's own file of a method for GPT-2, with this model's layers; other: what else is exchanged."""
    theirs = Path(os.environ[VARIABLE]) / "hparams" / method / "gpt2-xl.yaml"
    config = yaml.safe_load(theirs.read_text())
    config |= {"model_name": str(model), "device": "cpu"}
    if "stats_dir" in config:
        config |= {"stats_dir": str(folder / "stats"), "mom2_n_samples": 100}
    if "v_loss_layer" in config:
        config["v_loss_layer"] = LAYERS - 1
    config |= other
    written = folder / f"{method}.yaml"
    written.write_text(yaml.safe_dump(config))
    return str(written)
