"""`local_linear` (LLA) against ridge regressions that are solved one query after the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from attn_compiler import attend, library
from attn_compiler.algebra import wire
from attn_compiler.algebra.expr import k, q
from attn_compiler.algebra.variant import Variant
from attn_compiler.errors import ShapeError
from attn_compiler.planning.findings import costs
from attn_compiler.planning.planner import plan
from attn_compiler.planning.site import Frame, Kind, Phase, Site
from attn_compiler.runtime.exported import uncarried
from attn_compiler.targets.choice import TorchTarget
from attn_compiler.testing import Case, assert_case, assert_within_budget, check_variant, variant_of

HEADS, KV_HEADS, TOKENS, DIM = 4, 2, 23, 6
DISTANCE = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


Q, K, V = (drawn(2, heads, TOKENS, DIM, seed=seed) for seed, heads in enumerate((HEADS, KV_HEADS, KV_HEADS)))
SLOTS: Mapping[str, object] = {"mask": "causal", "normalizer": "local_linear(ridge=0.5)"}


def solved(q: Tensor, k: Tensor, v: Tensor, ridge: float) -> Tensor:
    """What a line through keys and values, weighed by how near the keys are and bent towards flatness, gives at the query."""
    root = (q @ k.mT * DIM**-0.5).exp().sqrt()[:, None]
    flat = torch.cat([torch.zeros(DIM, 1, dtype=q.dtype), ridge**0.5 * torch.eye(DIM, dtype=q.dtype)], dim=1)
    lines = torch.cat([root * torch.cat([torch.ones_like(root), k - q], dim=1), flat])
    return torch.linalg.lstsq(lines, torch.cat([root * v, torch.zeros(DIM, v.shape[1], dtype=v.dtype)]))[0][0]


def query_by_query(shown: Tensor, ridge: float) -> Tensor:
    rows = torch.zeros(2, HEADS, TOKENS, DIM, dtype=torch.float64)
    for b in range(2):
        for h in range(HEADS):
            for i in range(TOKENS):
                keys, values = (x[b, h // 2, shown[i]] for x in (K, V))
                rows[b, h, i] = solved(Q[b, h, i], keys, values, ridge)
    return rows


@pytest.mark.parametrize("target", ["reference", "torch", "auto"])
@pytest.mark.parametrize(("mask", "width"), [("causal", TOKENS), ("causal & window(7)", 7)])
def test_each_query_gets_what_a_regression_around_it_gives(target: str, mask: str, width: int) -> None:
    expected = query_by_query((DISTANCE >= 0) & (width > DISTANCE), 0.5)
    found = attend(Q, K, V, {**SLOTS, "mask": mask}, target=target)  # type: ignore[arg-type]
    assert isinstance(found, Tensor)
    assert_within_budget(found, expected, expected * (1 + 1e-13))


def test_weights_sum_to_one_and_a_large_ridge_leaves_softmax() -> None:
    ones = attend(Q, K, torch.ones_like(V), SLOTS)
    assert isinstance(ones, Tensor)
    assert torch.allclose(ones, torch.ones_like(ones))
    flat, plain = (attend(Q, K, V, {"mask": "causal", **more}) for more in ({"normalizer": "local_linear(ridge=1e14)"}, {}))
    assert isinstance(flat, Tensor)
    assert isinstance(plain, Tensor)
    assert torch.allclose(flat, plain, atol=1e-10)


@pytest.mark.parametrize("shift", [-500.0, 300.0])
def test_scores_that_are_far_from_zero_stay_finite(shift: float) -> None:
    found = attend(Q, K, V, {**SLOTS, "score": f"score + {shift}"})
    assert isinstance(found, Tensor)
    assert found.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_has_gradients(dtype: torch.dtype) -> None:
    assert_case(Case(variant_of(SLOTS, length=TOKENS, dim=DIM), Q, K, V, {}), dtype)


@pytest.mark.full
def test_it_is_what_it_says_at_every_length() -> None:
    check_variant(variant_of(SLOTS), dtypes=[torch.float32])


def test_it_travels_as_text() -> None:
    variant = variant_of(SLOTS, length=TOKENS, dim=DIM)
    assert wire.read(wire.write(variant)) == variant


@pytest.mark.parametrize("target", ["cpp", "flex"])
def test_kernels_refuse_what_they_do_not_solve(target: str) -> None:
    with pytest.raises(ShapeError, match="solves no system of equations for each query"):
        attend(Q.float(), K.float(), V.float(), SLOTS, target=target)  # type: ignore[arg-type]


def test_an_export_refuses_it() -> None:
    assert "solves no system of equations" in str(uncarried(variant_of(SLOTS)))


def test_a_report_tells_what_it_costs_and_claims_no_gain() -> None:
    site = Site(
        "attn", Kind.SELF, Phase.PREFILL, 0, 1, 1, 8, 8, 1024, 1024, 64, 64, "float32", Variant(mask=k <= q), Frame(), 1024, 1024
    )
    (decision,) = plan([site], library.load_policy("lla"), (TorchTarget(),)).decisions
    assert decision.form == "written out, and 64 equations solved for each query"
    longer = replace(decision, site=replace(site, q_len=2048, k_len=2048, q_hint=2048, k_hint=2048))
    cost, twice = costs(decision), costs(longer)
    assert cost.after.flops > 30 * cost.before.flops
    assert twice.after.flops > 3.9 * cost.after.flops
    carried = TorchTarget().carry(replace(site, form="written out"), decision.variant)
    assert not carried.gains  # type: ignore[union-attr]
