"""Second moments of keys against naive NumPy; what the editors that share them keep, and what they say without."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stabilitylab.editors.alphaedit import AlphaEdit
from stabilitylab.editors.base import Prepared
from stabilitylab.editors.layers import mlp_layers
from stabilitylab.editors.memit import Memit
from stabilitylab.editors.rome import Rome
from stabilitylab.editors.second_moments import KeyValueEditor, second_moments
from stabilitylab.errors import SiteError, UsageError
from tests.key_value import MODELS, Texts, caught, changed, hooks, llama, locate, requests, state

EDITORS: tuple[Any, ...] = (Rome, Memit, AlphaEdit)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_they_are_naive_numpys_over_every_token_that_is_no_padding(kind: str, dtype: torch.dtype) -> None:
    model = MODELS[kind]().to(dtype)
    sites = [mlp_layers(model, "down")[number] for number in (1, 2)]
    texts = list(Texts(batches=3).texts())
    found = second_moments(model, sites, texts)
    model.eval()
    for site in sites:
        every, beyond = [], []
        for batch in texts:
            keys = caught(model, batch, site)[0].numpy()
            for row, mask in zip(keys, batch["attention_mask"].numpy(), strict=True):
                used = [key for key, counts in zip(row, mask, strict=True) if counts]
                every += used
                beyond += used[1:]
        assert found.tokens == len(every) == sum(int(batch["attention_mask"].sum()) for batch in texts)
        naive = sum(np.outer(key, key) for key in every) / len(every)
        np.testing.assert_allclose(found.matrices[site].numpy(), naive, rtol=1e-6, atol=1e-7 * np.abs(naive).max())
        assert found.matrices[site].dtype == torch.float32
        assert found.power[site] == pytest.approx(np.mean(np.square(beyond)), rel=1e-9)
        padded = found.padded(site, 0.5) - found.padded(site, 0.0)
        np.testing.assert_allclose(padded.numpy(), 0.5 * found.power[site] * np.eye(24), atol=1e-12)


def test_reading_ends_at_the_number_of_tokens_asked_for_and_is_reported() -> None:
    model = llama()
    site = mlp_layers(model, "down")[1]
    told: list[tuple[int, int, str]] = []
    per_batch = 4 * 12 - 2 * 5
    found = second_moments(model, [site], Texts().texts(), per_batch + 1, lambda *said: told.append(said))
    assert found.tokens == 2 * per_batch
    assert [done for done, _, _ in told] == [per_batch, per_batch + 1]
    assert {steps for _, steps, _ in told} == {per_batch + 1}
    with pytest.raises(UsageError, match="two tokens or more"):
        second_moments(model, [site], [])
    with pytest.raises(UsageError, match="two tokens or more"):
        second_moments(model, [site], Texts(width=1).texts())


def test_the_forward_ends_at_the_last_site() -> None:
    model = llama()
    down = mlp_layers(model, "down")
    ran: list[int] = []
    handles = [model.get_submodule(down[n]).register_forward_hook(lambda *_, n=n: ran.append(n)) for n in down]
    second_moments(model, [down[0], down[1]], Texts(batches=1).texts())
    assert ran == [0]
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("kind", EDITORS)
@pytest.mark.parametrize("family", MODELS)
def test_preparing_leaves_the_model_and_the_random_state_alone(kind: Any, family: str) -> None:
    model = MODELS[family]()
    next(iter(model.parameters())).requires_grad_(False)
    before, flags = state(model), [p.requires_grad for p in model.parameters()]
    training, random = model.training, torch.get_rng_state()
    editor = kind.for_model(model, locate=locate)
    assert isinstance(editor, Prepared)
    editor.prepare(model, Texts(), seed=0)
    assert not changed(before, model)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [m.training for m in model.modules()] == [training] * len(list(model.modules()))
    assert torch.equal(torch.get_rng_state(), random)
    assert hooks(model) == 0
    assert not any(value is model for value in vars(editor).values())


@pytest.mark.parametrize("kind", EDITORS)
def test_a_saved_state_edits_as_the_one_that_was_learned(kind: Any, tmp_path: Path) -> None:
    model = llama()
    editor: KeyValueEditor = kind.for_model(model, locate=locate)
    editor.prepare(model, Texts(), seed=0)
    file = editor.save(tmp_path / "made")
    assert file == tmp_path / "made" / editor.file
    assert [entry.name for entry in file.parent.iterdir()] == [editor.file]
    again = kind.for_model(model, locate=locate)
    again.restore(file.parent)
    twin = copy.deepcopy(model)
    for request in requests(2):
        editor.edit(model, request)
        again.edit(twin, request)
    assert not changed(state(twin), model)


@pytest.mark.parametrize("kind", EDITORS)
def test_what_is_missing_or_foreign_is_named(kind: Any, tmp_path: Path) -> None:
    model = llama()
    editor = kind.for_model(model, locate=locate)
    before = state(model)
    with pytest.raises(UsageError, match=rf"{kind.__name__} knows no second moments .*{editor.sites[0]}.*prepare"):
        editor.edit(model, requests(1)[0])
    with pytest.raises(UsageError, match="knows no second moments"):
        editor.save(tmp_path)
    assert not changed(before, model)
    with pytest.raises(UsageError, match="no checkpoint"):
        editor.restore(tmp_path)
    (tmp_path / editor.file).write_bytes(b"nonsense")
    with pytest.raises(UsageError, match="can't be read as safetensors"):
        editor.restore(tmp_path)
    other = next(other for other in EDITORS if other is not kind).for_model(model, locate=locate)
    other.prepare(model, Texts(), seed=0)
    other.save(tmp_path / "other").rename(tmp_path / editor.file)
    with pytest.raises(UsageError, match=f"no state of {kind.__name__}; it was written by {type(other).__name__}"):
        editor.restore(tmp_path)
    editor.prepare(model, Texts(), seed=0)
    editor.save(tmp_path)
    wider = kind(dict.fromkeys(editor.sites, (16, 25)), locate=locate)
    with pytest.raises(UsageError, match="of 24 inputs; the layer has 25"):
        wider.restore(tmp_path)
    elsewhere = kind({"model.layers.3.mlp.down_proj": (16, 24)}, locate=locate)
    with pytest.raises(UsageError, match=r"is of the layers .*; this editor edits model.layers.3"):
        elsewhere.restore(tmp_path)


def test_layers_that_are_not_there_are_named() -> None:
    model = llama()
    with pytest.raises(SiteError, match="no decoder layer 9; expected 0 to 3"):
        Rome.for_model(model, locate=locate, layer=9)
    with pytest.raises(UsageError, match="no layer to edit"):
        Memit.for_model(model, locate=locate, layers=[])
    assert AlphaEdit.for_model(model, locate=locate, layers=[2, 0]).sites == tuple(
        mlp_layers(model, "down")[number] for number in (0, 2)
    )
