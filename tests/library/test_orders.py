"""Orders of tokens: permutations, and the ones that their names promise."""

from __future__ import annotations

from itertools import pairwise

import pytest

from attn_compiler import library
from attn_compiler.algebra.evaluate import evaluate_scalar
from attn_compiler.algebra.expr import k
from attn_compiler.errors import LanguageError
from attn_compiler.planning.geometry import Geometry
from attn_compiler.planning.language import Scope, parse_call
from attn_compiler.planning.words import PerToken

SIDES = (3, 5, 4)
LENGTH = 2 + 60 + 1
GRID = Scope(geometry=Geometry.of(SIDES, before=2, after=1))


def _order(text: str, scope: Scope = GRID) -> PerToken:
    order = parse_call(text, "orders", library.words(), scope)
    assert isinstance(order, PerToken)
    return order


def _ranks(text: str, scope: Scope = GRID, length: int = LENGTH) -> list[int]:
    order = _order(text, scope)
    tables = {derived.name: derived.make(length) for derived in order.derived}
    return [int(evaluate_scalar(order.of_k, {k: n}, tables)) for n in range(length)]


@pytest.mark.parametrize("text", ["axes(2, 0, 1)", "tiles(2, 2, 3)", "tiles(2)", "hilbert", "random(5)"])
def test_an_order_is_a_permutation(text: str) -> None:
    assert sorted(_ranks(text)) == list(range(LENGTH))


@pytest.mark.parametrize("text", ["axes(2, 0, 1)", "tiles(2, 2, 3)", "hilbert"])
def test_tokens_outside_of_the_grid_stay(text: str) -> None:
    ranks = _ranks(text)
    assert (ranks[0], ranks[1], ranks[-1]) == (0, 1, LENGTH - 1)


def _coordinates(place: int) -> tuple[int, int, int]:
    return place // 20, place // 4 % 5, place % 4


def test_tiles_are_sorted_by_tile_and_then_by_token() -> None:
    def sorted_by(place: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        at = _coordinates(place)
        return tuple(x // n for x, n in zip(at, (2, 2, 3), strict=True)), at

    expected = sorted(range(60), key=sorted_by)
    ranks = _ranks("tiles(2, 2, 3)")
    assert [ranks[2 + place] - 2 for place in expected] == list(range(60))


def test_axes_are_sorted_by_the_axes_as_listed() -> None:
    expected = sorted(range(60), key=lambda place: tuple(_coordinates(place)[n] for n in (2, 0, 1)))
    ranks = _ranks("axes(2, 0, 1)")
    assert [ranks[2 + place] - 2 for place in expected] == list(range(60))


@pytest.mark.parametrize("sides", [(8, 8), (4, 4, 4)], ids=str)
def test_neighbors_along_a_hilbert_curve_are_neighbors_on_the_grid(sides: tuple[int, ...]) -> None:
    scope = Scope(geometry=Geometry.of(sides))
    ranks = _ranks("hilbert", scope, 64)
    side = sides[0]
    points = [[place // side**n % side for n in range(len(sides))] for place in range(64)]
    along = [points[ranks.index(rank)] for rank in range(64)]
    steps = [sum(abs(x - y) for x, y in zip(one, other, strict=True)) for one, other in pairwise(along)]
    assert steps == [1] * 63


def test_splitmix_is_the_published_one() -> None:
    module = library.words()["orders"]["random"].function.__globals__
    assert module["splitmix64"](0) == 0xE220A8397B1DCDAF


def test_equal_orders_are_equal_and_named_alike() -> None:
    assert _order("random(3)") == _order("random(seed=3)") == _order("random(seed=layer)", Scope(layer=3))
    assert _order("random(3)") != _order("random(4)")


def test_a_layer_that_is_unknown_is_said_when_the_order_is_made() -> None:
    [derived] = _order("random(seed=layer)", Scope()).derived
    with pytest.raises(LanguageError, match="number of the layer"):
        derived.make(8)


@pytest.mark.parametrize("text", ["axes(0, 1)", "axes(0, 0, 1)", "tiles(2, 2)", "tiles(0)"])
def test_an_order_that_does_not_fit_the_geometry_is_an_error(text: str) -> None:
    with pytest.raises(LanguageError):
        _order(text)
