"""Low-rank changes of a model's own projections, for what the parameters of a variant alone cannot make up for."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from attn_compiler.errors import ShapeError


class _Changed(nn.Module):
    """A weight plus a product of two narrow matrices, which is zero at the start."""

    def __init__(self, weight: Tensor, rank: int, seed: int) -> None:
        super().__init__()
        rows, columns = weight.shape
        start = torch.randn(rank, columns, generator=torch.Generator().manual_seed(seed)) / math.sqrt(columns)
        self.down = nn.Parameter(start.to(weight.device))
        self.up = nn.Parameter(torch.zeros(rows, rank, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.up @ self.down).to(weight.dtype)


@dataclass(frozen=True)
class LowRank:
    """A copy of a model whose projections can change, and what their changes are made of."""

    model: nn.Module
    learned: Mapping[str, nn.Parameter]
    changed: Collection[nn.Module]

    def merge(self) -> None:
        """Make the changes part of the weights."""
        for module in self.changed:
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)


def with_low_rank(model: nn.Module, rank: int, sites: Collection[str]) -> LowRank:
    """A copy of `model` in which every matrix of the modules that `sites` are named by can change by so many ranks."""
    changing = copy.deepcopy(model)
    around = [f"{name}." if name else "" for name in sites]
    found = {name: module for name, module in changing.named_modules() if _is_matrix(module) and name.startswith(tuple(around))}
    if not found:
        raise ShapeError(f"low_rank={rank} changes the linear maps beside an attention, and {', '.join(sites)} has none")
    learned: dict[str, nn.Parameter] = {}
    for seed, (name, module) in enumerate(found.items()):
        change = _Changed(module.weight, rank, seed)
        parametrize.register_parametrization(module, "weight", change, unsafe=True)
        learned |= {f"{name}.weight.{part}": value for part, value in change.named_parameters()}
    return LowRank(changing, learned, tuple(found.values()))


def _is_matrix(module: nn.Module) -> bool:
    """Whether a module is a linear map: embeddings have a matrix, too, and are none."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.ndim == 2 and not isinstance(module, nn.Embedding)
