"""Every word for masks against loops written from the definition of the language."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import pytest

from attn_compiler import library
from attn_compiler.algebra.evaluate import evaluate_scalar
from attn_compiler.algebra.expr import b, h, k, k_len, kv, layer, q
from attn_compiler.planning.geometry import Geometry
from attn_compiler.planning.language import Scope, parse_mask

N = 24
LABELS = [n // 5 for n in range(N)]
VALID = [n % 7 != 3 for n in range(N)]
PAIRS = [[(3 * x + y) % 4 == 0 for y in range(N)] for x in range(N)]
BITMAP = [[[(x + y + head) % 2 == 0 for y in range(N // 4)] for x in range(N // 4)] for head in range(3)]
TABLES = {
    "doc": LABELS, "pad": VALID, "length": [9, 2], "map": PAIRS, "bits": BITMAP,
    "spans.a": [1.0, -2.0, 3.5], "spans.b": [0.1, 0.5, 0.25],
}  # fmt: skip
Rule = Callable[[int, int, int], bool]  # q, k, head

RULES: dict[str, Rule] = {
    "all": lambda x, y, n: True,
    "none": lambda x, y, n: False,
    "causal": lambda x, y, n: y <= x,
    "causal(offset=-2)": lambda x, y, n: y <= x - 2,
    "window(3)": lambda x, y, n: abs(x - y) < 3,
    "window(5, 2)": lambda x, y, n: x - 5 < y < x + 2,
    "window(2, of=block(4))": lambda x, y, n: abs(x // 4 - y // 4) < 2,
    "window(2, of=doc)": lambda x, y, n: abs(LABELS[x] - LABELS[y]) < 2,
    "sinks(4)": lambda x, y, n: y < 4,
    "prefix(length)": lambda x, y, n: y < 2,
    'offsets("-2, 0:6:3")': lambda x, y, n: x - y in (-2, 0, 3),
    'queries("0:4, -1")': lambda x, y, n: x in (0, 1, 2, 3, N - 1),
    'keys("1::5")': lambda x, y, n: y in range(1, N, 5),
    "same(doc)": lambda x, y, n: LABELS[x] == LABELS[y],
    "before(doc)": lambda x, y, n: LABELS[y] <= LABELS[x],
    "valid(pad)": lambda x, y, n: VALID[y],
    "chunks(5, shift=3)": lambda x, y, n: (x - 3) // 5 == (y - 3) // 5,
    "dilated(3)": lambda x, y, n: (x - y) % 3 == 0,
    "strided(2, 3, head_step=2, offset=1)": lambda x, y, n: (y // 2 + (n // 2) * 2 + 1) % 3 == 0,
    "powers(2)": lambda x, y, n: abs(x // 2 - y // 2) in (0, 1, 2, 4, 8),
    "blocks(bits, 4)": lambda x, y, n: BITMAP[n][x // 4][y // 4],
    "pairs(map)": lambda x, y, n: PAIRS[x][y],
    "span(spans.a, spans.b, round=4)": lambda x, y, n: (
        x - y < 4 * math.ceil((TABLES["spans.a"][n] + TABLES["spans.b"][n] * N) / 4)  # type: ignore[operator]
    ),
}


def _sees(text: str, scope: Scope, head: int = 0) -> list[list[bool]]:
    keep = parse_mask(text, library.words(), scope).keep
    env = {b: 1, h: head, kv: head // 2, layer: 0, k_len: N}
    return [[bool(evaluate_scalar(keep, {**env, q: x, k: y}, TABLES)) for y in range(N)] for x in range(N)]


@pytest.mark.parametrize("text", RULES)
@pytest.mark.parametrize("head", range(3))
def test_a_mask_is_what_its_definition_says(text: str, head: int) -> None:
    expected = [[RULES[text](x, y, head) for y in range(N)] for x in range(N)]
    assert _sees(text, Scope(strict=False), head) == expected


def test_every_word_for_masks_is_tested_here() -> None:
    of_geometry = {"neighborhood", "ball", "permuted"}
    assert set(library.words()["masks"]) == {text.partition("(")[0] for text in RULES} | of_geometry


GRID = Scope(geometry=Geometry.of([4, 5], before=2, after=2))


def _place(position: int) -> tuple[int, int] | None:
    return divmod(position - 2, 5) if 2 <= position < 22 else None


def test_a_ball_holds_the_near_tokens_of_the_grid_only() -> None:
    def near(x: int, y: int) -> bool:
        one, other = _place(x), _place(y)
        return one is not None and other is not None and math.dist(one, other) < 2

    assert _sees("ball(2)", GRID) == [[near(x, y) for y in range(N)] for x in range(N)]


def test_chunks_on_a_geometry_are_windows_that_do_not_wrap() -> None:
    def together(x: int, y: int) -> bool:
        one, other = _place(x), _place(y)
        if one is None or other is None:
            return False
        return all((m - s) // n == (o - s) // n for m, o, n, s in zip(one, other, (2, 3), (1, 2), strict=True))

    assert _sees("chunks([2, 3], shift=[1, 2])", GRID) == [[together(x, y) for y in range(N)] for x in range(N)]


def test_a_permuted_mask_holds_after_the_order() -> None:
    seen = parse_mask("permuted(causal, random(seed=3))", library.words(), Scope())
    [derived] = seen.derived
    ranks = derived.make(N)
    assert sorted(ranks) == list(range(N))
    found = [[evaluate_scalar(seen.keep, {q: x, k: y}, {derived.name: ranks}) for y in range(N)] for x in range(N)]
    assert found == [[ranks[y] <= ranks[x] for y in range(N)] for x in range(N)]


# Neighborhoods: NATTEN's rule as a list of the places a query looks at, where a place may repeat or lie outside (None).


def _looks_at(x: int, size: int, w: int, stride: int, d: int, causal: bool, edge: str) -> list[int | None]:
    group = list(range(x % d, size, d))
    i, length = x // d, len(group)
    leader = min(i // stride * stride + (stride - 1 if causal else stride // 2), length - 1)
    if causal:
        window = list(range(leader - w + 1, i + 1))
    else:
        window = list(range(leader - w // 2, leader - w // 2 + w))
        if edge == "shift":
            shift = max(0, -window[0]) - max(0, window[-1] - (length - 1))
            window = [n + shift for n in window]
    if edge == "wrap":
        return [group[n % length] for n in window]
    if edge == "replicate":
        return [group[min(max(n, 0), length - 1)] for n in window]
    return [group[n] if 0 <= n < length else None for n in window]


SHAPES = [((7,), (3,)), ((8,), (4,)), ((3, 5), (2, 3)), ((2, 3, 4), (2, 2, 3))]
EDGES = ("shift", "clip", "zero", "wrap", "replicate")


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize(("sizes", "kernels"), SHAPES, ids=str)
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("causal", [False, True])
def test_a_neighborhood_is_that_of_natten(
    sizes: tuple[int, ...], kernels: tuple[int, ...], strided: bool, dilation: int, causal: bool, edge: str
) -> None:
    axes = len(sizes)
    # A dilated kernel must fit into its axis, so only axes that are long enough are dilated.
    dilations = [dilation if w * dilation <= size else 1 for size, w in zip(sizes, kernels, strict=True)]
    strides = [2 if strided else 1] * axes
    flags = [causal and n == 0 for n in range(axes)]
    text = f'neighborhood({list(kernels)}, {strides}, {dilations}, causal={flags}, edge="{edge}")'
    seen = parse_mask(text, library.words(), Scope(geometry=Geometry.of(sizes, before=1)))
    places = list(product(*(range(size) for size in sizes)))
    for at_q, x in enumerate(places, 1):
        looks = [_looks_at(*z, edge) for z in zip(x, sizes, kernels, strides, dilations, flags, strict=True)]
        window = list(product(*looks))
        outside = sum(None in z for z in window)
        assert evaluate_scalar(seen.phantoms, {q: at_q, k: 0}) == (outside if edge == "zero" else 0)
        for at_k, y in enumerate(places, 1):
            env = {q: at_q, k: at_k}
            assert evaluate_scalar(seen.keep, env) == (y in window)
            if edge == "replicate" and y in window:
                assert evaluate_scalar(seen.times, env) == window.count(y)
        assert not evaluate_scalar(seen.keep, {q: at_q, k: 0})
        assert not evaluate_scalar(seen.keep, {q: 0, k: at_q})
