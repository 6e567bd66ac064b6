"""The shipped checkpoints: a model that sees digits, an editor that edits, and what comes of editing on and on."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from stabilitylab.editors.mend import Mend
from stabilitylab.errors import UsageError
from stabilitylab.testbed import blip2_digits, digits, evaluation
from stabilitylab.testbed.mend_data import shipped
from stabilitylab.testbed.records import load_records
from stabilitylab.testbed.train import first_non_finite, main


@pytest.fixture
def loaded() -> tuple[Any, Any, Mend]:
    model, tokenizer = blip2_digits.load()
    return model, tokenizer, shipped(Mend, model)


def test_checkpoints_are_small_and_hold_statistics() -> None:
    assert sum(path.stat().st_size for path in blip2_digits.CHECKPOINTS.iterdir()) <= 2_000_000
    model, _ = blip2_digits.load()
    assert sum(parameter.numel() for parameter in model.parameters()) < 1_000_000
    for transform in shipped(Mend, model).transforms.values():
        assert float(transform.u_std.max()) > 0
        assert not torch.equal(transform.u_std, torch.ones_like(transform.u_std))


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_held_out_questions_are_answered(precision: str) -> None:
    model, tokenizer = blip2_digits.load(precision)
    assert evaluation.accuracy(model, tokenizer) > 0.9
    assert evaluation.text_accuracy(model, tokenizer) > 0.9


def test_single_edits_work_and_stay_local(loaded: tuple[Any, Any, Mend]) -> None:
    model, tokenizer, mend = loaded
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = evaluation.single_edits(model, tokenizer, digits.edit_stream(777, 100), mend.edit)
    assert found.efficacy >= 0.765  # the report's figure
    assert found.rephrase >= 0.75
    assert found.image_rephrase >= 0.65
    assert found.text_locality >= 0.9
    assert found.image_locality >= 0.9
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_fresh_load_is_bit_identical(loaded: tuple[Any, Any, Mend]) -> None:
    model, tokenizer, mend = loaded
    canary = blip2_digits.canary(tokenizer)
    for record in digits.edit_stream(0, 2):
        mend.edit(model, record)
    fresh, _ = blip2_digits.load()
    again, _ = blip2_digits.load()
    assert not torch.equal(model(**canary).logits, fresh(**canary).logits)
    assert torch.equal(again(**canary).logits, fresh(**canary).logits)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in fresh.state_dict().items())
    other = shipped(Mend, fresh)
    for record in digits.edit_stream(0, 2):
        other.edit(fresh, record)
    assert torch.equal(model(**canary).logits, fresh(**canary).logits)


def test_sequential_edits_end_in_nan_by_themselves() -> None:
    ends = [first_non_finite(blip2_digits.CHECKPOINTS, seed) for seed in (0, 1)]
    assert any(end is not None for end in ends)


def test_nan_is_neither_success_nor_preserved(loaded: tuple[Any, Any, Mend]) -> None:
    model, tokenizer, _ = loaded
    records = digits.edit_stream(0, 4)
    originals = evaluation.Originals.of(model, tokenizer, records)
    assert originals.outcomes(model, tokenizer, range(4))[:, 3:].all()
    with torch.no_grad():
        model.language_model.model.decoder.layers[2].fc1.weight.fill_(float("nan"))
    assert not originals.outcomes(model, tokenizer, range(4)).any()
    broken = evaluation.Originals.of(model, tokenizer, records)
    assert not broken.outcomes(model, tokenizer, range(4)).any()


def test_a_record_from_a_file_or_a_mapping_is_the_same_edit(loaded: tuple[Any, Any, Mend], tmp_path: Path) -> None:
    model, _, mend = loaded
    record = digits.edit_stream(3, 1)[0]
    file = tmp_path / "edits.json"
    file.write_text(json.dumps([asdict(record)]), encoding="utf-8")
    assert load_records(file) == [record]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    mend.edit(model, record)
    once = {site: model.get_submodule(site).weight.clone() for site in mend.sites}
    model.load_state_dict(before)
    mend.edit(model, asdict(record))
    assert all(torch.equal(model.get_submodule(site).weight, weight) for site, weight in once.items())
    assert not any(torch.equal(before[f"{site}.weight"], weight) for site, weight in once.items())


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    file = tmp_path / blip2_digits.FILE
    file.write_bytes((blip2_digits.CHECKPOINTS / "mend.safetensors").read_bytes())
    with pytest.raises(UsageError, match=r"is not of this model: .* tensors differ"):
        blip2_digits.load(folder=tmp_path)
    file.write_bytes(b"no safetensors")
    with pytest.raises(UsageError, match="can't be read as safetensors"):
        blip2_digits.load(folder=tmp_path)


def test_missing_checkpoints_name_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match=r"python -m stabilitylab\.testbed\.train --out"):
        blip2_digits.load(folder=tmp_path)
    assert main(["--table", "--out", str(tmp_path)]) == 2
    assert "no checkpoint" in capsys.readouterr().err
