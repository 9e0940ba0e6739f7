"""Products of activations and weights in few bits, beside integers and fractions written down once more."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attn_compiler import library
from attn_compiler.algebra.storage import Held
from attn_compiler.planning.language import Scope
from attn_compiler.planning.storing import read_held
from attn_compiler.planning.yaml_text import Entry, entry_of
from attn_compiler.targets.projected import projected
from end_to_end.integers import product

HALF_ULP = 2.0**-24  # of a float32, in which codes and scales are found


def held(text: object) -> Held:
    entry: Entry = entry_of(text, "test")
    return read_held(entry, "projections", library.words(), Scope())


def operands(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Activations, three channels of which are forty times as large as the others, and weights."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(50, 96, generator=generator), torch.randn(40, 96, generator=generator)
    x[:, [5, 40, 77]] *= 40
    return x.to(dtype), weight.to(dtype)


def off(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("threshold", [6.0, math.inf])
def test_int8_is_what_integers_compute(threshold: float) -> None:
    x, weight = operands()
    how = held("int8" if math.isinf(threshold) else {"type": "int8", "outliers": threshold})
    wanted = torch.from_numpy(product(x.numpy(), weight.numpy(), threshold))
    assert off(projected(x, weight, how), wanted) < 2 * HALF_ULP


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_given_in_fewer_bits_is_computed_in_float32(dtype: torch.dtype) -> None:
    x, weight = operands(dtype)
    wanted = torch.from_numpy(product(x.double().numpy(), weight.double().numpy(), 6.0))
    found = projected(x, weight, held({"type": "int8", "outliers": 6.0}))
    assert found.dtype == torch.float32
    assert off(found, wanted) < math.sqrt(96) * HALF_ULP


def test_outliers_ruin_plain_int8_and_not_what_keeps_their_columns() -> None:
    x, weight = operands()
    exact = x @ weight.mT
    inner = torch.ones(96, dtype=torch.bool)
    inner[[5, 40, 77]] = False
    small = x[:, inner] @ weight[:, inner].mT  # what the other channels say, which the outliers drown
    large = exact - small
    plain, apart = (projected(x, weight, held(text)) - large for text in ("int8", {"type": "int8", "outliers": 6.0}))
    assert off(plain, small) > 0.1
    assert off(apart, small) < 0.015


def test_what_is_an_outlier_all_rows_of_a_call_say_together() -> None:
    x, weight = operands()
    how = held({"type": "int8", "outliers": 1000.0})
    alone = projected(x[:1], weight, how)
    x[7, 3] = 2000.0
    assert off(projected(x, weight, how)[:1], alone) > 1e-4
    assert torch.equal(projected(x[:1], weight, how), alone)


@pytest.mark.parametrize(("text", "most"), [("int4", 0.2), ("fp8_e4m3", 0.05), ("mxfp4", 0.25), ("nvfp4", 0.2), ("bf16", 0.005)])
def test_other_types_round_each_factor_by_itself(text: str, most: float) -> None:
    x, weight = operands()
    x = x.clamp(-3, 3)
    found = projected(x, weight, held(text))
    assert 1e-4 < off(found, x @ weight.mT) < most
    unit = torch.eye(96, dtype=torch.float64)  # has the same numbers in every type, so that the other factor shows
    of_x, of_weight = projected(x, unit, held(text)), projected(unit, weight, held(text)).mT
    assert off(found, of_x @ of_weight.mT) < 64 * HALF_ULP


def test_gradients_pass_straight_through_what_is_rounded() -> None:
    x, weight = (one.requires_grad_() for one in operands())
    how = held({"type": "int8", "outliers": 6.0})
    slope = torch.randn(50, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    of_x, of_weight = torch.autograd.grad(projected(x, weight, how), (x, weight), slope)
    with torch.no_grad():
        unit = torch.eye(96, dtype=torch.float64)
        apart = (x.abs() >= 6).any(dim=0)
        rounded_x = torch.where(apart, x, projected(x, unit, how))
        rounded_weight = torch.where(apart, weight, projected(unit, weight, held("int8")).mT)
    assert off(of_x, slope @ rounded_weight) < 4 * HALF_ULP
    assert off(of_weight, slope.mT @ rounded_x) < 4 * HALF_ULP


def test_no_rows_have_no_result_and_no_numbers_show() -> None:
    x, weight = operands()
    how = held({"type": "int8", "outliers": 6.0})
    assert projected(x[:0], weight, how).shape == (0, 40)
    x[3, 3] = torch.nan
    found = projected(x, weight, how)
    assert found[3].isnan().all()
    assert not found[[0, 1, 2, 4]].isnan().any()
