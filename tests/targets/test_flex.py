"""Variants handed to flex_attention: what it computes, and what it cannot say."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

import attn_compiler as attn
from attn_compiler.errors import ShapeError
from attn_compiler.targets import flex
from attn_compiler.testing import assert_within_budget


@pytest.fixture(autouse=True)
def _not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it means is tested, not Inductor."""
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(flex, "_compiled", lambda: torch.nn.attention.flex_attention.flex_attention)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


DOCUMENTS = torch.arange(33)[None].expand(2, -1) // 10
VARIANTS: dict[str, tuple[str | Mapping[str, object], dict[str, Tensor]]] = {
    "window and sinks": ("causal & (window(6) | sinks(2))", {}),
    "documents": ("causal & same(document)", {"document": DOCUMENTS}),
    "ALiBi": ({"mask": "causal", "score": "score + alibi()"}, {}),
    "softcap": ({"mask": "causal & window(9)", "score": "softcap(score, 5)"}, {}),
    "a scale for each head": ({"mask": "causal", "scale": "slope[h]"}, {"slope": torch.linspace(0.1, 1, 4)}),
    "groups of heads": ({"heads": {"0:2": {"mask": "causal & window(3)"}, "rest": {"mask": "causal & window(9)"}}}, {}),
    "nothing hidden": ("all", {}),
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("q_len", [33, 5])
def test_flex_computes_what_a_variant_means(name: str, q_len: int) -> None:
    variant, tables = VARIANTS[name]
    q, k, v = randn(2, 4, q_len, 16), randn(2, 2, 33, 16), randn(2, 2, 33, 16)
    with torch.no_grad():
        exact = attn.attend(q.double(), k.double(), v.double(), variant, tables=tables, target="reference")
        found, plain = (attn.attend(q, k, v, variant, tables=tables, target=target) for target in ("flex", "torch"))  # type: ignore[arg-type]
    assert isinstance(found, Tensor)
    assert isinstance(exact, Tensor)
    assert isinstance(plain, Tensor)
    assert_within_budget(found, exact, plain)


def test_tokens_may_stand_anywhere() -> None:
    q, k, v, places = randn(2, 4, 3, 16), randn(2, 2, 33, 16), randn(2, 2, 33, 16), (torch.arange(33) + 7) % 33 + 50
    at = {"q_positions": torch.tensor([60, 70, 80]), "k_positions": places}
    exact = attn.attend(q.double(), k.double(), v.double(), "causal & window(20)", target="reference", **at)  # type: ignore[arg-type]
    found, plain = (attn.attend(q, k, v, "causal & window(20)", target=target, **at) for target in ("flex", "torch"))  # type: ignore[arg-type]
    assert isinstance(found, Tensor)
    assert isinstance(exact, Tensor)
    assert isinstance(plain, Tensor)
    assert_within_budget(found, exact, plain)


@pytest.mark.parametrize(
    ("variant", "reason"),
    [
        ({"normalizer": "sigmoid"}, "knows softmax only, not `sigmoid`"),
        ({"mask": "keys('0:2')", "empty_rows": "mean"}, "gives zero to a query that sees nothing; asked for: mean"),
        ({"score": "cosine(0.1)"}, "not the norms of q and k"),
    ],
    ids=["sigmoid", "mean", "cosine"],
)
def test_what_flex_cannot_say_is_refused_with_the_reason(variant: Mapping[str, object], reason: str) -> None:
    q = randn(1, 2, 8, 16)
    with torch.no_grad(), pytest.raises(ShapeError, match=reason):
        attn.attend(q, q, q, variant, target="flex")


def test_gradients_on_a_cpu_are_refused() -> None:
    q = randn(1, 2, 8, 16).requires_grad_()
    with pytest.raises(ShapeError, match="no gradients on a CPU"):
        attn.attend(q, q, q, "causal", target="flex")
