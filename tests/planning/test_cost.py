"""Costs follow from the tiles that are visited."""

import pytest

from attn_compiler.algebra.expr import k, q
from attn_compiler.algebra.variant import Variant
from attn_compiler.errors import ShapeError
from attn_compiler.planning.cost import Cost, summed
from attn_compiler.planning.schedule import schedule

CAUSAL = k <= q


def test_a_dense_attention_costs_the_same_either_way() -> None:
    found = schedule(Variant(), 100, 80, tile=(32, 32)).cost(heads=2, head_dim=16, value_dim=8, dtype="float16")
    assert found.dense == found.scheduled
    assert found.dense == Cost(flops=2 * 2 * 100 * 80 * 24, bytes=2 * 2 * (100 + 4 * 80) * 24)


def test_a_causal_mask_visits_the_tiles_below_the_diagonal() -> None:
    found = schedule(Variant(mask=CAUSAL), 256, 256).cost(heads=1, head_dim=64, value_dim=64, dtype="float32")
    assert found.flops_ratio == 16 / 10
    assert found.scheduled.bytes == 4 * 128 * (256 + 10 * 64)


def test_the_last_tiles_count_only_what_they_hold() -> None:
    found = schedule(Variant(mask=CAUSAL), 70, 70)
    assert found.visited_pairs == 64 * 64 + 6 * 70
    assert found.density == found.visited_pairs / 70**2


def test_a_dtype_without_bits_is_refused() -> None:
    with pytest.raises(ShapeError, match='not "half"'):
        schedule(Variant(), 8, 8).cost(1, 8, 8, "half")


def test_what_is_added_up_costs_in_proportion_to_its_length() -> None:
    once, twice = (summed(n, n, 2, 16, 8, 8, "float32") for n in (100, 200))
    assert (twice.flops, twice.bytes) == (2 * once.flops, 2 * once.bytes)
    assert once == Cost(flops=2 * 2 * 200 * 16 * 8, bytes=2 * 200 * 16 * 4)
