"""The torch target against the float64 reference: every form, every edge."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

from attn_compiler.algebra import expr as e
from attn_compiler.algebra.variant import SOFTMAX, EmptyRows, Normalizer, Variant
from attn_compiler.runtime.attend import attend, reference
from attn_compiler.targets.operands import Operands
from attn_compiler.targets.torch_target import attend_torch
from attn_compiler.testing import Case, assert_case, assert_within_budget, check_variant, on, plain, random_case

CAUSAL = Variant(mask=e.k <= e.q)
WINDOW = Variant(mask=(e.k <= e.q) & (e.q - e.k < 5))
STREAMING = Variant(mask=(e.k <= e.q) & ((e.q - e.k < 5) | (e.k < 3)))


def qkv(
    q_len: int = 23, k_len: int = 23, heads: int = 4, kv_heads: int = 2, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, heads, q_len, 8), (2, kv_heads, k_len, 8), (2, kv_heads, k_len, 8))
    q, k, v = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return q, k, v


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seeds", [range(n, n + 60) for n in range(0, 300, 60)], ids=str)
def test_random_variants_are_within_budget_forward_and_backward(seeds: range, dtype: torch.dtype) -> None:
    for seed in seeds:
        assert_case(random_case(seed), dtype)


@pytest.mark.full
@pytest.mark.parametrize("seeds", [range(n, n + 500) for n in range(300, 5800, 500)], ids=str)
def test_thousands_of_random_variants_are_within_budget(seeds: range) -> None:
    for seed in seeds:
        for dtype in (torch.float32, torch.bfloat16):
            assert_case(random_case(seed), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [True, False])
def test_plain_attention_is_bit_for_bit_that_of_pytorch(dtype: torch.dtype, causal: bool) -> None:
    q, k, v = qkv(dtype=dtype)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=1 / 8**0.5, enable_gqa=True)
    assert torch.equal(on("torch")(Case(CAUSAL if causal else Variant(), q, k, v, {})), expected)


@pytest.mark.parametrize("variant", [Variant(), CAUSAL, WINDOW, STREAMING], ids=["full", "causal", "window", "streaming"])
def test_a_variant_holds_over_lengths_and_precisions(variant: Variant) -> None:
    check_variant(variant, dtypes=(torch.float32, torch.bfloat16, torch.float16))


def test_a_bias_does_not_make_a_causal_mask_disappear() -> None:
    q, k, v = qkv()
    variant = Variant(mask=CAUSAL.mask, score=e.score + e.real(e.q - e.k))
    assert_case(Case(variant, q, k, v, {}), torch.float32)


@pytest.mark.parametrize("rule", [EmptyRows.ZERO, EmptyRows.MEAN, EmptyRows.UNMASKED])
@pytest.mark.parametrize("score", [e.score, e.tanh(e.score), e.score + e.real(e.k) * 0.1], ids=["plain", "capped", "biased"])
def test_rows_that_see_nothing_follow_their_rule_with_finite_gradients(rule: EmptyRows, score: e.Expr) -> None:
    q, k, v = qkv()
    variant = Variant(mask=(e.k < e.q) & (e.q < 20), empty_rows=rule, score=score)
    assert_case(Case(variant, q, k, v, {}), torch.float32)
    empty = on("torch")(Case(variant, q, k, v, {}))[:, :, 0]
    unmasked = on("torch")(Case(Variant(score=score), q, k, v, {}))[:, :, 0]
    mean = v.mean(dim=2).repeat_interleave(2, dim=1)
    expected = {EmptyRows.ZERO: torch.zeros_like(empty), EmptyRows.MEAN: mean, EmptyRows.UNMASKED: unmasked}[rule]
    torch.testing.assert_close(empty, expected)


@pytest.mark.parametrize(("length", "mask"), [(200, WINDOW.mask), (203, STREAMING.mask), (97, (e.q - e.k < 4) & (e.k - e.q < 2))])
def test_blocks_agree_with_the_reference(length: int, mask: e.Expr) -> None:
    for score in (e.score, e.tanh(e.score)):
        assert_case(Case(Variant(mask=mask, score=score), *qkv(length, length), {}), torch.float32)


def test_a_windowed_decode_reads_only_the_window() -> None:
    q, k, v = qkv(1, 200)
    k[:, :, :195], v[:, :, :195] = float("nan"), float("nan")
    assert on("torch")(Case(WINDOW, q, k, v, {})).isfinite().all()


def test_the_log_sum_exp_merges_two_halves_of_the_keys_to_the_whole() -> None:
    q, k, v = qkv()
    parts = [
        attend(q, k[:, :, at], v[:, :, at], CAUSAL, q_positions=0, k_positions=at.start, return_lse=True)
        for at in (slice(0, 11), slice(11, 23))
    ]
    outs, totals = torch.stack([p[0] for p in parts]), torch.stack([p[1] for p in parts])
    merged = (outs * torch.softmax(totals, dim=0)[..., None]).sum(0)
    exact = reference(q.double(), k.double(), v.double(), CAUSAL)
    assert_within_budget(merged, exact, plain(Case(CAUSAL, q, k, v, {})))


def test_dropout_scales_what_it_keeps_and_is_off_outside_of_training() -> None:
    q, k, _ = qkv()
    v, variant = torch.ones(2, 2, 23, 8), Variant(dropout=0.5)
    assert torch.equal(attend(q, k, v, variant), attend(q, k, v, Variant()))
    torch.manual_seed(0)
    dropped = attend(q, k, v, variant, training=True)
    assert isinstance(dropped, torch.Tensor)
    assert not torch.equal(dropped, torch.ones_like(dropped))
    assert 0.8 < dropped.mean() < 1.2


SIGMOID = Normalizer("sigmoid", weight=e.sigmoid(e.score), output=e.acc)


@pytest.mark.parametrize("mask", [e.true, CAUSAL.mask, WINDOW.mask, STREAMING.mask, CAUSAL.mask & (e.k * 2 < e.k_len)])
@pytest.mark.parametrize("normalizer", [SOFTMAX, SIGMOID], ids=lambda n: n.name)
def test_one_trace_serves_every_length(mask: e.Expr, normalizer: Normalizer) -> None:
    variant = Variant(mask=mask, normalizer=normalizer)

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        operands = Operands(q, k, v, {}, None, 0, (0, 1, 2, 3), 4, 2, 0, 1)
        return attend_torch(operands, variant)[0]

    graph = make_fx(run, tracing_mode="symbolic")(*qkv(120, 120))
    for length in (77, 160):
        other = qkv(length, length)
        torch.testing.assert_close(graph(*other), run(*other))


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize(
    "variant", [CAUSAL, STREAMING, Variant(mask=WINDOW.mask, normalizer=SIGMOID)], ids=["causal", "streaming", "sigmoid"]
)
def test_it_compiles_whole_with_gradients(variant: Variant, dynamic: bool) -> None:
    torch._dynamo.reset()
    traced = torch._dynamo.nonstrict_trace(lambda q, k, v: attend(q, k, v, variant))
    compiled = torch.compile(lambda q, k, v: traced(q, k, v).sin(), backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for length in (60, 90):
        leaves = [x.requires_grad_() for x in qkv(length, length)]
        expected = attend(*leaves, variant)
        assert isinstance(expected, torch.Tensor)
        gradients = torch.autograd.grad(expected.sin().sum(), leaves)
        out = compiled(*leaves)
        torch.testing.assert_close(out, expected.sin())
        torch.testing.assert_close(torch.autograd.grad(out.sum(), leaves), gradients)
