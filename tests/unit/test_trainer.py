"""`StabilityCallback` in transformers' Trainer: one optimizer step is one edit."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

import stabilitylab as sl
from stabilitylab.errors import SiteError
from stabilitylab.integrations.transformers import StabilityCallback
from tests.gpt2_loop import TEXT, TOKENS, VOCABULARY, make_gpt2
from tests.loops import hooks_on, make_model

SITE = "transformer.h.0.mlp.c_fc"
MAX_NORM = 0.5


class Data(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Texts to train on; asked for its `breaks_at`-th, it raises, as a file that can't be read does."""

    def __init__(self, breaks_at: int | None = None) -> None:
        self.breaks_at = breaks_at

    def __len__(self) -> int:
        return 40

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        return {"input_ids": (tokens := (torch.arange(TOKENS) * (number + 3)) % VOCABULARY), "labels": tokens}

    def collate(self, rows: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        if self.breaks_at is not None:
            self.breaks_at -= 1
            if self.breaks_at == 0:
                raise OSError("no such text")
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def trainer(folder: Path, callback: StabilityCallback | None, *, data: Data | None = None, **options: Any) -> Trainer:
    data = data or Data()
    arguments: dict[str, Any] = {"max_steps": 3, "save_strategy": "no"} | options
    return Trainer(
        make_gpt2(),
        TrainingArguments(
            str(folder),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_grad_norm=MAX_NORM,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            **arguments,
        ),
        train_dataset=data,
        data_collator=data.collate,
        callbacks=[] if callback is None else [callback],  # type: ignore[list-item]
    )


def rows(run: Path) -> list[tuple[str, str]]:
    return [(edit.row.label, edit.row.status) for edit in sl.load(run).edits[1:]]


def test_a_step_is_an_edit_with_its_accumulation_and_its_clipping_and_leaves_no_trace(tmp_path: Path) -> None:
    callback = StabilityCallback(tmp_path / "run", sites="*.c_fc", canary=TEXT)
    trained = []
    for given in (callback, None):  # each seeds the random numbers as it is made
        trained.append(trainer(tmp_path, given))
        trained[-1].train()
    watched, bare = trained
    for one, other in zip(watched.model.parameters(), bare.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert hooks_on(watched.model) == hooks_on(bare.model)
    run = sl.load(tmp_path / "run")
    assert (rows(run.path), run.complete) == ([(f"step {number}", "applied") for number in (1, 2, 3)], True)
    assert (run.series("gradient.passes", SITE)[1:] == 2).all()
    assert (run.series("update.norm", SITE)[1:] > 0).all()
    stepped, norms = run.series("gradient.norm_stepped", SITE)[1:], run.series("gradient.norm", SITE)[1:]
    assert ((stepped < norms) & (stepped < MAX_NORM)).all()
    assert callback.monitor is not None
    assert callback.monitor.diagnosis().verdict == "stable"


def test_an_exception_leaves_an_edit_open_that_close_ends_as_failed(tmp_path: Path) -> None:
    callback = StabilityCallback(tmp_path / "run", sites="*.c_fc")
    broken = trainer(tmp_path, callback)
    compute_loss, calls = broken.compute_loss, []

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("out of memory")
        return compute_loss(*args, **kwargs)

    broken.compute_loss = failing  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="out of memory"):
        broken.train()
    callback.close()
    assert hooks_on(broken.model) == 0
    assert rows(tmp_path / "run") == [("step 1", "applied"), ("step 2", "failed")]
    assert sl.load(tmp_path / "run").complete


def test_training_again_ends_what_an_exception_left_open_and_is_a_run_of_its_own(tmp_path: Path) -> None:
    callback, data = StabilityCallback(tmp_path / "run", sites="*.c_fc"), Data(breaks_at=4)
    broken = trainer(tmp_path, callback, data=data)
    with pytest.raises(OSError, match="no such text"):
        broken.train()
    broken.train()
    assert sl.load(tmp_path / "run").complete
    assert rows(tmp_path / "run-2") == [(f"step {number}", "applied") for number in (1, 2, 3)]
    assert hooks_on(broken.model) == 0


def test_a_script_that_starts_again_from_its_checkpoint_goes_on_in_the_next_free_folder(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    trainer(tmp_path, StabilityCallback(tmp_path / "run", sites="*.c_fc"), max_steps=2, **saving).train()
    with caplog.at_level(logging.WARNING, "stabilitylab"):
        callback = StabilityCallback(tmp_path / "run", sites="*.c_fc")
        trainer(tmp_path, callback, **saving).train(resume_from_checkpoint=True)
    assert rows(tmp_path / "run") == [("step 1", "applied"), ("step 2", "applied")]
    assert rows(tmp_path / "run-2") == [("step 3", "applied")]
    (note,) = [note.says for note in sl.load(tmp_path / "run-2").notes if note.kind == "resumed"]
    assert "run folder" in note
    assert note in caplog.text


def test_a_site_that_is_not_there_is_said_before_training_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(SiteError, match=r"'\*\.c_cf' matches no layer"):
        trainer(tmp_path, StabilityCallback(tmp_path / "run", sites="*.c_cf")).train()
    assert not (tmp_path / "run").exists()


def test_the_first_process_watches_and_reads_the_loss_scaler_that_the_optimizer_has(tmp_path: Path) -> None:
    optimizer, callback = SimpleNamespace(scaler=torch.amp.GradScaler("cpu")), StabilityCallback(tmp_path / "run")
    for is_first in (False, True):
        state = SimpleNamespace(is_world_process_zero=is_first, global_step=0)
        callback.on_train_begin(None, state, None, model=make_model(), optimizer=optimizer)
        callback.on_step_begin(None, state, None)
        callback.on_step_end(None, state, None)
        callback.on_train_end(None, state, None)
        assert (tmp_path / "run").exists() == is_first
    assert sl.load(tmp_path / "run").manifest["editor_class"] == "dict of scaler"


def test_events_that_say_nothing_of_edits_are_heard_and_nothing_else_is_made_up() -> None:
    callback = StabilityCallback()
    assert callback.on_something_of_a_later_release(None, None, None) is None
    with pytest.raises(AttributeError, match="no attribute 'step'"):
        callback.step  # noqa: B018
