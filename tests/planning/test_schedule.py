"""The schedule never loses a visible pair, never calls a tile full that is not, and is tight for the masks people use."""

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_compiler.algebra.bounds import Occupancy
from attn_compiler.algebra.evaluate import evaluate_scalar
from attn_compiler.algebra.expr import (
    Expr,
    Sort,
    b,
    const,
    false,
    h,
    k,
    layer,
    maximum,
    minimum,
    q,
    same,
    symbol,
    table,
    true,
    where,
)
from attn_compiler.algebra.integers import IntegerSet
from attn_compiler.algebra.variant import Variant
from attn_compiler.errors import ShapeError
from attn_compiler.planning.schedule import Schedule, schedule

CAUSAL = k <= q
TABLES = {"document": [[0, 0, 0, 1, 1, 2, 2, 2, 2, 5], [0, 1, 1, 1, 1, 1, 4, 4, 4, 4]], "bitmap": [[1, 0, 1], [0, 1, 0]]}


def window(n: int) -> Expr:
    return abs(q - k) < n


def dense(mask: Expr, queries: int, keys: int, row: int = 0, order: list[int] | None = None) -> np.ndarray:
    places = order or list(range(keys))
    at = [places[n] if order else n + keys - queries for n in range(queries)]
    seen = [[bool(evaluate_scalar(mask, {q: x, k: y, b: row, h: 0}, TABLES)) for y in places] for x in at]
    return np.array(seen, bool).reshape(queries, keys)


def painted(found: Schedule, head: int | None = None) -> np.ndarray:
    """0 where a pair is empty, 1 where mixed, 2 where full."""
    picture = np.zeros((found.q_len, found.k_len), int)
    (tall, wide) = found.tile
    for row, column, occupancy in found.tiles(head):
        here = picture[row * tall : (row + 1) * tall, column * wide : (column + 1) * wide]
        assert here.size
        assert not here.any()
        here[:] = 2 if occupancy is Occupancy.FULL else 1
    return picture


document_q, document_k = table("document", b, q), table("document", b, k)
number = st.integers(-3, 12)
terms = st.recursive(
    st.one_of(st.sampled_from([q, k, q - k, document_q, document_k]), number.map(const)),
    lambda inner: st.one_of(
        st.builds(lambda x, y: x + y, inner, inner),
        st.builds(lambda x, y: x - y, inner, inner),
        st.builds(lambda x, n: x * n, inner, st.integers(-2, 3)),
        st.builds(lambda x, n: x // n, inner, st.integers(1, 5)),
        st.builds(lambda x, n: x % n, inner, st.integers(1, 5)),
        st.builds(abs, inner),
        st.builds(minimum, inner, inner),
        st.builds(maximum, inner, inner),
        st.builds(lambda x, y, z: where(x < 3, y, z), inner, inner, inner),
        st.builds(lambda x, y: table("bitmap", x, y), inner, inner),
    ),
    max_leaves=6,
)
masks = st.recursive(
    st.one_of(
        st.builds(lambda x, y: x < y, terms, terms),
        st.builds(lambda x, y: x <= y, terms, terms),
        st.builds(same, terms, terms),
        st.builds(lambda n, c: same((q - k) % n, c), st.integers(1, 4), st.integers(0, 4)),
        st.sampled_from([CAUSAL, window(3), same(document_q, document_k), true, false]),
    ),
    lambda inner: st.one_of(
        st.builds(lambda x, y: x & y, inner, inner),
        st.builds(lambda x, y: x | y, inner, inner),
        st.builds(lambda x: ~x, inner),
        st.builds(where, inner, inner, inner),
        st.builds(same, inner, inner),
    ),
    max_leaves=4,
)


@given(masks, st.integers(0, 10), st.integers(0, 10), st.integers(1, 4), st.integers(1, 4), st.booleans())
@settings(max_examples=150)
def test_no_visible_pair_is_lost_and_full_tiles_are_all_visible(
    mask: Expr, queries: int, keys: int, tall: int, wide: int, given_tables: bool
) -> None:
    found = schedule(Variant(mask=mask), queries, keys, tile=(tall, wide), tables=TABLES if given_tables else None)
    picture = painted(found)
    for row in (0, 1):
        seen = dense(mask, queries, keys, row)
        assert (picture[seen] > 0).all()
        assert seen[picture == 2].all()


@given(masks, st.permutations(list(range(9))))
@settings(max_examples=50)
def test_a_schedule_in_another_order_is_sound_too(mask: Expr, order: list[int]) -> None:
    picture = painted(schedule(Variant(mask=mask), 9, 9, tile=(2, 2), tables=TABLES, order=order))
    for row in (0, 1):
        seen = dense(mask, 9, 9, row, order)
        assert (picture[seen] > 0).all()
        assert seen[picture == 2].all()


@pytest.mark.parametrize("n", [64, 128, 200])
def test_a_causal_window_visits_exactly_the_tiles_it_touches(n: int) -> None:
    found = schedule(Variant(mask=CAUSAL & window(n)), 1000, 1000)
    visible = np.subtract.outer(np.arange(1000), np.arange(1000))
    seen = (visible >= 0) & (visible < n)
    tiles = [[seen[y : y + 64, x : x + 64] for x in range(0, 1000, 64)] for y in range(0, 1000, 64)]
    expected = [(y, x, bool(tile.all())) for y, line in enumerate(tiles) for x, tile in enumerate(line) if tile.any()]
    assert [(y, x, occupancy is Occupancy.FULL) for y, x, occupancy in found.tiles()] == expected


def test_one_million_tokens_of_a_causal_window_need_little_memory() -> None:
    tracemalloc.start()
    found = schedule(Variant(mask=CAUSAL & window(4096)), 1 << 20, 1 << 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 * 2**20
    assert len(found.panels[0].runs.start) < 3 * found.panels[0].runs.rows
    assert found.runs(1000) == ((936, 937, Occupancy.MIXED), (937, 1000, Occupancy.FULL), (1000, 1001, Occupancy.MIXED))


def test_a_mask_that_needs_refinement_stays_cheap_for_a_million_tokens() -> None:
    tracemalloc.start()
    found = schedule(Variant(mask=CAUSAL & (q - k < 500) & ((q - k) % 64 < 5)), 1 << 20, 1 << 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 500 * 2**20
    assert found.panels[0].runs.count() < 10 * found.panels[0].runs.rows


def test_without_its_values_a_table_leaves_what_depends_on_it_mixed() -> None:
    mask = CAUSAL & same(table("document", q), table("document", k))
    blind = schedule(Variant(mask=mask), 256, 256)
    assert {occupancy for _, _, occupancy in blind.tiles()} == {Occupancy.MIXED}
    assert blind.panels[0].runs.count() == 10


def test_document_ids_sharpen_a_schedule() -> None:
    mask = CAUSAL & same(table("document", q), table("document", k))
    found = schedule(Variant(mask=mask), 256, 256, tables={"document": np.arange(256) // 128})
    assert list(found.tiles()) == [
        (0, 0, Occupancy.MIXED),
        (1, 0, Occupancy.FULL),
        (1, 1, Occupancy.MIXED),
        (2, 2, Occupancy.MIXED),
        (3, 2, Occupancy.FULL),
        (3, 3, Occupancy.MIXED),
    ]


def test_a_block_bitmap_is_its_own_schedule() -> None:
    bitmap = np.random.default_rng(0).random((8, 8)) < 0.3
    mask = table("blocks", q // 64, k // 64, sort=Sort.BOOL)
    found = schedule(Variant(mask=mask), 512, 512, tables={"blocks": bitmap})
    assert [(y, x) for y, x, _ in found.tiles()] == list(zip(*map(list, np.nonzero(bitmap)), strict=True))
    assert {occupancy for _, _, occupancy in found.tiles()} == {Occupancy.FULL}


def test_a_tile_is_full_for_a_batch_only_where_it_is_full_in_each_row() -> None:
    mask = table("valid", b, k, sort=Sort.BOOL)
    found = schedule(Variant(mask=mask), 2, 4, tile=(2, 2), tables={"valid": [[1, 1, 0, 0], [1, 1, 1, 1]]})
    assert found.runs(0) == ((0, 1, Occupancy.FULL), (1, 2, Occupancy.MIXED))


def test_residue_classes_turn_a_dilated_window_into_a_window_of_each_class() -> None:
    mask = CAUSAL & (q - k < 512) & same((q - k) % 4, 0)
    order = sorted(range(2048), key=lambda n: (n % 4, n))
    plain, classes = (schedule(Variant(mask=mask), 2048, 2048, order=o) for o in (None, order))
    assert classes.panels[0].runs.count() == 4 * (8 + 7 + 6)
    assert classes.density < plain.density / 2


def test_square_tiles_make_a_neighborhood_block_sparse() -> None:
    mask = (abs(q // 64 - k // 64) <= 4) & (abs(q % 64 - k % 64) <= 4)
    order = sorted(range(4096), key=lambda n: (n // 64 // 8, n % 64 // 8, n // 64, n % 64))
    rows, tiles = (schedule(Variant(mask=mask), 4096, 4096, order=o) for o in (None, order))
    assert rows.panels[0].runs.count() == 64 * 9 - 2 * (4 + 3 + 2 + 1)
    assert tiles.panels[0].runs.count() == (3 * 8 - 2) ** 2


def test_a_square_is_never_negative() -> None:
    distance = (q // 16 - k // 16) * (q // 16 - k // 16) + (q % 16 - k % 16) * (q % 16 - k % 16)
    found = schedule(Variant(mask=distance < 9), 256, 256, tile=(16, 16))
    assert found.panels[0].runs.count() == 16 * 5 - 2 * (2 + 1)


def test_heads_with_the_same_tiles_share_a_panel() -> None:
    found = schedule(Variant(mask=CAUSAL & (q - k < (h // 2 + 1) * 128)), 512, 512, heads=4)
    assert [panel.heads for panel in found.panels] == [(0, 1), (2, 3)]
    assert len(list(found.tiles(0))) < len(list(found.tiles(3))) == len(list(found.tiles()))


def test_a_group_of_heads_follows_its_own_mask() -> None:
    near = Variant(mask=CAUSAL & window(64))
    found = schedule(replace(Variant(mask=CAUSAL), groups=((IntegerSet.parse("1:3"), near),)), 512, 512, heads=4)
    assert {panel.heads for panel in found.panels} == {(1, 2), (0, 3)}
    assert found.density == pytest.approx((2 * 15 + 2 * 36) / (4 * 64))


def test_the_layer_and_named_values_are_known() -> None:
    width = symbol("w", Sort.INDEX)
    found = schedule(Variant(mask=CAUSAL & (q - k < width * (layer + 1))), 512, 512, layer=1, layers=2, values={"w": 32})
    assert found.of().key() == schedule(Variant(mask=CAUSAL & (q - k < 64)), 512, 512).of().key()


def test_one_new_query_meets_the_last_key() -> None:
    found = schedule(Variant(mask=CAUSAL & (q - k < 100)), 1, 1000)
    assert found.runs(0) == ((14, 15, Occupancy.MIXED), (15, 16, Occupancy.FULL))


@pytest.mark.parametrize(("queries", "keys"), [(0, 0), (0, 5), (5, 0)])
def test_nothing_is_visited_where_there_are_no_tokens(queries: int, keys: int) -> None:
    found = schedule(Variant(mask=CAUSAL), queries, keys)
    assert list(found.tiles()) == []
    assert found.density == 0


def test_wrong_sizes_are_explained() -> None:
    with pytest.raises(ShapeError, match="6 query heads cannot share 4"):
        schedule(Variant(), 8, 8, heads=6, kv_heads=4)
    with pytest.raises(ShapeError, match="at least 1"):
        schedule(Variant(), 8, 8, tile=(0, 4))
    with pytest.raises(ShapeError, match="lists every position"):
        schedule(Variant(), 3, 3, order=[0, 0, 1])
    with pytest.raises(ShapeError, match="no head 5"):
        schedule(Variant(), 3, 3).of(5)
