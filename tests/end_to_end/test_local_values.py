"""Neighbors' values beside the result of a layer that holds few tokens: greedy tokens are those of the whole prefix."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attn_compiler.planning.parameter_file import write_parameters
from end_to_end.by_hand import ByHand
from end_to_end.test_state_caches import ELU, Elu, generated, llama, recomputed


class Convolved(Elu):
    """Linear attention with the last three values beside it."""

    taps: Tensor

    def formula(self, q: Tensor, k: Tensor, v: Tensor, scores: Tensor, visible: Tensor) -> Tensor:
        return super().formula(q, k, v, scores, visible) + beside(v, visible, self.taps[(self.count - 1) % 2])


class Near(ByHand):
    """The same of a window of two."""

    taps: Tensor

    def formula(self, q: Tensor, k: Tensor, v: Tensor, scores: Tensor, visible: Tensor) -> Tensor:
        window = torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2]) < 2
        out = scores.masked_fill(~(visible & window), -torch.inf).softmax(-1).nan_to_num() @ v
        return out + beside(v, visible & window, self.taps[(self.count - 1) % 2])


def beside(v: Tensor, visible: Tensor, taps: Tensor) -> Tensor:
    total = torch.zeros_like(v)
    for n in range(3):
        back = 2 - n
        earlier = F.pad(v, (0, 0, back, 0))[:, :, : v.shape[2]]
        seen = F.pad(visible.expand(v.shape[0], 1, *visible.shape[-2:]), (back, 0))[..., : v.shape[2]].diagonal(dim1=-2, dim2=-1)
        total = total + taps[:, None, :, n] * torch.where(seen[..., None], earlier, 0.0)
    return total


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("slots", "formula", "held"), [(ELU, Convolved, 2), ({"mask": "causal & window(2)"}, Near, 2)], ids=["states", "a window"]
)
@pytest.mark.parametrize("padding", [0, 3])
def test_generated_tokens_are_those_of_the_whole_text(
    slots: Mapping[str, object], formula: type[ByHand], held: int, padding: int, tmp_path: Path
) -> None:
    taps = torch.randn(2, 4, 8, 3, generator=torch.Generator().manual_seed(11))
    write_parameters(tmp_path / "taps.safetensors", {"local_conv": taps.numpy()}, 1)
    rule = {"match": {"kind": "self"}, "attn": {**slots, "output": "local_conv(3)"}, "fallback": "error"}
    policy = {"version": 1, "parameters": str(tmp_path / "taps.safetensors"), "rules": [rule]}
    model = llama()
    formula.taps = taps  # type: ignore[attr-defined]
    expected = recomputed(model, formula, padding)
    found, cache = generated(model, policy, padding)
    assert torch.equal(found, expected)
    assert {layer.values.shape[2] for layer in cache.layers} == {held}  # type: ignore[attr-defined]
