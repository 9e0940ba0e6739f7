"""The log-sum-exp that Triton's kernels give, and its gradients, against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import attn_compiler as attn
from attn_compiler.runtime.attend import Target
from attn_compiler.testing.budget import assert_within_budget

pytest.importorskip("triton")

TARGETS: tuple[Target, ...] = ("triton", "reference", "torch")
NORMALIZERS = ("softmax(sink=sink)", "softmax_one", "softmax")


def operands(tokens: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    q, *pair = (torch.randn(1, heads, tokens, 16, generator=generator) for heads in (2, 1, 1))
    return q, *pair, torch.randn(2, generator=generator)


def gradients(asked: dict[str, object], target: Target, used: str) -> tuple[Tensor, ...]:
    """Those of q, k, v and the sink, where a loss sees the output, the log-sum-exp, or both."""
    dtype = torch.float64 if target == "reference" else torch.float32
    q, k, v, sink = (x.to(dtype).requires_grad_() for x in operands(37))
    tables = {"sink": sink} if "sink" in str(asked) else {}
    out, totals = attn.attend(q, k, v, asked, tables=tables, return_lse=True, target=target)  # type: ignore[arg-type]
    loss = (out.sin().sum() if "out" in used else 0) + (totals.cos().sum() if "total" in used else 0)
    wanted = [q, k, v, *tables.values()]
    found = torch.autograd.grad(loss, wanted, allow_unused=True)  # type: ignore[arg-type]
    return tuple(torch.zeros_like(x) if of is None else of for x, of in zip(wanted, found, strict=True))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("used", ["total", "out and total"])
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_its_gradients_are_within_budget(normalizer: str, used: str) -> None:
    asked: dict[str, object] = {"mask": "causal & window(20)", "score": "softcap(score, 5)", "normalizer": normalizer}
    for results in zip(*(gradients(asked, target, used) for target in TARGETS), strict=True):
        assert_within_budget(*results)


@pytest.mark.usefixtures("specialized_tiles")
def test_its_gradients_follow_from_what_one_loop_keeps() -> None:
    asked: dict[str, object] = {"mask": "causal & window(20)"}
    for results in zip(*(gradients(asked, target, "out and total") for target in TARGETS), strict=True):
        assert_within_budget(*results)


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("queries", [1, 40])
@pytest.mark.parametrize("empty_rows", ["zero", "mean"])
def test_that_of_a_query_that_sees_nothing_is_that_of_its_sink(empty_rows: str, normalizer: str, queries: int) -> None:
    q, k, v, sink = operands(40)
    asked = {"mask": 'offsets("3:5")', "normalizer": normalizer, "empty_rows": empty_rows}
    tables = {"sink": sink} if "sink" in normalizer else {}
    found, exact, plain = (
        attn.attend(q[:, :, :queries], k, v, asked, tables=tables, q_positions=0, return_lse=True, target=target)[1]  # type: ignore[arg-type]
        for target in TARGETS
    )
    assert_within_budget(found, exact, plain)
