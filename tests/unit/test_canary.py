"""When the canary is forwarded, what it is compared with, and what it costs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import stabilitylab as sl
from stabilitylab.errors import UsageError
from stabilitylab.integrations import easyedit
from stabilitylab.watching.canary import QUIET_SHARE, Schedule
from tests.gpt2_loop import TEXT, edit_gpt2, make_gpt2
from tests.loops import CANARY, edit_once, make_model

Act = Callable[[nn.Module, int], object]


def forwarded(folder: Path) -> list[int]:
    """The edits that have a reading of the canary."""
    run = sl.load(folder)
    return run.edit_numbers[run.present("canary.max")].astype(int).tolist()


def watch(folder: Path, canary: object, edits: int, act: Act) -> sl.Run:
    model = make_model()
    with sl.attach(model, "[03]", folder, canary=canary) as monitor:
        for edit in range(1, edits + 1):
            with monitor.edit():
                act(model, edit)
            assert monitor.diagnosis() == sl.load(folder).diagnosis()
    return sl.load(folder)


@torch.no_grad()
def push(model: nn.Module, by: float) -> None:
    model[3].weight += by


# -- each n-th edit ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 2, 5])
def test_every(tmp_path: Path, every: int) -> None:
    run = watch(tmp_path / "run", sl.Canary(CANARY, every=every), 11, lambda model, _: push(model, 0.01))
    assert forwarded(run.path) == list(range(0, 12, every))
    assert [edit.edit for edit in run.edits if edit.row.canary_seconds > 0] == forwarded(run.path)
    assert (run.canary_time_share or 0) > 0


def test_at_once_when_a_weight_leaps_and_once_only(tmp_path: Path) -> None:
    run = watch(
        tmp_path / "run", sl.Canary(CANARY, every=100), 12, lambda model, edit: push(model, 0.01 if edit < 9 else 1.0)
    )
    assert forwarded(run.path) == [0, 9]


@pytest.mark.parametrize("probes", ["default", "light"])
def test_at_once_when_a_weight_is_no_longer_finite(tmp_path: Path, probes: Any) -> None:
    model = make_model()
    with sl.attach(model, "[03]", tmp_path / "run", canary=sl.Canary(CANARY, every=100), probes=probes) as monitor:
        for edit in range(1, 6):
            with monitor.edit():
                push(model, math.nan if edit == 2 else 0.01)
    assert forwarded(tmp_path / "run") == [0, 2]


def test_never_after_an_edit_that_failed(tmp_path: Path) -> None:
    model = make_model()
    with sl.attach(model, "[03]", tmp_path / "run", canary=sl.Canary(CANARY, every=2)) as monitor:
        for edit in range(1, 7):
            with monitor.edit():
                push(model, 0.01)
            if edit == 3:
                with pytest.raises(KeyError), monitor.edit():
                    raise KeyError
    run = sl.load(tmp_path / "run")
    assert [edit.edit for edit in run.edits if edit.status == "failed"] == [4]
    assert forwarded(run.path) == [0, 2, 6]


def test_a_replay_has_a_cadence_too(tmp_path: Path) -> None:
    run = watch(tmp_path / "run", sl.Canary("replay", every=3), 7, lambda model, _: edit_once(model))
    assert forwarded(run.path) == [3, 6]


# -- a share of the loop's time ---------------------------------------------------------------------------------------


class Clock:
    """Time that passes only where a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr(time, "perf_counter", fake)
    return fake


def budgeted(folder: Path, clock: Clock, budget: float, edits: int, act: Act, cost: float = 0.25) -> sl.Run:
    """A run of edits that take a second each. cost: of one canary, in seconds."""

    def canary(model: nn.Module) -> Tensor:
        clock.now += cost
        return model(CANARY)

    def in_a_second(model: nn.Module, edit: int) -> None:
        act(model, edit)
        clock.now += 1.0

    model = make_model()
    with sl.attach(model, "[03]", folder, canary=sl.Canary(canary, budget=budget)) as monitor:
        for edit in range(1, edits + 1):
            with monitor.edit():
                in_a_second(model, edit)
    return sl.load(folder)


def still(model: nn.Module, edit: int) -> None:
    push(model, 0.01)


def growing(model: nn.Module, edit: int) -> None:
    push(model, 0.01 * 1.2**edit)  # moving at each edit, and never a leap


@pytest.mark.parametrize(("act", "part"), [(still, QUIET_SHARE), (growing, 1.0)], ids=["still", "growing"])
@pytest.mark.parametrize("budget", [0.02, 0.05, 0.2])
def test_its_share_stays_within_the_budget_and_is_half_of_it_while_nothing_moves(
    tmp_path: Path, clock: Clock, act: Act, part: float, budget: float
) -> None:
    run = budgeted(tmp_path / "run", clock, budget, 150, act)
    whole = sum(edit.row.seconds for edit in run.edits)
    paid = sum(edit.row.canary_seconds for edit in run.edits)
    assert paid <= budget * whole
    assert paid <= part * budget * whole + 0.25
    assert paid >= part * budget * whole - 0.5
    assert paid == pytest.approx(0.25 * len(forwarded(run.path)))


def test_it_is_denser_from_when_values_begin_to_move(tmp_path: Path, clock: Clock) -> None:
    def act(model: nn.Module, edit: int) -> None:
        push(model, 0.01 * 1.2 ** max(edit - 100, 0))

    at = np.array(forwarded(budgeted(tmp_path / "run", clock, 0.05, 160, act).path))
    before, gaps = np.diff(at[at <= 100]), np.diff(at[at > 100])
    assert gaps.min() < before[1:].min()
    assert gaps.mean() < before[1:].mean()


def test_a_leap_is_looked_at_at_once_and_paid_back(tmp_path: Path, clock: Clock) -> None:
    def act(model: nn.Module, edit: int) -> None:
        push(model, 5.0 if edit in (41, 43) else 0.01)

    plain = forwarded(budgeted(tmp_path / "plain", clock, 0.05, 150, still).path)
    run = budgeted(tmp_path / "leaps", clock, 0.05, 150, act)
    assert {41, 43} <= set(forwarded(run.path))
    assert {41, 43}.isdisjoint(plain)
    assert len(forwarded(run.path)) <= len(plain) + 1
    whole = sum(edit.row.seconds for edit in run.edits)
    assert sum(edit.row.canary_seconds for edit in run.edits) <= 0.05 * whole


def test_a_weight_that_stays_lost_does_not_break_the_budget(tmp_path: Path, clock: Clock) -> None:
    run = budgeted(
        tmp_path / "run", clock, 0.05, 120, lambda model, edit: push(model, math.nan if edit == 33 else 0.01)
    )
    assert 33 in forwarded(run.path)
    assert sum(edit.row.canary_seconds for edit in run.edits) <= 0.05 * sum(edit.row.seconds for edit in run.edits)


def test_growth_without_end_does_not_break_it_either(tmp_path: Path, clock: Clock) -> None:
    run = budgeted(tmp_path / "run", clock, 0.05, 80, lambda model, edit: push(model, 1e-9 * 3.0**edit))
    assert sum(edit.row.canary_seconds for edit in run.edits) <= 0.05 * sum(edit.row.seconds for edit in run.edits)


def test_edit_0_is_never_left_out() -> None:
    schedule = Schedule(sl.Canary(CANARY, budget=1e-9))
    assert schedule.is_due(0, elapsed=0.0, moving=False, leaping=False)
    schedule.paid(1.0)
    assert not schedule.is_due(1, elapsed=1e3, moving=True, leaping=False)
    assert schedule.is_due(1, elapsed=1e3, moving=False, leaping=True)


# -- what it says -----------------------------------------------------------------------------------------------------


def naive(model: nn.Module) -> tuple[np.ndarray, np.ndarray]:
    """(log p [tokens, vocabulary] after each real token; −log p of each real token after the first)."""
    training = model.training
    with torch.no_grad():
        logits = model.eval()(**TEXT).logits.double().numpy()
    model.train(training)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    tokens, mask = TEXT["input_ids"].numpy(), TEXT["attention_mask"].numpy().astype(bool)
    # Of a model that was never trained no token can be predicted: all of them count alike.
    every = log_p[mask]
    nll = [
        -log_p[row, at - 1, tokens[row, at]] for row in range(2) for at in range(1, tokens.shape[1]) if mask[row, at]
    ]
    return every, np.array(nll)


@pytest.mark.parametrize("every", [1, 3])
def test_it_is_compared_with_what_the_model_said_before_the_first_edit(tmp_path: Path, every: int) -> None:
    model = make_gpt2()
    (first, first_nll), now = naive(model), {}
    with sl.attach(model, "*.mlp.c_proj", tmp_path / "run", canary=sl.Canary(TEXT, every=every)) as monitor:
        for edit in range(1, 7):
            with monitor.edit():
                edit_gpt2(model, rate=0.3)
            now[edit] = naive(model)
    run = sl.load(tmp_path / "run")
    assert forwarded(run.path) == list(range(0, 7, every))
    assert run.series("canary.kl")[0] == 0
    assert run.series("canary.agreement")[0] == run.series("canary.perplexity_ratio")[0] == 1
    for edit in forwarded(run.path)[1:]:
        said, nll = now[edit]
        kl = (np.exp(first) * (first - said)).sum(-1).mean()
        assert run.series("canary.kl")[edit] == pytest.approx(kl, rel=1e-4)
        agreement = (first.argmax(-1) == said.argmax(-1)).mean()
        assert run.series("canary.agreement")[edit] == pytest.approx(agreement)
        assert run.series("canary.perplexity")[edit] == pytest.approx(np.exp(nll.mean()), rel=1e-5)
        ratio = np.exp(nll.mean() - first_nll.mean())
        assert run.series("canary.perplexity_ratio")[edit] == pytest.approx(ratio, rel=1e-5)
    assert run.series("canary.kl")[6] > 1e-3


def test_there_is_a_perplexity_only_where_there_is_text(tmp_path: Path) -> None:
    for name, canary, has_text in [
        ("dict", TEXT, True),
        ("ids", TEXT["input_ids"], True),
        ("function", lambda model: model(**TEXT), False),
    ]:
        model = make_gpt2()
        with sl.attach(model, "*.mlp.c_proj", tmp_path / name, canary=canary):
            pass
        assert bool(sl.load(tmp_path / name).sites_of("canary.perplexity")) == has_text, name


# -- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"batch": "reply"}, r"canary='reply' is not usable; .*'replay'; did you mean 'replay'"),
        ({"batch": 3}, r"canary=3 is not usable; expected a dict"),
        ({"batch": None}, r"canary=None is not usable; expected a dict"),
        ({"batch": [torch.zeros(2, 3)]}, r"^canary=<list of 1 Tensor> is not usable; expected a dict"),
        ({"every": 0}, r"every=0\): expected a whole number of edits, 1 or more"),
        ({"every": -2}, r"every=-2\): expected a whole number"),
        ({"every": 2.5}, r"every=2\.5\): expected a whole number"),
        ({"every": "2"}, r"every='2'\): expected a whole number"),
        ({"budget": 0}, r"budget=0\): expected a share of the loop's time above 0 and at most 1, such as 0\.05"),
        ({"budget": 5}, r"budget=5\): expected a share .*; 5 percent are 0\.05"),
        ({"budget": math.nan}, r"budget=nan\): expected a share"),
        ({"budget": math.inf}, r"budget=inf\): expected a share"),
        ({"budget": "0.05"}, r"budget='0\.05'\): expected a share"),
        ({"every": 2, "budget": 0.05}, r"every=2, budget=0\.05\): expected one of the two"),
    ],
    ids=str,
)
def test_bad_arguments_are_named_with_the_nearest_valid_choice(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        sl.Canary(**({"batch": CANARY} | arguments))


def test_the_manifest_says_what_it_is(tmp_path: Path) -> None:
    batch = "batch {'input_ids': [2, 10], 'attention_mask': [2, 10]}, budget 0.05"
    for at, (model, sites, canary, says) in enumerate(
        [
            (make_model(), "3", CANARY, "input ids [3, 8]"),
            (make_model(), "3", sl.Canary("replay", every=5), "replay, every 5 edits"),
            (make_gpt2(), "*.mlp.c_proj", sl.Canary(TEXT, budget=0.05), batch),
        ]
    ):
        with sl.attach(model, sites, tmp_path / str(at), canary=canary, probes="light"):
            pass
        assert sl.load(tmp_path / str(at)).manifest["canary"] == says


def test_a_cadence_through_easyedit(tmp_path: Path) -> None:
    def apply(model: nn.Module, tokenizer: object, requests: object, hparams: object) -> tuple[nn.Module, dict]:
        push(model, 0.01)
        return model, {}

    editor = SimpleNamespace(model=make_model(), apply_algo=apply)
    with easyedit.watch(editor, tmp_path / "run", sites="3", canary=sl.Canary(CANARY, every=3)):
        for _ in range(7):
            editor.apply_algo(editor.model, None, [{"prompt": "p"}], None)
    assert forwarded(tmp_path / "run") == [0, 3, 6]


class TakesOneDict(nn.Module):
    """As EasyEdit's Blip2OPT: its forward takes ``samples``, a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 5)

    def forward(self, samples: dict[str, Tensor]) -> Tensor:
        out: Tensor = self.layer(samples["image"])
        return out


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_model_that_takes_one_dict_gets_it_whole(tmp_path: Path, wrapped: bool) -> None:
    model, batch = TakesOneDict(), {"image": torch.ones(2, 3), "prompt": ["a", "b"]}
    canary = {"samples": batch} if wrapped else batch
    with sl.attach(model, "layer", tmp_path / "run", canary=canary, announce=False) as monitor, monitor.edit():
        pass
    assert sl.load(tmp_path / "run").series("canary.kl")[1] == pytest.approx(0.0, abs=1e-12)


def test_the_input_of_a_model_that_takes_one_dict_is_replayed(tmp_path: Path) -> None:
    model = TakesOneDict()
    with sl.attach(model, "layer", tmp_path / "run", canary="replay", announce=False) as monitor, monitor.edit():
        model({"image": torch.full((2, 3), 2.0)})
    assert sl.load(tmp_path / "run").series("canary.max")[1] == pytest.approx(
        float(model({"image": torch.full((2, 3), 2.0)}).detach().max())
    )
