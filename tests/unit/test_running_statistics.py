"""Loops whose editor goes on collecting statistics, with EasyEdit's own normalisers: what is read, and what is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import stabilitylab as sl
from stabilitylab.record.run import Run
from stabilitylab.record.serving import SERVES
from stabilitylab.watching.served_layers import layers_behind
from stabilitylab.watching.sites import find_sites
from tests import editor_fakes as fakes

pytestmark = pytest.mark.filterwarnings("ignore:var")  # of one row: the editors' own
EPSILON = torch.finfo(torch.float32).eps


class RunningMeanStd(fakes.RunningMeanStd):
    """With the update of EasyEdit's source (easyeditor/trainer/algs/malmen/nets.py)."""

    def update(self, x: Tensor) -> None:
        n = self.n + x.shape[0]
        delta = x.mean(0) - self.mean
        self.mean += x.shape[0] * delta / n
        self.var += x.shape[0] * x.var(0) + self.n * x.shape[0] * delta.pow(2) / n
        self.std = (self.var / (n - 1 + EPSILON)).sqrt()
        self.n = n


class GradientTransform(fakes.GradientTransform):
    """With the statistics of EasyEdit's source (easyeditor/trainer/algs/MEND.py), and no network behind them."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.norm_init = False

    def forward(self, u: Tensor, v: Tensor) -> Tensor:
        if self.training:
            for row_u, row_v in zip(u, v, strict=True):
                if not self.norm_init:
                    self.u_mean, self.v_mean = row_u.clone(), row_v.clone()
                    self.u_s.zero_(), self.v_s.zero_()
                    self.k[:] = 1
                    self.norm_init = True
                else:
                    self.k += 1
                    for name, x in (("u", row_u), ("v", row_v)):
                        mean, total = getattr(self, f"{name}_mean"), getattr(self, f"{name}_s")
                        now = mean + (x - mean) / self.k
                        setattr(self, f"{name}_mean", now)
                        setattr(self, f"{name}_s", total + (x - mean) * (x - now))
            self.u_std, self.v_std = ((s / (self.k - 1)) ** 0.5 for s in (self.u_s, self.v_s))
        return torch.cat(((u - self.u_mean) / (self.u_std + 1e-7), (v - self.v_mean) / (self.v_std + 1e-7)), -1)


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.ModuleDict({"fc1": nn.Linear(4, 8), "fc2": nn.Linear(8, 4)}) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer["fc2"](layer["fc1"](x).relu())
        return x


def rows(seed: int, n: int, units: int = 12) -> Tensor:
    return torch.randn(n, units, generator=torch.Generator().manual_seed(seed))


def watched(folder: Path, net: nn.Module, edits: int, edit: Callable[[int], Tensor | None]) -> Run:
    """edit: what it adds to the weight of the first fc2, from the edit's number on."""
    model, editor = MLP(), SimpleNamespace(net=nn.ModuleDict({"(8, 4)": net}))
    monitor = sl.attach(model, sites="*.fc*", run=folder, editor=editor)
    with monitor:
        for number in range(1, edits + 1):
            with monitor.edit():
                model(rows(number, 5, 4))
                with torch.no_grad():
                    added = edit(number)
                    model.layers[0]["fc2"].weight += 1e-4 * rows(number, 4, 8) if added is None else added
        online = monitor.diagnosis()
    run = sl.load(folder)
    assert run.diagnosis().to_json() == online.to_json()
    return run


def said(run: Run) -> dict[str, str]:
    return {finding.rule: finding.says for finding in run.diagnosis().findings}


SITE = "editor.net.(8, 4)"


def running(batches: Callable[[int], Tensor], used: bool = True) -> tuple[RunningMeanStd, Callable[[int], None]]:
    net = RunningMeanStd(12)

    def edit(number: int) -> None:
        net.update(batches(number))
        if used:
            net(batches(number))

    return net, edit


@pytest.mark.parametrize("begun", [0.0, float("nan")])
def test_a_normaliser_that_has_seen_nothing_yet(tmp_path: Path, begun: float) -> None:
    net, edit = running(lambda number: rows(number, 40))
    net.std.fill_(begun)
    run = watched(tmp_path, net, 12, edit)
    assert run.series("editor.seen_rows", SITE).tolist() == [40.0 * number for number in range(13)]
    assert not run.present("editor.std_min", SITE)[0]
    assert run.present("editor.std_min", SITE)[1:].all()
    assert list(said(run)) == ["statistics-moved"]
    assert (run.diagnosis().verdict, run.diagnosis().cause) == ("stable", "unknown")
    assert not [word for word in ("frozen", "anew", "standard deviation of 0") if word in json.dumps(said(run))]


@pytest.mark.parametrize("added", [None, torch.full((4, 8), float("nan"))])
def test_a_first_batch_of_one_row(tmp_path: Path, added: Tensor | None) -> None:
    net, update = running(lambda number: rows(number, 1))

    def edit(number: int) -> Tensor | None:
        update(number)
        return added

    diagnosis = watched(tmp_path, net, 1, edit).diagnosis()
    assert (diagnosis.verdict, diagnosis.cause) == ("non-finite", "normaliser-too-few-rows")
    assert diagnosis.first_bad_site == SITE
    assert "(serves layers.0.fc2, layers.1.fc2) was made from one row by edit 1" in diagnosis.cause_says
    assert diagnosis.causes[0].role == "trigger"


def test_a_later_batch_of_one_row(tmp_path: Path) -> None:
    net, edit = running(lambda number: rows(number, 1 if number == 5 else 40))
    run = watched(tmp_path, net, 7, edit)
    diagnosis = run.diagnosis()
    assert (diagnosis.cause, diagnosis.first_bad_edit) == ("normaliser-nan", 5)
    assert "an update with a single row" in diagnosis.cause_says
    assert run.series("editor.seen_rows", SITE)[-3:].tolist() == [161.0, 201.0, 241.0]


def test_a_count_that_was_lost(tmp_path: Path) -> None:
    net, update = running(lambda number: rows(number, 40))

    def edit(number: int) -> None:
        if number == 6:  # resumed without the count
            net.n.zero_(), net.mean.zero_(), net.var.zero_()
        update(number)

    run = watched(tmp_path, net, 8, edit)
    assert "it had seen 200 rows, and has now seen 40" in said(run)["statistics-restarted"]
    assert run.diagnosis().cause == "statistics-restarted"


def test_a_normaliser_that_is_used_before_its_first_row(tmp_path: Path) -> None:
    net = RunningMeanStd(12)

    def edit(number: int) -> Tensor:
        return 1e-9 * net(rows(number, 4))[:, :8]

    run = watched(tmp_path, net, 3, edit)
    assert "before it has seen any row" in said(run)["no-row"]
    assert run.diagnosis().cause == "normaliser-too-few-rows"
    assert not run.present("editor.std_min", SITE)[0]


def test_units_of_both_sides_that_never_fired_are_listed_at_edit_0(tmp_path: Path) -> None:
    net = GradientTransform(8, 4).train()
    u, v = rows(0, 50, 8), rows(1, 50, 4)
    u[:, [2, 5]], v[:, 3] = 0.25, 0.0
    net(u, v)
    net.eval()

    def edit(number: int) -> Tensor | None:
        delta = rows(number + 9, 6, 4)
        delta[:, 3] = 0.5 if number == 3 else 0.0
        entering = rows(number, 6, 8)
        entering[:, [2, 5]] = 0.25
        return 1e-3 * net(entering, delta)[:4, :8]

    run = watched(tmp_path, net, 4, edit)
    assert run.series("editor.zero_units", f"{SITE}.u")[0][:2].tolist() == [2.0, 5.0]
    assert run.series("editor.zero_units", f"{SITE}.v")[0][:1].tolist() == [3.0]
    listed = [(finding.edit, finding.says) for finding in run.diagnosis().findings if finding.rule == "zero-std"]
    beside = "(serves layers.0.fc2, layers.1.fc2)"
    assert [edit for edit, _ in listed] == [0, 0]
    assert f"{SITE}.u {beside}, units 2 and 5:" in listed[0][1]
    assert f"{SITE}.v {beside}, unit 3:" in listed[1][1]
    assert run.diagnosis().cause == "normaliser-zero-std"
    assert f"unit 3 of the editor's frozen normaliser at {SITE}.v {beside}" in run.diagnosis().cause_says
    assert np.unique(run.series("editor.seen_rows", f"{SITE}.u")).tolist() == [50.0]


def test_mend_that_was_never_loaded_and_mend_that_is_still_to_learn(tmp_path: Path) -> None:
    def edit(net: GradientTransform) -> Callable[[int], None]:
        def made(number: int) -> None:
            net(rows(number, 6, 8), rows(number + 9, 6, 4))

        return made

    lost = GradientTransform(8, 4).eval()
    diagnosis = watched(tmp_path / "lost", lost, 1, edit(lost)).diagnosis()
    assert (diagnosis.cause, diagnosis.first_bad_edit) == ("normaliser-nan", 0)
    fresh = GradientTransform(8, 4).train()
    run = watched(tmp_path / "fresh", fresh, 3, edit(fresh))
    assert run.diagnosis().verdict == "stable"
    assert run.series("editor.seen_rows", f"{SITE}.v").tolist() == [0.0, 6.0, 12.0, 18.0]


# -- which layers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parts", "expected"),
    [
        ("mend.(8, 4)", (8, 4), "fc2"),
        ("mend.(4, 8)", (8, 4), "fc2"),  # named by the weight: what it keeps tells which way round
        ("lifelong.(4, 8)", (12,), "fc1"),
        ("net.torch.Size([8, 4]).normalizer", (), "fc2"),
        ("transforms.4x8", (8, 4), "fc2"),
        ("transforms.0x4x8", (8, 4), None),
        ("mend.(8, 5)", (8, 5), None),
        ("mend.0", (8, 4), None),
        ("mend.layers#0#fc2#weight", (8, 4), None),
    ],
)
def test_layers_by_shape(name: str, parts: tuple[int, ...], expected: str | None) -> None:
    found = layers_behind(name, parts, find_sites(MLP(), "*.fc*"))
    assert found == (() if expected is None else tuple(f"layers.{number}.{expected}" for number in (0, 1)))


def test_either_way_round_will_do_where_none_is_exact() -> None:
    assert layers_behind("mend.(8, 4)", (), find_sites(MLP(), "*.fc1")) == ("layers.0.fc1", "layers.1.fc1")


def test_the_layers_are_noted_once_and_as_soon_as_sites_are_known(tmp_path: Path) -> None:
    model, editor = MLP(), SimpleNamespace()
    with sl.attach(model, run=tmp_path, editor=editor) as monitor:
        for _ in range(3):
            with monitor.edit(), torch.no_grad():
                if not vars(editor):  # made inside the first call
                    editor.alg: Any = nn.ModuleDict({"(8, 4)": RunningMeanStd(12)})
                model(rows(0, 5, 4))
                model.layers[1]["fc2"].weight += 1e-4
    notes = [(note.edit, note.says) for note in sl.load(tmp_path).notes if note.kind == SERVES]
    assert notes == [(1, "editor.alg.(8, 4) serves layers.1.fc2")]
