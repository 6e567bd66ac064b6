"""MEND's pieces against autograd and naive float64."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stabilitylab.editors.base import Editor
from stabilitylab.editors.factors import gradient_factors, used_tokens
from stabilitylab.editors.mend import Mend, default_sites
from stabilitylab.editors.transform import EPSILON, GradientTransform
from stabilitylab.errors import SiteError, UsageError
from stabilitylab.testbed import blip2_digits, digits
from stabilitylab.testbed.mend_data import edit_batch, shipped


@pytest.fixture(scope="module")
def model() -> Any:
    return blip2_digits.build(3)


def state(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


def test_sum_over_tokens_of_the_factors_is_autograds_gradient(model: Any) -> None:
    sites = default_sites(model)
    assert [site.rsplit(".", 2)[1:] for site in sites] == [["1", "fc1"], ["1", "fc2"], ["2", "fc1"], ["2", "fc2"]]
    batch = edit_batch(digits.edit_stream(0, 1)[0])
    factors, loss = gradient_factors(model, sites, batch)
    twin = copy.deepcopy(model)
    expected_loss = twin(**batch).loss
    expected_loss.backward()
    assert float(loss) == pytest.approx(float(expected_loss.detach()))
    for site, (u, delta) in zip(sites, factors, strict=True):
        gradient = twin.get_submodule(site).weight.grad
        naive = sum(torch.outer(d, x) for d, x in zip(delta.double(), u.double(), strict=True))
        torch.testing.assert_close(naive.float(), gradient, atol=1e-7, rtol=1e-4)
        used = used_tokens(u, delta)
        torch.testing.assert_close(delta[used].T @ u[used], gradient, atol=1e-7, rtol=1e-4)


def test_gradient_factors_leave_nothing_behind(model: Any) -> None:
    sites = default_sites(model)
    parameters = list(model.parameters())
    parameters[0].requires_grad_(False)
    model.get_submodule(sites[1]).weight.requires_grad_(False)
    flags = [parameter.requires_grad for parameter in parameters]
    batch = dict(edit_batch(digits.edit_stream(0, 1)[0]))
    gradient_factors(model, sites, batch)
    wrong = {**batch, "labels": batch["labels"][:, :0]}
    for broken in (wrong, {**batch, "nonsense": object(), "labels": None}):
        with pytest.raises(Exception):  # noqa: B017, PT011
            gradient_factors(model, sites, broken)
    assert [parameter.requires_grad for parameter in parameters] == flags
    assert hooks(model) == 0
    assert all(parameter.grad is None for parameter in parameters)
    model.requires_grad_(True)


def test_rows_without_gradient_do_not_reach_the_hypernetwork() -> None:
    u = torch.tensor([[1.0, 0.0], [0.0, 0.0], [2.0, 3.0], [float("nan"), 0.0]])
    delta = torch.tensor([[0.5], [1.0], [0.0], [1.0]])
    assert used_tokens(u, delta).tolist() == [True, False, False, True]
    mend = Mend({"a": (1, 2)}, batch_of=dict)
    entered: list[Tensor] = []
    handle = mend.transforms["1x2"].register_forward_pre_hook(lambda _, args: entered.extend(args[:2]))
    mend.updates([(u[:3].half(), delta[:3].half())])
    handle.remove()
    assert [tensor.tolist() for tensor in entered] == [[[1.0, 0.0]], [[0.5]]]
    assert all(tensor.dtype == torch.float32 for tensor in entered)


def test_an_edit_is_one_forward_and_one_backward_that_strangers_hooks_see(model: Any) -> None:
    sites = default_sites(model)
    seen: list[tuple[str, str]] = []
    handles = [model.register_forward_hook(lambda *_: seen.append(("root", "forward")))]
    for site in sites:
        layer = model.get_submodule(site)
        handles += [
            layer.register_forward_hook(lambda *_, site=site: seen.append((site, "forward"))),
            layer.register_full_backward_hook(lambda *_, site=site: seen.append((site, "backward"))),
        ]
    gradient_factors(model, sites, edit_batch(digits.edit_stream(0, 1)[0]))
    for handle in handles:
        handle.remove()
    expected = [("root", "forward"), *((site, way) for site in sites for way in ("forward", "backward"))]
    assert sorted(seen) == sorted(expected)


def test_the_transform_starts_as_the_identity_on_normalised_factors() -> None:
    torch.manual_seed(0)
    transform = GradientTransform(6, 5, rank=3, layers=2)
    transform.observe(torch.randn(40, 6) * 3 + 1, torch.randn(40, 5) * 1e-3)
    u, v = torch.randn(4, 6), torch.randn(4, 5)
    for layer in (0, 1):
        new_u, new_v = transform(u, v, layer)
        torch.testing.assert_close(new_u, ((u - transform.u_mean) / (transform.u_std + EPSILON)).float())
        torch.testing.assert_close(new_v, ((v - transform.v_mean) / (transform.v_std + EPSILON)).float())
    assert sum(float(p.grad.abs().sum()) for p in gradients(transform, u, v)) > 0


def gradients(transform: GradientTransform, u: Tensor, v: Tensor) -> list[nn.Parameter]:
    """The zero-initialised matrices after a backward: they must not be stuck at zero."""
    new_u, new_v = transform(u, v, 0)
    (new_u.sum() + new_v.square().sum()).backward()  # type: ignore[no-untyped-call]
    return [transform.hidden.u, transform.output.u]


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_statistics_are_those_of_naive_float64(offset: float) -> None:
    generator = torch.Generator().manual_seed(1)
    chunks = [torch.randn(n, 7, generator=generator) * 0.3 + offset for n in (1, 5, 0, 13, 200)]
    deltas = [torch.randn(len(chunk), 3, generator=generator) * 1e-6 for chunk in chunks]
    transform = GradientTransform(7, 3, rank=2, layers=1)
    for u, v in zip(chunks, deltas, strict=True):
        transform.observe(u, v)
    for name, rows in (("u", torch.cat(chunks).double()), ("v", torch.cat(deltas).double())):
        mean = rows.sum(0) / len(rows)
        std = ((rows - mean).square().sum(0) / (len(rows) - 1)).sqrt()
        torch.testing.assert_close(getattr(transform, f"{name}_mean"), mean, atol=1e-18, rtol=1e-10)
        torch.testing.assert_close(getattr(transform, f"{name}_std"), std, atol=0, rtol=1e-6)


def test_statistics_that_were_saved_are_gone_on_with() -> None:
    u, v = torch.randn(30, 4) + 2, torch.randn(30, 3)
    whole, first, second = (GradientTransform(4, 3, rank=2, layers=1) for _ in range(3))
    whole.observe(u, v)
    first.observe(u[:10], v[:10])
    second.load_state_dict(first.state_dict())
    second.observe(u[10:], v[10:])
    for name in ("rows", "u_mean", "u_std", "v_mean", "v_std"):
        torch.testing.assert_close(getattr(second, name), getattr(whole, name))


def test_one_row_leaves_the_deviation_finite() -> None:
    transform = GradientTransform(2, 2, rank=1, layers=1)
    transform.observe(torch.ones(1, 2), torch.ones(1, 2))
    assert transform.u_std.isfinite().all()


def test_a_unit_that_never_fired_divides_by_epsilon_and_statistics_stay_frozen() -> None:
    transform = GradientTransform(2, 2, rank=1, layers=1)
    transform.observe(torch.tensor([[0.0, 1.0], [0.0, 2.0]]), torch.randn(2, 2))
    before = {name: value.clone() for name, value in transform.named_buffers()}
    with torch.no_grad():
        new_u, _ = transform(torch.tensor([[0.03, 1.0]]), torch.zeros(1, 2), 0)
    assert float(new_u[0, 0]) == pytest.approx(0.03 / 1e-7, rel=1e-5)
    assert all(torch.equal(before[name], value) for name, value in transform.named_buffers())


def test_an_untrained_edit_is_minus_the_rate_times_the_normalised_product() -> None:
    model = blip2_digits.build(4)
    mend = Mend.for_model(model, batch_of=edit_batch)
    assert isinstance(mend, Editor)
    assert all(not isinstance(module, type(model)) for module in mend.modules())
    record = digits.edit_stream(0, 1)[0]
    factors, _ = gradient_factors(model, mend.sites, edit_batch(record))
    before = state(model)
    calls: list[int] = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    edited = mend.edit(model, record)
    handle.remove()
    assert edited is model
    assert calls == [1]
    assert hooks(model) == 0
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"{site}.weight" for site in mend.sites}
    for site, (u, delta) in zip(mend.sites, factors, strict=True):
        used = used_tokens(u, delta)
        naive = before[f"{site}.weight"].double() - 1e-3 * (delta[used].double().T @ u[used].double())
        torch.testing.assert_close(model.get_submodule(site).weight.double(), naive, atol=1e-6, rtol=1e-5)


def test_the_update_is_cast_to_the_weights_dtype() -> None:
    model = blip2_digits.set_precision(blip2_digits.build(4), "fp16")
    mend = Mend.for_model(model, batch_of=edit_batch)
    record = digits.edit_stream(0, 1)[0]
    before = state(model)
    factors, _ = gradient_factors(model, mend.sites, edit_batch(record))
    updates = mend.updates(factors)
    mend.edit(model, record)
    for site, update in zip(mend.sites, updates, strict=True):
        weight = model.get_submodule(site).weight
        assert update.dtype == torch.float32
        assert torch.equal(weight, before[f"{site}.weight"] + update.detach().half())


def test_save_and_load_are_a_round_trip(tmp_path: Any) -> None:
    model = blip2_digits.build(4)
    mend = Mend.for_model(model, rank=5, seed=7, batch_of=edit_batch)
    with torch.no_grad():
        mend.edit_lrs.copy_(torch.tensor([1e-3, 2e-3, 3e-3, 4e-3]))
    mend.round_to_stored()
    mend.save(tmp_path)
    again = shipped(Mend, model, tmp_path)
    assert again.sites == mend.sites
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in mend.state_dict().items())


def test_what_can_not_be_loaded_is_said(tmp_path: Any) -> None:
    model = blip2_digits.build(4)
    with pytest.raises(UsageError, match="no checkpoint"):
        shipped(Mend, model, tmp_path)
    (tmp_path / "mend.safetensors").write_bytes(b"no safetensors")
    with pytest.raises(UsageError, match="can't be read as safetensors"):
        shipped(Mend, model, tmp_path)
    blip2_digits.save(model, tmp_path).rename(tmp_path / "mend.safetensors")
    with pytest.raises(UsageError, match="no MEND checkpoint"):
        shipped(Mend, model, tmp_path)
    with pytest.raises(SiteError, match="no decoder layers"):
        Mend.for_model(nn.Linear(2, 2), batch_of=edit_batch)
    with pytest.raises(SiteError, match=r"did you mean 'language_model\.model\.decoder\.layers\.2\.fc1'"):
        Mend.for_model(model, ["language_model.model.decoder.layer.2.fc1"], batch_of=edit_batch)
    with pytest.raises(SiteError, match="expected Linear"):
        Mend.for_model(model, ["language_model.model.decoder.layers.2"], batch_of=edit_batch)


def test_a_layer_without_a_gradient_is_named() -> None:
    layers = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = layers

        def forward(self, x: Tensor) -> Any:
            return SimpleNamespace(loss=self.layers["a"](x).sum())

    with pytest.raises(SiteError, match=r"layers\.b"):
        gradient_factors(Half(), ["layers.a", "layers.b"], {"x": torch.ones(1, 2)})
