"""What attaching costs and leaves: each weight is read and copied once, and nothing that is large is decomposed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import stabilitylab as sl
from stabilitylab.probes import weight_pass
from stabilitylab.watching.instruments import weights
from stabilitylab.watching.instruments.references import References
from stabilitylab.watching.sites import find_sites


def two_layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 32))


def bump(model: nn.Module, size: float = 0.05) -> None:
    with torch.no_grad():
        model[0].weight.add_(size * torch.outer(torch.randn(48), torch.randn(64)))  # type: ignore[index]


def test_large_weights_are_decomposed_from_the_first_edit_on_that_moves_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "_AT_ONCE", 100)
    monkeypatch.setattr(weights, "start_direction", lambda _: pytest.fail("decomposed before the first edit"))
    model, exact = two_layers(), []
    with sl.attach(model, "*", tmp_path / "run", announce=False) as monitor:
        for edit in range(4):
            with monitor.edit():
                if edit:
                    bump(model)
            exact.append(float(torch.linalg.matrix_norm(model[0].weight.detach().double(), 2)))
    run = sl.load(tmp_path / "run")
    assert "probe-off" not in {note.kind for note in run.notes}
    assert run.present("weight.spectral_norm", "0").tolist() == [False, False, True, True, True]
    np.testing.assert_allclose(run.series("weight.spectral_norm", "0")[2:], exact[1:], rtol=0.01)
    assert "1" not in run.sites_of("weight.spectral_norm")


def test_each_weight_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, scan = [], weight_pass._scan_on_cpu
    monkeypatch.setattr(weight_pass, "_scan_on_cpu", lambda *given: (read.append(given[0].shape), scan(*given))[1])
    model = two_layers()
    with sl.attach(model, ["0", "1"], tmp_path / "run", announce=False):
        assert sorted(read) == [(32, 48), (48, 64)]
    row = sl.load(tmp_path / "run")
    assert row.series("weight.norm", "0")[0] == pytest.approx(float(model[0].weight.detach().norm()), rel=1e-6)
    assert (row.series("update.norm", "0")[0], row.series("drift.norm", "0")[0]) == (0, 0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_weight_that_is_not_finite_before_any_edit_is_not_near_itself(bad: float) -> None:
    weight = torch.ones(4, 20)
    weight[1, 3] = bad
    norm, first, drift, update, low, high, nonfinite = weight_pass.pass_at_rest(weight).tolist()
    assert nonfinite == 1
    assert np.isnan([drift, update]).all()
    assert not np.isfinite([norm, first]).any()
    assert np.isnan(low) if np.isnan(bad) else (low, high) == (1, bad)


def test_a_second_copy_is_made_where_a_weight_moves() -> None:
    model, references = two_layers(), References()
    sites = {site.name: site for site in find_sites(model, ["0", "1"])}
    for name, site in sites.items():
        references.adopt(site, model.get_submodule(name).weight)
    before = model[0].weight.detach().clone()
    bump(model)
    moved = references.measure("0", model[0].weight)
    assert references.measure("1", model[1].weight).update == 0
    assert moved.update == pytest.approx(float((model[0].weight.detach() - before).norm()), rel=1e-5)
    assert torch.equal(references.original("0", before), before)
    assert torch.equal(references.previous("0", before), model[0].weight)
    assert references.previous("1", before) is references.original("1", before)


def test_memory_that_was_looked_at_can_be_resized_as_before(tmp_path: Path) -> None:
    model = two_layers()
    with sl.attach(model, "0", tmp_path / "run", announce=False) as monitor:
        for _ in range(2):
            with monitor.edit():
                model(torch.randn(3, 64)).sum().backward()
                bump(model)
    assert all(each.untyped_storage().resizable() for each in model.parameters())
