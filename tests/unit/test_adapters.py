"""PEFT's adapters: a layer is watched as the weight that it computes with, whatever its parts are."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, OFTConfig, PeftConfig, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import stabilitylab as sl
from stabilitylab.errors import SiteError, UsageError
from stabilitylab.probes.weight_pass import reduce_weight, same_bits, scan_weight
from stabilitylab.probes.weight_pieces import reduce_pieces, scan_pieces
from stabilitylab.record.note_kinds import WRITTEN_BESIDES
from stabilitylab.watching.adapted import effective_weight, in_pieces
from stabilitylab.watching.sites import find_sites
from tests.loops import hooks_on

WIDTH, INNER = 8, 16
INSIDE = "base_model.model."
SITE = f"{INSIDE}mlp.down_proj"


class Net(nn.Module):
    """One feed-forward block under the names that Llama's have."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.mlp = nn.ModuleDict({"up_proj": nn.Linear(WIDTH, INNER), "down_proj": nn.Linear(INNER, WIDTH)})
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.mlp["up_proj"](x))
        logits: Tensor = self.head(self.mlp["down_proj"](hidden))
        return logits


TARGET: dict[str, Any] = {"target_modules": ["down_proj"]}
CONFIGS: dict[str, Callable[[], PeftConfig]] = {
    "LoRA": lambda: LoraConfig(r=2, **TARGET),
    "DoRA": lambda: LoraConfig(r=2, use_dora=True, **TARGET),
    "IA3": lambda: IA3Config(feedforward_modules=["down_proj"], **TARGET),
    "LoHa": lambda: LoHaConfig(r=2, **TARGET),
    "OFT": lambda: OFTConfig(r=0, oft_block_size=4, **TARGET),
}


def adapted(kind: str = "LoRA", **options: Any) -> Any:
    config = CONFIGS[kind]()
    for name, value in options.items():
        setattr(config, name, value)
    return get_peft_model(Net(), config)


def steps(model: nn.Module) -> Callable[[], Tensor]:
    """A loop's body: one optimizer step on new random data; gives the loss."""
    optimizer = torch.optim.Adam([weight for weight in model.parameters() if weight.requires_grad], 0.05)

    def step() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = model(torch.randn(2, 5, WIDTH)).square().mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def watched(model: Any, run: Path, sites: Any = "*.down_proj", edits: int = 3, **options: Any) -> sl.Run:
    torch.manual_seed(2)
    step = steps(model)
    with sl.attach(model, sites, run, announce=False, trace=False, **options) as monitor:
        for _ in range(edits):
            with monitor.edit():
                step()
    return sl.load(run)


def merged_weight(model: Any) -> Tensor:
    """What PEFT itself makes of the adapters."""
    weight: Tensor = copy.deepcopy(model).merge_and_unload().mlp["down_proj"].weight.detach()
    return weight


@pytest.mark.parametrize("kind", CONFIGS)
def test_drift_is_that_of_the_weight_which_merging_would_leave(tmp_path: Path, kind: str) -> None:
    model = adapted(kind)
    run = watched(model, tmp_path / "run")
    start = Net().mlp["down_proj"].weight.detach()
    true = float((merged_weight(model) - start).norm())
    assert run.series("drift.norm", SITE)[-1] == pytest.approx(true, rel=1e-5)
    assert run.series("drift.ratio", SITE)[-1] == pytest.approx(true / float(start.norm()), rel=1e-5)
    assert true > 0.01


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_parts_of_a_watched_layer_are_not_called_unwatched(tmp_path: Path, kind: str) -> None:
    run = watched(adapted(kind), tmp_path / "run", edits=6)
    assert WRITTEN_BESIDES not in {note.kind for note in run.notes}


@pytest.mark.parametrize("kind", ["LoRA", "DoRA"])
def test_nothing_is_changed_by_being_watched(tmp_path: Path, kind: str) -> None:
    losses, states, models = [], [], []
    for is_watched in (True, False):
        model = adapted(kind, lora_dropout=0.3)
        layer = model.base_model.model.mlp["down_proj"]
        before = {name: copy.copy(held) for name, held in vars(layer).items() if isinstance(held, dict | list | set)}
        torch.manual_seed(4)
        step = steps(model)
        if is_watched:
            with sl.attach(model, "*.down_proj", tmp_path / kind, canary={"x": torch.ones(1, 3, WIDTH)}) as monitor:
                seen = []
                for _ in range(3):
                    with monitor.edit():
                        seen.append(step())
        else:
            seen = [step() for _ in range(3)]
        losses.append(torch.stack(seen))
        states.append(torch.get_rng_state())
        models.append(model)
        after = {name: held for name, held in vars(layer).items() if isinstance(held, dict | list | set)}
        assert {name: list(held) for name, held in after.items()} == {name: list(held) for name, held in before.items()}
    assert torch.equal(*losses)
    assert torch.equal(*states)
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other)
        assert one.requires_grad == other.requires_grad
    assert hooks_on(models[0]) == hooks_on(models[1]) == 0


def test_the_gradient_is_that_of_the_weight_which_counts_without_the_loss_scale(tmp_path: Path) -> None:
    model, x = adapted(), torch.randn(2, 5, WIDTH)
    with torch.no_grad():
        model.base_model.model.mlp["down_proj"].lora_B["default"].weight.normal_()
    dense = copy.deepcopy(model).merge_and_unload()
    weight = dense.mlp["down_proj"].weight.requires_grad_()
    dense(x).square().mean().backward()
    assert weight.grad is not None
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
    with sl.attach(model, "*.down_proj", tmp_path / "run") as monitor, monitor.edit():
        scaler.scale(model(x).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
    run = sl.load(tmp_path / "run")
    assert run.series("gradient.norm", SITE)[1] == pytest.approx(float(weight.grad.norm()), rel=1e-4)
    assert run.series("gradient.loss_scale", SITE)[1] == 2.0**14


def test_an_optimizer_that_leaps_in_one_direction_repeats_no_update(tmp_path: Path) -> None:
    """The two factors of an adapter grow together, so that each step weighs more than the one before."""
    torch.manual_seed(2)
    model, x = adapted(), torch.randn(2, 5, WIDTH)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], 0.1)
    canary = {"x": torch.randn(3, WIDTH)}
    with sl.attach(model, "*.down_proj", tmp_path / "run", canary=canary, announce=False) as monitor:
        for _ in range(24):
            with monitor.edit():
                optimizer.zero_grad()
                model(x)[..., 0].mean().backward()
                optimizer.step()
        found = monitor.diagnosis()
    run = sl.load(tmp_path / "run")
    assert (run.series("gradient.source", SITE)[1:] == 4).all()
    assert (run.series("gradient.learning_rate", SITE)[1:] == 0.1).all()
    updates = run.series("update.norm", SITE)[1:]
    assert (run.series("drift.norm", SITE)[-1] > 0.8 * updates.sum(), updates[-1] > 2 * updates[0]) == (True, True)
    assert found.verdict in {"diverging", "collapsed"}
    assert found.cause not in {"update-repeated", "gradients-not-cleared"}


@pytest.mark.parametrize("pattern", ["*.down_proj", "mlp.down_proj", "mlp.down_proj.weight", f"{SITE}*"])
def test_names_that_users_give_resolve_inside_the_wrapper(pattern: str) -> None:
    assert [site.name for site in find_sites(adapted(), pattern)] == [SITE]


@pytest.mark.parametrize("around", [lambda model: model, nn.DataParallel])
def test_a_run_is_asked_by_the_name_inside_the_wrappers(tmp_path: Path, around: Callable[[Any], nn.Module]) -> None:
    with sl.attach(around(adapted()), "*.down_proj", tmp_path / "run", announce=False):
        pass
    run = sl.load(tmp_path / "run")
    for asked in ("mlp.down_proj", "model.mlp.down_proj", SITE):
        assert run.present("weight.norm", asked).all()
    for asked in ("down_proj", "p.down_proj", "base.mlp.down_proj", ""):
        with pytest.raises(UsageError, match="has no site"):
            run.present("weight.norm", asked)


def test_the_parts_of_a_layer_are_watched_where_they_are_named() -> None:
    model = adapted()
    names = [site.name for site in find_sites(model, ["mlp.*_proj", "*lora_B*"])]
    assert names == [f"{INSIDE}mlp.up_proj", SITE, f"{SITE}.lora_B.default"]
    assert not [site.name for site in find_sites(model, "mlp.*") if site.name.startswith(f"{SITE}.")]


def test_merging_and_taking_it_off_again_moves_nothing(tmp_path: Path) -> None:
    model = adapted()
    step = steps(model)
    with sl.attach(model, "*.down_proj", tmp_path / "run") as monitor:
        for act in (step, model.merge_adapter, model.unmerge_adapter, step):
            with monitor.edit():
                act()
    update, drift = (sl.load(tmp_path / "run").series(name, SITE) for name in ("update.norm", "drift.norm"))
    assert (update[[1, 4]] > 0.01).all()
    assert (update[[2, 3]] < 1e-6).all()
    np.testing.assert_allclose(drift[[2, 3]], drift[1], rtol=1e-5)


def test_an_adapter_that_is_switched_off_has_no_part_in_it_also_where_it_is_merged(tmp_path: Path) -> None:
    model = adapted()
    step = steps(model)
    with sl.attach(model, "*.down_proj", tmp_path / "run") as monitor:
        for act in (step, model.disable_adapter_layers, model.enable_adapter_layers, model.merge_adapter):
            with monitor.edit():
                act()
        with monitor.edit():
            model.disable_adapter_layers()
    drift = sl.load(tmp_path / "run").series("drift.norm", SITE)
    assert drift[2] == 0
    assert drift[5] < 1e-6
    np.testing.assert_allclose(drift[[3, 4]], drift[1], rtol=1e-5)


def test_an_adapter_that_is_not_active_is_quiet(tmp_path: Path) -> None:
    model = adapted()
    model.add_adapter("other", LoraConfig(r=2, **TARGET))
    with sl.attach(model, "*.down_proj", tmp_path / "run") as monitor, monitor.edit(), torch.no_grad():
        for part in ("lora_A", "lora_B"):
            getattr(model.base_model.model.mlp["down_proj"], part)["other"].weight.normal_()
    assert sl.load(tmp_path / "run").series("update.norm", SITE)[1] == 0


def test_an_adapter_that_is_put_back_between_two_edits_restores_the_layer(tmp_path: Path) -> None:
    model = adapted()
    step, weight = steps(model), model.base_model.model.mlp["down_proj"].lora_B["default"].weight
    with sl.attach(model, "*.down_proj", tmp_path / "run") as monitor:
        for _ in range(3):
            with monitor.edit():
                step()
            if monitor.edits == 1:
                weight.data.zero_()  # as hand-written loops do, without a trace in its version
    outcomes = [edit.outcome for edit in sl.load(tmp_path / "run").edits[1:]]
    assert outcomes == ["restored", "committed", "committed"]


def test_a_delta_that_a_narrow_weight_would_round_away_is_measured(tmp_path: Path) -> None:
    model = adapted().to(torch.bfloat16)
    layer = model.base_model.model.mlp["down_proj"]
    with sl.attach(model, "*.down_proj", tmp_path / "run") as monitor, monitor.edit(), torch.no_grad():
        layer.lora_B["default"].weight.fill_(1e-5)
    delta = layer.lora_B["default"].weight.float() @ layer.lora_A["default"].weight.float() * layer.scaling["default"]
    update = sl.load(tmp_path / "run").series("update.norm", SITE)[1]
    assert update == pytest.approx(float(delta.detach().norm()), rel=1e-2)


FORMS: dict[str, tuple[bool, torch.dtype, dict[str, Any]]] = {
    "Linear": (False, torch.float32, {}),
    "a scale": (False, torch.float32, {"lora_alpha": 5, "use_rslora": True}),
    "Conv1D": (True, torch.float32, {}),
    "bfloat16": (False, torch.bfloat16, {}),
    "float64": (False, torch.float64, {}),
}


def layer_with_adapters(form: str, adapters: int, shape: tuple[int, int] = (700, 900)) -> Any:
    """A PEFT layer on a weight of more than one piece, with adapters that all count."""
    is_conv, dtype, options = FORMS[form]
    torch.manual_seed(3)
    inner = Conv1D(shape[1], shape[0]) if is_conv else nn.Linear(*shape)
    settings = LoraConfig(r=6, target_modules=["fc"], fan_in_fan_out=is_conv, **options)
    model = get_peft_model(nn.ModuleDict({"fc": inner}).to(dtype), settings)  # type: ignore[arg-type]
    names = ["default", *(f"other{number}" for number in range(1, adapters))]
    for name in names[1:]:
        model.add_adapter(name, settings)
    layer = model.base_model.model["fc"]
    layer.set_adapter(names)
    for name in names:
        nn.init.normal_(layer.lora_B[name].weight)
    return layer


@pytest.mark.parametrize("adapters", [1, 2])
@pytest.mark.parametrize("form", FORMS)
def test_plain_lora_is_merged_piece_by_piece_into_what_peft_makes(form: str, adapters: int) -> None:
    layer = layer_with_adapters(form, adapters)
    pieces = in_pieces(layer)
    assert pieces is not None
    sizes = [piece.shape[0] for piece in pieces.make()]
    assert len(sizes) > 1
    assert sum(sizes) == pieces.shape[0]
    twin = copy.deepcopy(layer)
    twin.base_layer.to(torch.promote_types(layer.base_layer.weight.dtype, torch.float32))
    twin.merge()
    wide = twin.base_layer.weight
    assert pieces.dtype == wide.dtype
    torch.testing.assert_close(effective_weight(layer), wide.detach(), rtol=4 * torch.finfo(wide.dtype).eps, atol=1e-7)


def test_only_what_is_plain_lora_and_counts_is_merged_in_pieces() -> None:
    layer = layer_with_adapters("Linear", 1)
    assert in_pieces(layer) is not None
    layer.enable_adapters(False)
    assert in_pieces(layer) is None
    layer.enable_adapters(True)
    layer.merge()
    assert in_pieces(layer) is None
    assert in_pieces(adapted("DoRA").base_model.model.mlp["down_proj"]) is None


def test_a_pass_over_pieces_finds_what_one_over_the_whole_finds() -> None:
    layer = layer_with_adapters("Conv1D", 2)
    pieces = in_pieces(layer)
    assert pieces is not None
    whole = pieces.whole()
    first, before = torch.randn_like(whole), whole + 1e-3 * torch.randn_like(whole)
    for value in (None, torch.inf, torch.nan):
        if value is not None:
            layer.base_layer.weight.data[333, 444] = value
            whole[333, 444] = value
        np.testing.assert_allclose(scan_pieces(pieces), scan_weight(whole), rtol=1e-6)
        last = [before.clone(), before.clone()]
        found = reduce_pieces(pieces, first, last[0], first.double().norm(), True)
        true = reduce_weight(whole, first, last[1], first.double().norm(), True)
        np.testing.assert_allclose(found.packed, true.packed, rtol=1e-6)
        assert same_bits(last[0], whole)
        assert found.change is not None


def test_without_sites_the_layer_is_found_and_not_its_parts(tmp_path: Path) -> None:
    run = watched(adapted(), tmp_path / "run", sites=None)
    assert run.manifest["sites"] == [SITE]
    assert (run.series("update.norm", SITE)[1:] > 0).all()


def test_a_module_that_peft_trains_a_copy_of_is_that_copy(tmp_path: Path) -> None:
    model = adapted(modules_to_save=["head"])
    head = f"{INSIDE}head"
    run = watched(model, tmp_path / "run", sites=["head", "*.down_proj"])
    assert set(run.manifest["sites"]) == {head, SITE}
    moved = model.base_model.model.head
    true = float((moved.modules_to_save["default"].weight - moved.original_module.weight).detach().norm())
    assert run.series("drift.norm", head)[-1] == pytest.approx(true, rel=1e-5)
    assert (run.series("gradient.source", head)[1:] == 1).all()


def test_a_model_that_an_edit_wraps_and_another_unwraps_is_one_model(tmp_path: Path) -> None:
    plain: Any = Net()
    with sl.attach(plain, "mlp.down_proj", tmp_path / "run") as monitor:
        with monitor.edit() as edit:
            model: Any = edit.returns(get_peft_model(plain, LoraConfig(r=2, **TARGET)))
            steps(model)()
        with monitor.edit() as edit:
            edit.returns(model.merge_and_unload())
    update = sl.load(tmp_path / "run").series("update.norm", "mlp.down_proj")
    assert update[1] > 0.01
    assert update[2] < 1e-6


def test_adapters_that_can_t_be_merged_are_named_with_the_reason(tmp_path: Path) -> None:
    model = adapted()

    def merge(*_: object, **__: object) -> None:
        raise NotImplementedError("a router of its own")

    model.base_model.model.mlp["down_proj"].merge = merge
    with pytest.raises(SiteError, match=r"adapters can't be merged \(NotImplementedError: a router of its own\)"):
        sl.attach(model, "*.down_proj", tmp_path / "run")


@pytest.mark.parametrize("kind", ["4 bits", "8 bits"])
def test_the_delta_of_a_packed_weight_is_measured(tmp_path: Path, kind: str) -> None:
    bits = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes (125 MB): pip install bitsandbytes")
    net = Net()
    packed = {
        "4 bits": lambda: bits.nn.Linear4bit(INNER, WIDTH, quant_type="nf4"),
        "8 bits": lambda: bits.nn.Linear8bitLt(INNER, WIDTH, has_fp16_weights=False),
    }
    net.mlp["down_proj"] = packed[kind]().to("cpu")
    model = get_peft_model(net, LoraConfig(r=2, **TARGET))
    run = watched(model, tmp_path / "run")
    delta = model.base_model.model.mlp["down_proj"].get_delta_weight("default")
    assert run.series("drift.norm", SITE)[-1] == pytest.approx(float(delta.detach().norm()), rel=1e-5)
    assert 0.01 < run.series("drift.ratio", SITE)[-1] < 10
