"""Dropout in generated kernels: its rate, distribution and seed, and that the backward pass drops the same weights."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

import attn_compiler as attn
from attn_compiler.algebra import expr as e
from attn_compiler.algebra.expr import Sort
from attn_compiler.algebra.integers import IntegerSet
from attn_compiler.algebra.variant import SOFTMAX, EmptyRows, Normalizer, Variant
from attn_compiler.testing import assert_all_within_budget

RATE, BATCH, HEADS, LENGTH = 0.3, 2, 4, 61
CAUSAL = e.k <= e.q
SINK = e.acc / (e.mass + e.exp(e.table("sinks", e.h, sort=Sort.REAL) - e.peak))
VARIANTS = {
    "dense": Variant(dropout=RATE),
    "causal": Variant(mask=CAUSAL, dropout=RATE),
    "dilated": Variant(mask=CAUSAL & e.same((e.q - e.k) % 4, 0), dropout=RATE),
    "sinks": Variant(mask=CAUSAL, normalizer=Normalizer("sink", SOFTMAX.weight, SINK), dropout=RATE),
    "sigmoid": Variant(mask=CAUSAL, normalizer=Normalizer("sigmoid", e.sigmoid(e.score - 1.0), e.acc), dropout=RATE),
    "bias": Variant(score=e.score + e.table("bias", e.h, e.i, e.k, sort=Sort.REAL), dropout=RATE),
    "per head": Variant(dropout=RATE, groups=((IntegerSet.parse("0::2"), Variant(mask=CAUSAL, dropout=0.6)),)),
}
TARGETS = ("cpp", "triton") if find_spec("triton") else ("cpp",)
TABLES = {"sinks": (HEADS,), "bias": (HEADS, LENGTH, LENGTH)}


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    variant: Variant,
    tables: dict[str, Tensor] | None = None,
    *,
    seed: int = 0,
    target: str = "cpp",
) -> Tensor:
    torch.manual_seed(seed)
    out = attn.attend(q, k, v, variant, tables=tables, target=target, training=target != "torch")  # type: ignore[arg-type]
    assert isinstance(out, Tensor)
    return out


def identity(k_len: int, kv_heads: int = 2) -> Tensor:
    """Values under which the output of a query is its weights."""
    return torch.eye(k_len, dtype=torch.float64).expand(BATCH, kv_heads, -1, -1)


def kept(variant: Variant, seed: int = 0, dtype: torch.dtype = torch.float32, dim: int = 8, target: str = "cpp") -> Tensor:
    """Which weights are kept where all are equal."""
    q, k = torch.zeros(BATCH, HEADS, LENGTH, dim), torch.zeros(BATCH, 2, LENGTH, dim)
    return attend(q.to(dtype), k.to(dtype), identity(LENGTH).to(dtype), variant, seed=seed, target=target) != 0


def correlation(a: Tensor, b: Tensor) -> float:
    """Between two sets of independent choices, in standard deviations."""
    x, y = ((t.double() - (1 - RATE)) / (RATE * (1 - RATE)) ** 0.5 for t in (a, b))
    return (x * y).sum().item() / x.numel() ** 0.5


def test_weights_are_dropped_at_the_rate_and_independently() -> None:
    """Six standard deviations are met once in 5e8; the seed is fixed besides."""
    chosen = torch.stack([kept(VARIANTS["dense"], seed) for seed in range(8)])
    count = chosen.numel()
    assert abs(chosen.double().mean().item() - (1 - RATE)) < 6 * (RATE * (1 - RATE) / count) ** 0.5
    for axis in range(chosen.ndim):
        first, second = chosen.narrow(axis, 0, chosen.shape[axis] - 1), chosen.narrow(axis, 1, chosen.shape[axis] - 1)
        assert abs(correlation(first, second)) < 6


@pytest.mark.parametrize("axis", [-1, -2])
def test_no_row_and_no_column_is_favored(axis: int) -> None:
    chosen = torch.stack([kept(VARIANTS["dense"], seed) for seed in range(8)]).double()
    sums, count = chosen.sum(dim=axis), chosen.shape[axis]
    spread = ((sums - count * (1 - RATE)) ** 2 / (count * RATE * (1 - RATE))).sum().item()  # chi squared
    assert abs(spread - sums.numel()) < 6 * (2 * sums.numel()) ** 0.5


def test_what_is_kept_is_scaled_up() -> None:
    q, k = torch.zeros(BATCH, HEADS, LENGTH, 8), torch.zeros(BATCH, 2, LENGTH, 8)
    weights = attend(q, k, identity(LENGTH).float(), VARIANTS["dense"]) * LENGTH * (1 - RATE)
    assert set(weights.round(decimals=5).unique().tolist()) == {0.0, 1.0}


def test_the_seed_of_torch_decides() -> None:
    assert torch.equal(kept(VARIANTS["dense"], 1), kept(VARIANTS["dense"], 1))
    assert not torch.equal(kept(VARIANTS["dense"], 1), kept(VARIANTS["dense"], 2))


@pytest.mark.parametrize("name", ["causal", "dilated"])
def test_the_choice_depends_on_nothing_but_the_pair(name: str) -> None:
    """Not on dtypes, sizes, or the order in which tokens are visited."""
    seen = kept(VARIANTS[name]) | ~kept(VARIANTS["dense"])
    i, k = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
    visible = (k <= i) & ((i - k) % 4 == 0 if name == "dilated" else True)
    assert seen[..., visible].all()
    assert torch.equal(kept(VARIANTS[name]), kept(VARIANTS[name], dtype=torch.bfloat16, dim=24))


def test_a_kernel_with_dropout_can_be_read() -> None:
    source = attn.kernel_source(VARIANTS["causal"], q_len=64, k_len=64, heads=4, head_dim=8)
    assert "constexpr uint32_t DROPPED = 1288490189u;  // 0.3 of 2^32" in source
    assert source.count("dropped(work.queries.first[n], work.queries.second[n], keys.word[j])") == 2
    source = attn.kernel_source(VARIANTS["causal"], q_len=64, k_len=64, heads=4, head_dim=8, target="triton")
    assert "DROPPED = tl.constexpr(1288490189)  # 0.3 of 2^32" in source
    assert "gone = dropped(words, key_word(drawn, j), DROPPED)" in source


@pytest.mark.parametrize("name", ["causal", "dilated", "per head"])
def test_every_target_with_kernels_drops_the_same(name: str) -> None:
    pytest.importorskip("triton")
    assert torch.equal(kept(VARIANTS[name], target="cpp"), kept(VARIANTS[name], target="triton"))


@pytest.mark.parametrize("target", TARGETS)
def test_all_may_be_dropped(target: str) -> None:
    assert not kept(Variant(dropout=1.0), target=target).any()


@pytest.mark.parametrize("target", TARGETS)
def test_what_a_query_gets_that_sees_no_key_is_not_dropped(target: str) -> None:
    unseeing = Variant(mask=e.false, empty_rows=EmptyRows.MEAN, dropout=RATE)
    q, k = torch.zeros(BATCH, HEADS, LENGTH, 8), torch.zeros(BATCH, 2, LENGTH, 8)
    found = attend(q, k, identity(LENGTH).float(), unseeing, target=target)
    assert torch.allclose(found, torch.full_like(found, 1 / LENGTH))


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_is_dropped_outside_of_training(target: Any) -> None:
    q, k, v = (randn(1, 2, 40, 8).float() for _ in range(3))
    with_rate, without = (attn.attend(q, k, v, Variant(dropout=rate), target=target) for rate in (0.5, 0.0))
    assert torch.equal(with_rate, without)  # type: ignore[arg-type]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.float32) for name in sorted(VARIANTS)), ("dense", torch.bfloat16)], ids=str
)
def test_the_backward_pass_drops_what_the_forward_pass_dropped(name: str, dtype: torch.dtype, target: str) -> None:
    variant = VARIANTS[name]
    tables = {table: randn(*TABLES[table]).to(dtype) for table in sorted(variant.tables())}
    given = [randn(BATCH, heads, LENGTH, dim).to(dtype) for heads, dim in ((HEADS, 24), (2, 24), (2, LENGTH))]
    q, k, _ = given
    chosen = attend(q, k, identity(LENGTH).to(dtype), variant, tables, target=target) != 0
    rates = torch.full((HEADS, 1, 1), RATE)
    if variant.groups:
        rates[::2] = 0.6

    def run(by: str, real: torch.dtype) -> list[Tensor]:
        leaves = [x.to(real).requires_grad_() for x in (*given, *tables.values())]
        own, read = leaves[:3], dict(zip(tables, leaves[3:], strict=True))
        if by == target:
            out = attend(*own, variant, read, target=target)
        else:
            weights = attend(*own[:2], identity(LENGTH).to(real), variant, read, target="torch")
            out = (weights * chosen / (1 - rates.to(real))) @ own[2].repeat_interleave(2, dim=1)
        above = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).reshape(out.shape).to(real)
        return [out.detach(), *torch.autograd.grad(out, leaves, above)]

    assert_all_within_budget(run(target, dtype), run("torch", torch.float64), lambda: run("torch", dtype))
