"""LLM.int8 written down once more, with numpy's integers: what a layer becomes whose factors are int8 but for outliers."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn


def codes(rows: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Whole numbers up to 127, and what each row of them is worth; both are found in float32."""
    single = rows.astype(np.float32)
    largest = np.maximum(np.abs(single).max(axis=1, keepdims=True), np.float32(2.0**-100))
    return np.rint(single * (np.float32(127) / largest)).astype(np.int64), (largest / np.float32(127)).astype(np.float64)


def product(x: NDArray[np.float64], weight: NDArray[np.float64], threshold: float) -> NDArray[np.float64]:
    """[rows, in] times [out, in]: columns with an outlier as they are, the others by whole numbers."""
    apart = (np.abs(x.astype(np.float32)) >= np.float32(threshold)).any(axis=0)
    (of_x, scale_x), (of_weight, scale_weight) = codes(np.where(apart, 0.0, x)), codes(weight)
    whole = of_x[:, ~apart] @ of_weight[:, ~apart].T
    return whole * scale_x * scale_weight.T + x[:, apart] @ weight[:, apart].T


class Rounded(nn.Module):
    """A linear layer that computes so; `Conv1D` of GPT-2 holds its weights the other way round."""

    def __init__(self, layer: nn.Module, threshold: float) -> None:
        super().__init__()
        weight = layer.get_parameter("weight").detach().double().numpy()
        self.matrix = weight if isinstance(layer, nn.Linear) else weight.T
        self.bias, self.threshold = layer.bias, threshold

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.detach().double().reshape(-1, x.shape[-1]).numpy()
        found = torch.from_numpy(product(flat, self.matrix, self.threshold)).reshape(*x.shape[:-1], -1).to(x.dtype)
        return found if self.bias is None else found + self.bias


def rounded(model: nn.Module, names: tuple[str, ...], threshold: float) -> list[str]:
    """Let the layers of a model whose names end so compute so; their whole names."""
    found = [path for path, _ in model.named_modules() if path.endswith(names)]
    for path in found:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, Rounded(model.get_submodule(path), threshold))
    return found
