"""Linear attention step by step: with a state for the past, steps of any lengths give what all tokens at once give."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from attn_compiler import attend, reference, step
from attn_compiler.errors import ShapeError
from attn_compiler.testing import assert_all_within_budget

TOKENS = 90
TABLES = {
    "padding": torch.arange(TOKENS) >= torch.tensor([[0], [37]]),
    "gate": torch.rand(2, 4, TOKENS, generator=torch.Generator().manual_seed(4)).sigmoid().log().cumsum(-1),
    "hedgehog_q": torch.randn(4, 8, 4, generator=torch.Generator().manual_seed(5)),
    "hedgehog_k": torch.randn(4, 8, 4, generator=torch.Generator().manual_seed(6)),
}
VARIANTS: Mapping[str, Mapping[str, object]] = {
    "elu": {"feature": "elu_one", "mask": "causal"},
    "padding and means": {"feature": "elu_one", "mask": "causal & valid(padding)", "normalizer": "linear(mean)"},
    "decay": {"feature": "silu", "mask": "causal", "state": "decay((h + 1) / 8)", "normalizer": "linear(none)", "scale": 0.3},
    "gate": {"feature": "elu_one", "mask": "causal & valid(padding)", "state": "gate(scalar)"},
    "shifted weights": {"feature": "identity", "mask": "causal", "scale": 0.3, "normalizer": "linear(subtract)"},
    "learned features": {"feature": "hedgehog", "mask": "causal"},
}
CUTS = {"one by one after a prompt": [86, 1, 1, 1, 1], "pieces": [1, 5, 70, 14]}


def operands(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 4, TOKENS, 8), (2, 2, TOKENS, 8), (2, 2, TOKENS, 6)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def tables(name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    read = ("hedgehog_q", "hedgehog_k") if name == "learned features" else ("padding", "gate")
    return {table: TABLES[table].to(dtype) if TABLES[table].dtype.is_floating_point else TABLES[table] for table in read}


def by_steps(name: str, cuts: list[int], leaves: list[Tensor]) -> Tensor:
    parts, past, position = [], None, 0
    for cut in cuts:
        new = (x[:, :, position : position + cut] for x in leaves)
        out, past = step(*new, VARIANTS[name], past, position=position, tables=tables(name, torch.float32))
        parts.append(out)
        position += cut
    return torch.cat(parts, dim=2)


def with_gradients(out: object, leaves: list[Tensor]) -> list[Tensor]:
    assert isinstance(out, Tensor)
    return [out.detach(), *torch.autograd.grad((out * out.detach().sin()).sum(), leaves)]


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("cuts", CUTS)
def test_steps_give_what_all_tokens_at_once_give(name: str, cuts: str) -> None:
    leaves, wide = operands(torch.float32), operands(torch.float64)
    exact = with_gradients(reference(*wide, VARIANTS[name], tables=tables(name, torch.float64)), wide)
    found = with_gradients(by_steps(name, CUTS[cuts], leaves), leaves)
    at_once = tables(name, torch.float32)
    assert_all_within_budget(
        found, exact, lambda: with_gradients(attend(*leaves, VARIANTS[name], tables=at_once, target="torch"), leaves)
    )


def test_a_state_does_not_grow() -> None:
    q, k, v = (x.detach() for x in operands(torch.float32))
    _, first = step(q[:, :, :1], k[:, :, :1], v[:, :, :1], VARIANTS["elu"])
    _, last = step(q, k, v, VARIANTS["elu"], first, position=1)
    assert first.shape == last.shape == (2, 2, 9, 7)


@pytest.mark.parametrize(
    ("slots", "said"),
    [
        ({"mask": "causal"}, "it is not linear"),
        ({"feature": "elu_one"}, "keys that come after them"),
        ({"feature": "elu_one", "mask": "causal & ~window(4)"}, "see keys 4 tokens behind them"),
        ({"heads": {"0": {"feature": "elu_one", "mask": "causal"}}}, "several things"),
    ],
)
def test_what_has_no_state_for_its_past_is_refused(slots: Mapping[str, object], said: str) -> None:
    q, k, v = operands(torch.float32)
    with pytest.raises(ShapeError, match=f"the past of this variant is no state: .*{said}"):
        step(q, k, v, slots)


def test_a_step_has_a_query_for_every_new_key() -> None:
    q, k, v = operands(torch.float32)
    with pytest.raises(ShapeError, match="as many queries as new keys; found 1 queries and 90 keys"):
        step(q[:, :, :1], k, v, VARIANTS["elu"])


@pytest.mark.parametrize(("name", "heads"), [("decay", 4), ("elu", 2)])
def test_a_past_of_another_variant_or_of_other_heads_is_refused(name: str, heads: int) -> None:
    q, k, v = operands(torch.float32)
    with pytest.raises(
        ShapeError, match=rf"expected a `past` of \[2, {heads}, 9, 7\], as an earlier step .*; found \[2, 3, 9, 7\]"
    ):
        step(q[:, :, :1], k[:, :, :1], v[:, :, :1], VARIANTS[name], torch.zeros(2, 3, 9, 7))
