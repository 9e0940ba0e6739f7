"""Gradients through the generated C++ kernels against the float64 reference."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import attn_compiler as attn
from attn_compiler.algebra import expr as e
from attn_compiler.algebra.expr import Expr, Sort
from attn_compiler.algebra.integers import IntegerSet
from attn_compiler.algebra.variant import SOFTMAX, EmptyRows, Normalizer, Variant
from attn_compiler.errors import DerivativeError, ShapeError
from attn_compiler.runtime import gradients, kernels
from attn_compiler.targets.cpp.spec import Unit
from attn_compiler.testing import Case, assert_all_within_budget, assert_case, check_variant, random_case

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CAUSAL = e.k <= e.q
SINK = e.acc / (e.mass + e.exp(e.table("sinks", e.h, sort=Sort.REAL) - e.peak))
ROW, COLUMN = (lambda x: x // 8), (lambda x: x % 8)


def near(a: Expr, b: Expr, distance: int) -> Expr:
    return abs(a - b) <= distance


VARIANTS = {
    "causal": Variant(mask=CAUSAL),
    "window": Variant(mask=CAUSAL & (e.q - e.k < 7)),
    "dilated": Variant(mask=CAUSAL & e.same((e.q - e.k) % 4, 0) & (e.q - e.k < 16)),
    "neighborhood": Variant(mask=near(ROW(e.q), ROW(e.k), 1) & near(COLUMN(e.q), COLUMN(e.k), 1)),
    "softcap": Variant(mask=CAUSAL, score=e.tanh(e.score / 5.0) * 5.0),
    "sinks": Variant(mask=CAUSAL, normalizer=Normalizer("sink", SOFTMAX.weight, SINK)),
    "sigmoid": Variant(mask=CAUSAL, normalizer=Normalizer("sigmoid", e.sigmoid(e.score - 1.0), e.acc)),
    "alibi": Variant(score=e.score - e.table("slopes", e.h, sort=Sort.REAL) * abs(e.real(e.q - e.k))),
    "bias": Variant(score=e.score + e.table("bias", e.b, e.h, e.i, e.k, sort=Sort.REAL)),
    "cosine": Variant(score=e.dot / (e.q_norm * e.k_norm + 0.1) * 3.0),
    "per head": Variant(mask=CAUSAL, groups=((IntegerSet.parse("0::2"), Variant(mask=e.q - e.k < 5)),)),
}


def tables_of(variant: Variant) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"sinks": (4,), "slopes": (4,), "bias": (1, 4, 67, 67)}
    return {name: torch.rand(shapes[name], generator=generator, dtype=torch.float64) for name in sorted(variant.tables())}


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_gradients_of_a_variant_are_within_budget(name: str) -> None:
    check_variant(VARIANTS[name], tables=tables_of(VARIANTS[name]), targets=["cpp"])


def test_gradients_of_random_variants_are_within_budget() -> None:
    for seed in range(9):
        assert_case(random_case(seed), DTYPES[seed % 3], "cpp")


@pytest.mark.full
@pytest.mark.parametrize("seeds", [range(n, n + 30) for n in range(0, 150, 30)], ids=str)
def test_gradients_of_many_random_variants_are_within_budget(seeds: range) -> None:
    for seed in seeds:
        assert_case(random_case(seed), DTYPES[seed % 3], "cpp")


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def operands(q_len: int, k_len: int, dim: int, heads: int = 4, kv_heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (2, heads, q_len, dim), (2, kv_heads, k_len, dim), (2, kv_heads, k_len, dim)
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return q, k, v


@pytest.mark.parametrize("dim", [8, 24, 80, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_over_many_tiles_are_within_budget(dim: int, dtype: torch.dtype) -> None:
    assert_case(Case(VARIANTS["window"], *operands(300, 300, dim), {}), dtype, "cpp")


@pytest.mark.parametrize("pairs", [False, True])
def test_both_ways_of_multiplying_bfloat16_give_gradients_within_budget(pairs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if pairs and "avx512_bf16" not in Path("/proc/cpuinfo").read_text(encoding="utf-8"):
        pytest.skip("this machine does not multiply pairs")
    monkeypatch.setattr(kernels, "fastest", lambda _: Unit.PAIRS if pairs else Unit.FLOATS)
    monkeypatch.setattr(kernels, "launches", kernels.launches.__wrapped__)  # which knows no choice made before
    monkeypatch.setattr(gradients, "launches", gradients.launches.__wrapped__)
    for name in ("window", "sinks", "cosine"):
        q, k, v = operands(67, 67, 24)
        assert_case(Case(VARIANTS[name], q, k, v[..., :22], tables_of(VARIANTS[name])), torch.bfloat16, "cpp")


@pytest.mark.parametrize("rule", [EmptyRows.ZERO, EmptyRows.MEAN, EmptyRows.UNMASKED])
def test_queries_that_see_nothing_hand_on_what_their_rule_says(rule: EmptyRows) -> None:
    variant = Variant(mask=(e.q % 3 > 0) & CAUSAL, empty_rows=rule)
    assert_case(Case(variant, *operands(50, 70, 8), {}), torch.float32, "cpp")


def test_what_nobody_sees_may_be_anything() -> None:
    q, k, v = (x.float().requires_grad_() for x in operands(40, 40, 8))
    with torch.no_grad():
        k[:, :, 20:] = v[:, :, 20:] = torch.nan
    out = attn.attend(q, k, v, Variant(mask=e.k < 20), target="cpp")
    assert isinstance(out, Tensor)
    gradients = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(x.isfinite().all() for x in (out, *gradients))
    assert not any(x[:, :, 20:].any() for x in gradients[1:])


def test_only_what_wants_a_gradient_gets_one() -> None:
    variant = VARIANTS["bias"]
    q, k, v = (x.float() for x in operands(40, 40, 8))
    bias = torch.zeros(1, 4, 40, 40, requires_grad=True)
    out = attn.attend(q, k.requires_grad_(), v, variant, tables={"bias": bias}, target="cpp")
    assert isinstance(out, Tensor)
    out.sum().backward()
    assert bias.grad is not None
    assert k.grad is not None
    assert q.grad is None


def test_threads_add_to_one_table() -> None:
    variant, threads = VARIANTS["alibi"], torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert_case(Case(variant, *operands(200, 200, 32), tables_of(variant)), torch.float32, "cpp")
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", sorted(VARIANTS.keys() - {"sigmoid"}))  # whose rows are not normalized
def test_gradients_of_the_log_sum_exp_are_within_budget(name: str) -> None:
    variant = VARIANTS[name]
    case = Case(variant, *operands(67, 67, 8), tables_of(variant), with_total=True)
    assert_case(case, torch.float32, "cpp")
    assert_case(case, torch.float32, "torch")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_the_log_sum_exp_are_within_budget_in_half_precision(dtype: torch.dtype) -> None:
    assert_case(Case(VARIANTS["window"], *operands(67, 67, 24), {}, with_total=True), dtype, "cpp")


@pytest.mark.parametrize("rule", [EmptyRows.ZERO, EmptyRows.MEAN, EmptyRows.UNMASKED])
def test_rows_that_see_nothing_have_a_log_sum_exp_whose_gradient_their_rule_says(rule: EmptyRows) -> None:
    variant = Variant(mask=(e.q % 3 > 0) & CAUSAL, empty_rows=rule)
    assert_case(Case(variant, *operands(50, 70, 8), {}, with_total=True), torch.float32, "cpp")


def test_gradients_come_through_the_log_sum_exp_alone_however_few_queries_there_are() -> None:
    q, k, v = operands(2, 40, 8)
    found = []
    for target, dtype in (("cpp", torch.float32), ("reference", torch.float64)):
        leaves = [x.to(dtype).requires_grad_() for x in (q, k)]
        _, total = attn.attend(*leaves, v.to(dtype), "causal", return_lse=True, target=target)  # type: ignore[arg-type]
        found.append([x.double() for x in torch.autograd.grad(total.sum(), leaves)])
    assert_all_within_budget(*found, lambda: [x.float() for x in found[1]], ["q", "k"])


def test_compiled_models_hand_gradients_through_the_log_sum_exp() -> None:
    def merged(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = [
            attn.attend(q, k[:, :, at], v[:, :, at], "all", return_lse=True, target="cpp") for at in (slice(20), slice(20, 40))
        ]
        weights = torch.stack([total for _, total in parts]).softmax(dim=0)
        return sum(w[..., None] * out for w, (out, _) in zip(weights, parts, strict=True))  # type: ignore[return-value]

    leaves = [x.float().requires_grad_() for x in operands(40, 40, 8)]
    exact = [x.double().detach().requires_grad_() for x in leaves]
    whole = attn.attend(*exact, "all", target="reference")  # type: ignore[arg-type]
    plain = attn.attend(*leaves, "all", target="torch")  # type: ignore[arg-type]
    by = [
        torch.autograd.grad(x.sin().sum(), of)
        for x, of in ((torch.compile(merged)(*leaves), leaves), (whole, exact), (plain, leaves))
    ]
    assert_all_within_budget(by[0], by[1], lambda: by[2], ["q", "k", "v"])


@pytest.mark.parametrize("fill", [-1e4, -1e9, -1e30, torch.finfo(torch.float32).min])
def test_a_fill_that_swallows_all_scores_of_a_row_leaves_its_gradients_right(fill: float) -> None:
    """The log of a mass vanishes beside such a peak."""
    bias = torch.zeros(67, 67, dtype=torch.float64)
    bias[5] = bias[7, 3:] = fill
    assert_case(Case(VARIANTS["bias"], *operands(67, 67, 8), {"bias": bias}), torch.float32, "cpp")


@pytest.mark.parametrize(("q_len", "k_len"), [(0, 0), (0, 7), (5, 0), (1, 1), (2, 3), (31, 33), (97, 127)])
def test_gradients_at_any_length_are_within_budget(q_len: int, k_len: int) -> None:
    assert_case(Case(VARIANTS["causal"], *operands(q_len, k_len, 8), {}), torch.float32, "cpp")


def test_heads_of_values_may_have_another_size() -> None:
    q, k, v = operands(50, 70, 24)
    assert_case(Case(VARIANTS["window"], q, k, torch.cat([v, v], dim=-1)[..., :40], {}), torch.float32, "cpp")


def test_positions_given_at_run_time_hold_in_the_backward_pass_too() -> None:
    positions = torch.randint(0, 70, (2, 50), generator=torch.Generator().manual_seed(1))
    assert_case(Case(VARIANTS["window"], *operands(50, 70, 8), {}, q_positions=positions), torch.float32, "cpp")


ABOVE = {"one number for all": torch.ones(()).expand(2, 4, 40, 8), "turned around": randn(8, 40, 4, 2).permute(3, 2, 1, 0)}


@pytest.mark.parametrize("above", ABOVE.values(), ids=ABOVE)
def test_operands_and_gradients_may_lie_in_memory_as_they_like(above: Tensor) -> None:
    q, k, v = (x.float() for x in operands(40, 40, 16))
    laid = q[..., ::2], k.mT.contiguous().mT[..., :8], v[..., :8].flip(-1)

    def gradients(target: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in laid]
        out = attn.attend(*leaves, VARIANTS["causal"], target=target)  # type: ignore[arg-type, misc]
        return torch.autograd.grad(out, leaves, above.to(dtype))

    exact = gradients("reference", torch.float64)
    assert_all_within_budget(gradients("cpp", torch.float32), exact, lambda: gradients("torch", torch.float32))


def test_gradients_of_gradients_are_refused_aloud() -> None:
    q, k, v = (x.float().requires_grad_() for x in operands(40, 40, 8))
    out = attn.attend(q, k, v, Variant(), target="cpp")
    assert isinstance(out, Tensor)
    (gradient,) = torch.autograd.grad(out.sum(), (q,), create_graph=True)
    with pytest.raises(DerivativeError, match="gradients of gradients were asked for"):
        gradient.sum().backward()


def test_what_has_no_derivative_is_refused() -> None:
    score = e.score + e.table("phase", e.h, sort=Sort.REAL) % 2.0
    q, k, v = (x.float().requires_grad_() for x in operands(40, 40, 8))
    with pytest.raises(ShapeError, match="its gradients are unknown: `mod` has no derivative"):
        attn.attend(q, k, v, Variant(score=score), tables={"phase": torch.rand(4)}, target="cpp")
