"""The generated kernels at the edges: shapes, layouts, threads, and the state of the caller."""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

import attn_compiler as attn
from attn_compiler.errors import ShapeError
from attn_compiler.runtime import kernels
from attn_compiler.runtime.compiler import load
from attn_compiler.testing import assert_within_budget

WINDOW = "causal & window(5)"


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: str, target: str) -> Tensor:
    with torch.no_grad():
        out = attn.attend(q, k, v, mask, target=target)  # type: ignore[arg-type]
    assert isinstance(out, Tensor)
    return out


def check(q: Tensor, k: Tensor, v: Tensor, mask: str = WINDOW) -> None:
    """What the kernels compute is within budget, for these very tensors."""
    exact = attend(q.double(), k.double(), v.double(), mask, "reference")
    assert_within_budget(attend(q, k, v, mask, "cpp"), exact, attend(q, k, v, mask, "torch"))


@pytest.mark.parametrize(("q_len", "k_len"), [(0, 0), (0, 7), (1, 1), (1, 127), (2, 3), (31, 31), (97, 127), (131, 131)])
@pytest.mark.parametrize("mask", [WINDOW, "all"])
def test_any_length_is_right(q_len: int, k_len: int, mask: str) -> None:
    check(randn(2, 2, q_len, 8), randn(2, 2, k_len, 8), randn(2, 2, k_len, 8), mask)


def test_queries_without_any_key_get_nothing() -> None:
    out = attend(randn(1, 2, 3, 8), randn(1, 2, 0, 8), randn(1, 2, 0, 8), "causal", "cpp")
    assert out.shape == (1, 2, 3, 8)
    assert not out.any()


def test_a_batch_of_none_has_a_result_of_none() -> None:
    assert attend(randn(0, 2, 9, 8), randn(0, 2, 9, 8), randn(0, 2, 9, 8), WINDOW, "cpp").shape == (0, 2, 9, 8)


@pytest.mark.parametrize(("dim", "value_dim"), [(1, 1), (8, 40), (13, 7), (80, 80), (96, 24), (256, 256)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_head_dim_is_right(dim: int, value_dim: int, dtype: torch.dtype) -> None:
    check(randn(1, 2, 37, dim).to(dtype), randn(1, 1, 37, dim).to(dtype), randn(1, 1, 37, value_dim).to(dtype))


def strided(x: Tensor) -> Tensor:
    """The same numbers with gaps between those of a row."""
    return torch.stack((x, x + 100), dim=-1)[..., 0]


def tokens_first(x: Tensor) -> Tensor:
    """The same numbers as models hold them: [batch, tokens, heads, dim]."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def offset(x: Tensor) -> Tensor:
    """The same numbers, at addresses that are no multiples of anything."""
    return torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)


@pytest.mark.parametrize("layout", [strided, tokens_first, offset])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_layout_is_right(layout: object, dtype: torch.dtype) -> None:
    assert callable(layout)
    q, k, v = (layout(randn(2, 2, 21, 8).to(dtype) * scale) for scale in (1, 2, 3))
    check(q, k, v)


def test_heads_and_rows_may_be_the_same_memory() -> None:
    k, v = randn(1, 1, 21, 8).expand(3, 4, 21, 8), randn(1, 1, 21, 8).expand(3, 4, 21, 8)
    check(randn(3, 4, 21, 8), k, v)


def test_tokens_may_be_the_same_memory() -> None:
    check(randn(1, 2, 21, 8), randn(1, 2, 1, 8).expand(1, 2, 21, 8), randn(1, 2, 21, 8))


def test_a_table_may_have_any_strides() -> None:
    q, k, v = (randn(2, 2, 21, 8) for _ in range(3))
    bias = randn(21, 2, 21).permute(1, 2, 0)[None].expand(2, 2, 21, 21)
    with torch.no_grad():
        exact, found, plain = (
            attn.attend(*(x.to(dtype) for x in (q, k, v)), "causal", bias=bias.to(dtype), target=target)  # type: ignore[arg-type]
            for dtype, target in ((torch.float64, "reference"), (torch.float32, "cpp"), (torch.float32, "torch"))
        )
    assert isinstance(exact, Tensor)
    assert isinstance(found, Tensor)
    assert isinstance(plain, Tensor)
    assert_within_budget(found, exact, plain)


@pytest.mark.parametrize("q_len", [1, 40])
def test_scores_may_be_as_large_as_numbers_get(q_len: int) -> None:
    q, k, v = randn(1, 2, q_len, 8), randn(1, 2, 40, 8), randn(1, 2, 40, 8)
    bias = torch.zeros(1, 1, q_len, 40)
    bias[:, :, 0] = torch.finfo(torch.float32).min
    with torch.no_grad():
        exact, found, plain = (
            attn.attend(*(x.to(dtype) for x in (q, k, v)), "all", bias=bias, target=target)  # type: ignore[arg-type]
            for dtype, target in ((torch.float32, "reference"), (torch.float32, "cpp"), (torch.float32, "torch"))
        )
    assert isinstance(exact, Tensor)
    assert isinstance(found, Tensor)
    assert isinstance(plain, Tensor)
    assert_within_budget(found, exact, plain)


def test_the_state_of_floating_point_is_left_as_it_was() -> None:
    state = ctypes.CDLL(None)
    before = state.fegetround()
    check(randn(1, 2, 67, 8), randn(1, 2, 67, 8), randn(1, 2, 67, 8))
    assert state.fegetround() == before
    assert (torch.tensor([1e-30]) * 1e-10).item() > 0  # a subnormal number is still one


def test_weights_that_are_almost_zero_are_zero() -> None:
    q, k = torch.full((1, 1, 2, 8), 40.0), torch.cat((randn(1, 1, 1, 8).abs(), -randn(1, 1, 1, 8).abs()), dim=2)
    out = attend(q, k, torch.tensor([1.0, 1e30]).view(1, 1, 2, 1), "all", "cpp")
    assert torch.equal(out, torch.ones(1, 1, 2, 1))


def test_threads_are_those_of_torch() -> None:
    library = load('#include <omp.h>\nextern "C" int most() { return omp_get_max_threads(); }\n')
    before = torch.get_num_threads()
    try:
        for count in (1, 3, 2):
            torch.set_num_threads(count)
            assert library.most() == count
    finally:
        torch.set_num_threads(before)


def test_the_number_of_threads_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "WORTH_THREADS", 0)
    q, k, v = (randn(2, 3, 131, 8) for _ in range(3))
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(attend(q, k, v, "causal & window(11)", "cpp"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_many_threads_may_attend_at_once() -> None:
    kernels.launches.cache_clear()
    inputs = [tuple(randn(1, 2, length, 8) for _ in range(3)) for length in (5, 17, 40, 67)] * 8
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda given: attend(*given, "causal & window(13)", "cpp"), inputs))
    assert all(torch.equal(out, attend(*given, "causal & window(13)", "cpp")) for out, given in zip(found, inputs, strict=True))


@pytest.mark.parametrize("normalizer", ["softmax(sink=sink)", "softmax_one", "softmax"])
@pytest.mark.parametrize("queries", [1, 40])
def test_the_log_sum_exp_of_a_query_that_sees_nothing_is_that_of_its_sink(normalizer: str, queries: int) -> None:
    q, k, v = torch.randn(3, 1, 2, 40, 8, generator=torch.Generator().manual_seed(0))
    asked = {"mask": 'offsets("3:5")', "normalizer": normalizer}
    tables = {"sink": torch.tensor([0.3, -0.2])} if "sink" in normalizer else {}
    found = [
        attn.attend(q[:, :, :queries], k, v, asked, tables=tables, q_positions=0, return_lse=True, target=target)[1]  # type: ignore[arg-type]
        for target in ("cpp", "reference")
    ]
    torch.testing.assert_close(found[0].double(), found[1].double(), rtol=1e-6, atol=1e-6)


def test_gradients_of_a_sink_in_the_log_sum_exp_of_queries_that_see_nothing_are_refused() -> None:
    q, k, v = torch.randn(3, 1, 2, 40, 8)
    sink = {"sink": torch.zeros(2, requires_grad=True)}
    with pytest.raises(ShapeError, match="no gradients of a table in the log-sum-exp of queries that see nothing"):
        attn.attend(
            q, k, v, {"mask": "causal(-2)", "normalizer": "softmax(sink=sink)"}, tables=sink, return_lse=True, target="cpp"
        )
