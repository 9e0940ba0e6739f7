"""Linear attention as a whole: words swept over lengths, heads and precisions against the float64 reference, with gradients."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from attn_compiler.testing import check_variant, variant_of


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


VARIANTS: Mapping[str, Mapping[str, object]] = {
    "elu, causal": {"feature": "elu_one", "mask": "causal"},
    "elu, in a window": {"feature": "elu_one", "mask": "causal & window(9)"},
    "relu over at least a hundred": {"feature": "relu", "normalizer": "linear(clamp(100))"},
    "silu that decays": {"feature": "silu", "mask": "causal", "state": "decay(slopes)", "normalizer": "linear(none)"},
    "a Taylor series": {"feature": "taylor", "mask": "causal"},
    "learned features": {"feature": "hedgehog", "mask": "causal"},
    "means": {"feature": "elu_one", "mask": "causal", "normalizer": "linear(mean, eps=1e-4)"},
    "shifted weights": {"feature": "identity", "scale": 0.3, "normalizer": "linear(subtract)"},
    "some heads": {"heads": {"0::2": {"feature": "taylor", "mask": "causal"}, "1::2": {"mask": "causal"}}},
    "sums of softmaxes": {"feature": "softmax", "normalizer": "linear(none)"},
}
TABLES = {
    "slopes": torch.tensor([0.1, 0.4, 0.2, 0.9], dtype=torch.float64),
    "hedgehog_q": drawn(4, 8, 3),
    "hedgehog_k": drawn(4, 8, 3, seed=1),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_linear_attention_computes_what_it_means_with_gradients(name: str) -> None:
    variant = variant_of(VARIANTS[name])
    check_variant(variant, tables={table: TABLES[table] for table in variant.tables()})
