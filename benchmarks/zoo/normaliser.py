"""What a hypernetwork's inputs are normalised with: never loaded, forgotten, or of too few rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo import foreign
from benchmarks.zoo.scenario import Loop, Scenario, Step, Witness
from stabilitylab.editors.base import Batch
from stabilitylab.editors.factors import joined
from stabilitylab.editors.mend import Mend
from stabilitylab.editors.transform import EPSILON
from stabilitylab.testbed import digits
from stabilitylab.testbed.mend_data import edit_batch, examples, shipped
from stabilitylab.testbed.records import EditRecord

_BATCH = 3
"""Edits that are carried out together by `RunningEditor`."""
_FAR = 1e3
"""Standard deviations: statistics of fewer than a million rows hold nothing beyond (Samuelson)."""


def _zero_std(seed: int, *, rows: int | None = None, precision: str | None = None, **variant: Any) -> Loop:
    model = foreign.digit_model(precision or ("fp16", "fp32")[seed % 2])
    mend = shipped(Mend, model)
    with torch.no_grad():
        mend.edit_lrs.mul_(0.3)
    looked_at = int(foreign.draw(seed, "zero-std").integers(2, 4)) if rows is None else rows
    for transform in foreign.transforms_of(mend):
        transform.rows.zero_()
        for mean, std in ((transform.u_mean, transform.u_std), (transform.v_mean, transform.v_std)):
            mean.zero_()
            std.fill_(1.0)
    collected_on = foreign.digit_model("fp32")
    for example in islice(examples(seed), looked_at):
        mend.observe(mend.factors(collected_on, example.edit))
    witness = Witness()

    def edit(model: nn.Module, record: EditRecord) -> nn.Module:
        factors = mend.factors(model, edit_batch(record))
        for site, (transform, _, u, v) in zip(mend.sites, mend.placed(factors), strict=True):
            for x, mean, std in ((u, transform.u_mean, transform.u_std), (v, transform.v_mean, transform.v_std)):
                away = (x - mean.float()).abs() / (std.float() + EPSILON)
                if bool((away[:, std == 0] > _FAR).any()):
                    witness.saw(site, also=[foreign.part_of(mend, site)])
        with torch.no_grad():
            foreign.add(model, mend.sites, mend.updates(factors))
        return model

    return Loop(model, mend.sites, foreign.digit_canary(), foreign.digit_steps(edit, seed), witness, editor=mend)


def _never_loaded(seed: int, *, precision: str | None = None, **variant: Any) -> Loop:
    model = foreign.digit_model(precision or ("fp16", "fp32")[seed % 2])
    mend = shipped(Mend, model)
    # The published code begins with NaN, and a checkpoint that is loaded with `strict=False` may lack the buffers.
    hit = foreign.transforms_of(mend)[seed // 2 % 2]
    for buffer in (hit.u_mean, hit.u_std, hit.v_mean, hit.v_std):
        buffer.fill_(float("nan"))
    witness = Witness()
    site = next(site for site, place in mend._place.items() if mend.transforms[place[0]] is hit)
    witness.saw(site, at=1, also=[foreign.part_of(mend, site)])
    return Loop(model, mend.sites, foreign.digit_canary(), foreign.digit_steps(mend.edit, seed), witness, editor=mend)


class RunningNormaliser(nn.Module):
    """As published: statistics go on with every edit, and the variance of a batch is that of a sample."""

    n: Tensor
    mean: Tensor
    var: Tensor
    std: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("n", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("var", torch.zeros(size))
        self.register_buffer("std", torch.zeros(size))

    def update(self, x: Tensor) -> None:
        """Merge a batch [rows, units]; of one row, `var` is 0/0."""
        if self.n == 0:
            self.n.fill_(len(x))
            self.mean.copy_(x.mean(0))
            self.var.copy_(torch.zeros_like(self.var) if len(x) == 1 else x.var(0))
        else:
            after = self.n + len(x)
            away = x.mean(0) - self.mean
            variance = x.new_full(self.var.shape, float("nan")) if len(x) == 1 else x.var(0)
            self.var.copy_(
                (self.var * (self.n - 1) + variance * (len(x) - 1)) / (after - 1)
                + away.square() * self.n * len(x) / after / (after - 1)
            )
            self.mean.add_(away * len(x) / after)
            self.n.copy_(after)
        self.std.copy_(self.var.sqrt())

    def forward(self, x: Tensor) -> Tensor:
        """[rows, units], normalised."""
        return (x - self.mean) / (self.std + torch.finfo(x.dtype).eps)


class _Network(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.key_size = inputs
        self.normalizer = RunningNormaliser(inputs + outputs)


class RunningEditor(nn.Module):
    """MEND's rule with a normaliser that goes on learning: the rows of an edit enter it before they are normalised."""

    def __init__(self, mend: Mend, rate: float) -> None:
        super().__init__()
        self.sites = mend.sites
        self.rate = rate
        self._mend = [mend]
        # A plain attribute too, for its type; the module list is what is looked into.
        self.parts = [_Network(transform.u_mean.numel(), transform.v_mean.numel()) for transform in self._transforms()]
        self.networks = nn.ModuleList(self.parts)

    def _transforms(self) -> list[Any]:
        mend = self._mend[0]
        return [mend.transforms[mend._place[site][0]] for site in self.sites]

    def learn(self, model: nn.Module, batches: int, seed: int) -> None:
        """Statistics of some batches of training examples."""
        stream = examples(seed)
        for _ in range(batches):
            for network, x in self._entering(model, [next(stream).edit for _ in range(_BATCH)]):
                network.normalizer.update(x)

    def edit(self, model: nn.Module, records: Sequence[EditRecord]) -> list[int]:
        """Carry out some edits together, in place; returns how many rows entered each site's normaliser."""
        updates, rows = [], []
        for network, x in self._entering(model, [edit_batch(record) for record in records]):
            network.normalizer.update(x)
            z = network.normalizer(x)
            updates.append(-self.rate * (z[:, network.key_size :].T @ z[:, : network.key_size]))
            rows.append(len(x))
        foreign.add(model, self.sites, updates)
        return rows

    def _entering(self, model: nn.Module, batches: Sequence[Batch]) -> list[tuple[_Network, Tensor]]:
        mend = self._mend[0]
        with torch.no_grad():
            factors = joined([mend.factors(model, batch) for batch in batches])
            placed = mend.placed(factors)
            return [
                (network, torch.cat([u, v], dim=-1)) for network, (_, _, u, v) in zip(self.parts, placed, strict=True)
            ]


def _running(seed: int) -> tuple[nn.Module, RunningEditor]:
    model = foreign.digit_model("fp32")
    editor = RunningEditor(shipped(Mend, model), rate=2e-6)
    editor.learn(model, 40, seed)
    return model, editor


def _batches(
    editor: RunningEditor,
    seed: int,
    witness: Witness,
    alone: int | None,
    n: int = 60,
    before: Callable[[], None] | None = None,
) -> Iterator[Step]:
    """Edits of three requests each; at edit `alone` only one is left for the batch."""
    records = digits.edit_stream(seed, n * _BATCH)
    for number in range(n):
        of_edit = records[number * _BATCH : (number + 1) * _BATCH][: 1 if number + 1 == alone else None]

        def apply(model: nn.Module, of_edit: Sequence[EditRecord] = of_edit) -> nn.Module:
            if before is not None:
                before()
            rows = editor.edit(model, of_edit)
            if 1 in rows:
                number = rows.index(1)
                witness.saw(editor.sites[number], also=[f"editor.networks.{number}"])
            return model

        yield Step(f"{len(of_edit)} edits", apply)


def _restart(seed: int, **variant: Any) -> Loop:
    model, editor = _running(seed)
    witness, resumes = Witness(), int(foreign.draw(seed, "restart").integers(5, 40))

    def resume() -> None:
        if witness.edit == resumes:
            for number, (site, network) in enumerate(zip(editor.sites, editor.parts, strict=True)):
                witness.saw(site, also=[f"editor.networks.{number}"])
                network.normalizer.n.zero_()  # not in the checkpoint: the statistics begin anew

    steps = _batches(editor, seed, witness, None, before=resume)
    return Loop(model, editor.sites, foreign.digit_canary(), steps, witness, editor=editor)


def _single_row(seed: int, **variant: Any) -> Loop:
    model, editor = _running(seed)
    witness = Witness()
    steps = _batches(editor, seed, witness, int(foreign.draw(seed, "single-row").integers(5, 40)))
    return Loop(model, editor.sites, foreign.digit_canary(), steps, witness, editor=editor)


SCENARIOS = (
    Scenario(
        "normaliser-zero-std",
        3,
        "normaliser-zero-std",
        "jump",
        "MEND whose statistics saw two or three edits: ReLU units that were dead in them have std 0, and one fires",
        "MEND",
        "digits, fp16 or fp32",
        _zero_std,
    ),
    Scenario(
        "normaliser-never-loaded",
        4,
        "normaliser-nan",
        "jump",
        "the statistics of one shape of layers were not in the checkpoint and are still NaN",
        "MEND",
        "digits, fp16 or fp32",
        _never_loaded,
    ),
    Scenario(
        "statistics-restart",
        5,
        "statistics-restarted",
        "static",
        "the row count was not saved: after a resume the first edits' few rows are all that the normaliser knows",
        "running MEND",
        "digits, fp32",
        _restart,
    ),
    Scenario(
        "single-row-std",
        6,
        "normaliser-nan",
        "jump",
        "the last batch holds one request: its single row makes the running variance NaN for good",
        "running MEND",
        "digits, fp32",
        _single_row,
    ),
)
