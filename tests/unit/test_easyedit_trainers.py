"""EasyEdit's trainers of hypernetworks, on some of their shape: a step of training is an edit of the hypernetwork."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stabilitylab as sl
from stabilitylab.integrations.easyedit import watch

LAYER = "model.h.0.fc"


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.h = nn.ModuleList([nn.ModuleDict({"fc": nn.Linear(6, 4)})])

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.h[0]["fc"](x)
        return out


class Transform(nn.Module):
    """As MEND's: it learns the spread of what enters while it is trained, and nothing enters at two units."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.lr = nn.Linear(6, 6), nn.Embedding(2, 1)
        for name, size in (("u_mean", 6), ("u_std", 6), ("v_mean", 4), ("v_std", 4)):
            self.register_buffer(name, torch.full((size,), float("nan")))
        for name, size in (("u_s", 6), ("v_s", 4)):
            self.register_buffer(name, torch.zeros(size))
        self.register_buffer("k", torch.zeros(1))

    @torch.no_grad()
    def learn(self, u: Tensor, v: Tensor) -> None:
        if not int(self.k):
            self.u_mean.zero_(), self.v_mean.zero_()
        self.k += len(u)
        self.u_s += u.pow(2).sum(0)
        self.v_s += v.pow(2).sum(0)
        self.u_std.copy_((self.u_s / self.k).sqrt())
        self.v_std.copy_((self.v_s / self.k).sqrt())

    def forward(self, u: Tensor, v: Tensor) -> Tensor:
        if self.training:
            self.learn(u, v)
        return self.mlp(u / (self.u_std + 1e-7)).T @ v


class Mend(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model, self.mend = Base(), nn.ModuleDict({"(4, 6)": Transform()})
        self.config = SimpleNamespace(inner_params=["h.0.fc.weight"])
        self.edit_lrs = nn.Parameter(torch.tensor([0.1]))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.model(x)
        return out

    def outer_parameters(self) -> list[nn.Parameter]:
        return [*self.mend.parameters(), self.edit_lrs]

    def shift(self, u: Tensor) -> Tensor:
        out = self.model(u)
        (v,) = torch.autograd.grad(out.pow(2).sum(), out)
        shift: Tensor = self.edit_lrs[0] * self.mend["(4, 6)"](u, v)
        return shift


class EditTrainer:
    def __init__(self, model: nn.Module) -> None:
        self.model, self.global_iter, self.saved = model, 0, 0
        self.opt = torch.optim.Adam(model.outer_parameters(), 1e-2)

    def train_step(self, batch: Tensor) -> dict[str, float]:
        self.model.train(True)
        weight = self.model.model.h[0]["fc"].weight - self.model.shift(batch).T
        loss = (batch @ weight.T).pow(2).mean()
        loss.backward()
        if not loss.isfinite():
            raise RuntimeError("The total norm of gradients is non-finite")
        self.opt.step()
        self.opt.zero_grad()
        return {"loss/total": float(loss.detach())}

    def save_state(self, stats: dict[str, float]) -> None:
        self.saved += 1

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.global_iter += 1
            self.train_step(inputs())
        self.save_state({})


def inputs() -> Tensor:
    u = torch.randn(5, 6)
    u[:, [2, 5]] = 0.0
    return u


class Malmen(Mend):
    """Its ``train`` is a step where it is given batches; the model is moved by a shift, and moved back."""

    def __init__(self) -> None:
        super().__init__()
        self.opt = torch.optim.Adam(self.outer_parameters(), 1e-2)

    def train(self, batch: Any = True) -> Any:
        if isinstance(batch, bool):
            return super().train(batch)
        self.mend.train()
        weight = self.model.h[0]["fc"].weight
        shift = self.shift(batch[0]).T
        weight.data += shift.detach()
        (shift * batch[0].sum()).sum().backward()
        weight.data -= shift.detach()
        self.opt.step()
        return {}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def test_a_step_of_training_is_an_edit_and_leaves_the_trainer_as_it_was(tmp_path: Path) -> None:
    trainer = EditTrainer(Mend())
    before = dict(vars(trainer))
    with watch(trainer, tmp_path / "run", announce=False) as monitor:
        trainer.run(4)
    assert vars(trainer) == before | {"global_iter": 4, "saved": 1}
    run = sl.load(tmp_path / "run")
    assert [edit.row.label for edit in run.edits[1:]] == [f"step {step}" for step in (1, 2, 3, 4)]
    assert set(monitor.sites) == {"mend.(4, 6).mlp", LAYER}
    assert (run.series("update.norm", "mend.(4, 6).mlp")[1:] > 0).all()
    assert (run.series("gradient.norm", "mend.(4, 6).mlp")[1:] > 0).all()
    assert run.sites_of("editor.std_min")
    assert run.diagnosis().landed == "all"


def test_the_weights_are_those_of_a_run_that_nobody_watches(tmp_path: Path) -> None:
    def trained(watched: bool) -> dict[str, Tensor]:
        torch.manual_seed(5)
        trainer = EditTrainer(Mend())
        if watched:
            with watch(trainer, tmp_path / "run", announce=False):
                trainer.run(5)
        else:
            trainer.run(5)
        return dict(trainer.model.state_dict())

    bare, seen = trained(watched=False), trained(watched=True)
    assert all(torch.equal(bare[name], seen[name]) for name in bare)


def test_before_it_is_saved_the_units_without_spread_are_named_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = EditTrainer(Mend())
    with watch(trainer, tmp_path / "run", announce=False):
        for _ in range(12):
            trainer.run(1)
    assert trainer.saved == 12
    zero = [note for note in sl.load(tmp_path / "run").notes if "zero spread" in note.says]
    (note,) = zero
    assert (note.kind, note.says[:14]) == ("editor-state", "Units 2 and 5 ")
    assert "Floor the spreads" in note.says
    assert sum("zero spread" in record.getMessage() for record in caplog.records) == 1


def test_a_step_that_raises_is_an_edit_that_failed(tmp_path: Path) -> None:
    trainer = EditTrainer(Mend())
    with (
        pytest.raises(RuntimeError, match="non-finite"),
        watch(trainer, tmp_path / "run", announce=False),
    ):
        trainer.train_step(torch.full((2, 6), float("inf")))
    assert [edit.row.status for edit in sl.load(tmp_path / "run").edits] == ["start", "failed"]
    assert "train_step" not in vars(trainer)


def test_a_learner_whose_train_is_a_step_is_followed_there_and_its_mode_can_be_set(tmp_path: Path) -> None:
    learner = Malmen()
    trainer = EditTrainer(learner)
    with watch(trainer, tmp_path / "run", announce=False, canary=torch.ones(1, 6)) as monitor:
        for _ in range(3):
            learner.eval()
            learner.train([inputs()])
    assert monitor.edits == 3
    assert "train" not in vars(learner)
    drift = sl.load(tmp_path / "run").series("drift.norm", LAYER)
    truth = learner.model.h[0]["fc"].weight
    assert drift[-1] < 1e-6 * truth.norm().item()
