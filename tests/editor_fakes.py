"""Small editors of EasyEdit's shape: the attribute names are those of its source, the rest is left out."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn


class GradientTransform(nn.Module):
    """MEND's, with buffers that are NaN until they are loaded."""

    def __init__(self, inputs: int, outputs: int, norm: bool = True) -> None:
        super().__init__()
        self.cfg = SimpleNamespace(norm=norm)
        for name, dim in (("u", inputs), ("v", outputs)):
            for kind in ("mean", "std", "s"):
                self.register_buffer(f"{name}_{kind}", torch.full((dim,), float("nan")))
        self.register_buffer("k", torch.full((1,), float("nan")))


class RunningMeanStd(nn.Module):
    """MALMEN's and UltraEdit's."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("n", torch.zeros(1))
        for name in ("mean", "var", "std"):
            self.register_buffer(name, torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / (self.std + torch.finfo(x.dtype).eps)


class MALMENNet(nn.Module):
    def __init__(self, key_size: int, value_size: int, n_modules: int, lr: float) -> None:
        super().__init__()
        self.key_size, self.value_size = key_size, value_size
        self.normalizer = RunningMeanStd(key_size + value_size)
        self.lr, self.lamda = nn.Embedding(n_modules, 1), nn.Embedding(n_modules, 1)
        self.lr.weight.data.fill_(lr)

    def forward(self, keys: Tensor, values_grad: Tensor) -> tuple[Tensor, ...]:
        return self.normalizer(torch.cat((keys, values_grad), -1)).split([self.key_size, self.value_size], -1)


class Malmen(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.net = nn.ModuleDict({"(4, 8)": MALMENNet(4, 8, 2, 1e-3), "(8, 4)": MALMENNet(8, 4, 1, 1e-4)})


class Executor:
    """EasyEdit's executors are no modules: the algorithm is in an attribute, and appears in the first call."""

    def __init__(self, alg: nn.Module | None) -> None:
        self.is_init = alg is not None
        if alg is not None:
            self.model, self.alg = getattr(alg, "model", None), alg


class GRACEAdapter(nn.Module):
    def __init__(self, layer: nn.Linear, init_epsilon: float = 1.0) -> None:
        super().__init__()
        self.layer, self.weight, self.init_epsilon, self.key_id = layer, layer.weight, init_epsilon, -1
        self.training = False

    def add_key(self, key: Tensor) -> None:
        value = torch.zeros(1, self.layer.out_features)
        if "keys" not in self.__dict__:
            self.keys, self.values = key.detach(), nn.Parameter(value)
            self.epsilons = torch.tensor(self.init_epsilon).view(1)
            return
        self.keys = torch.vstack([self.keys, key.detach()])
        self.values = nn.Parameter(torch.vstack([self.values, value]))
        self.epsilons = torch.vstack([self.epsilons, torch.tensor(self.init_epsilon).view(1)])

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class WISEAdapter(nn.Module):
    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer, self.weight = layer, layer.weight
        self.new_weight = nn.Parameter(layer.weight.detach().clone())
        self.original_layer = nn.Linear(layer.in_features, layer.out_features)
        self.original_layer.load_state_dict(layer.state_dict())
        self.memory_weight: list[Tensor] = []


class Wrapper(nn.Module):
    """EasyEdit's GRACE and WISE: the model inside, and a copy of the layer that the adapter took the place of."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.original_layer = model, nn.Linear(4, 8)


def model() -> nn.Module:
    return nn.ModuleDict({"h": nn.ModuleList([nn.ModuleDict({"fc": nn.Linear(4, 8)}) for _ in range(2)])})
