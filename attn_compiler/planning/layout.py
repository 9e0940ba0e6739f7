"""Orders of tokens in which a mask fills whole tiles: residue classes of a dilation, square tiles of a geometry."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from math import gcd

import numpy as np

from attn_compiler.algebra.expr import Expr, Sort, const, k, q
from attn_compiler.algebra.linear import linear
from attn_compiler.algebra.variant import Variant
from attn_compiler.planning.runs import Integers


def natural_order(variant: Variant, length: int, size: Sequence[int] = (), *, before: int = 0, tile: int = 64) -> Integers | None:
    """The original positions in the order that suits the mask, or None where they are best left as they are.

    `size` is the geometry: its axes follow `before` tokens that keep their places, as do those after it.
    """
    step = dilation(variant.mask)
    if step > 1:
        return np.argsort(np.arange(length) % step, kind="stable")
    if len(size) < 2:
        return None
    return _tiled(length, size, before, tile)


def arrangements(
    mask: Expr, q_len: int, k_len: int, tile: int, of_keys: int = 1
) -> Iterator[tuple[Integers | None, Integers | None]]:
    """Orders of queries and of keys in which a tile of queries may meet fewer keys; the first leaves both as they are.

    `of_keys` is how many keys are met together: many ones had better be neighbors in a grid, too.
    """
    yield None, None
    step = dilation(mask)
    if 1 < step < min(q_len, k_len):
        yield tuple(np.argsort(np.arange(n) % step, kind="stable") for n in (q_len, k_len))  # type: ignore[misc]
    grid = grid_of(mask, q_len)
    if grid:
        yield _tiled(q_len, grid[0], grid[1], tile), None
        if of_keys > 1 and q_len == k_len:
            yield _tiled(q_len, grid[0], grid[1], tile), _tiled(k_len, grid[0], grid[1], of_keys)


def grid_of(mask: Expr, length: int) -> tuple[tuple[int, ...], int] | None:
    """The grid that a mask sees in a row of tokens, and how many tokens come before it."""
    steps: set[int] = set()
    before: set[int] = set()
    for node in mask.walk():
        if node.op not in ("floordiv", "mod") or node.sort is not Sort.INDEX or not isinstance(node.args[1].value, int):
            continue
        place = linear(node.args[0])
        if place.factors == {q: 1}:
            steps.add(node.args[1].value)
            before.add(-place.constant)
    sizes = sorted(steps)
    if not sizes or len(before) > 1 or any(b % a for a, b in pairwise(sizes)) or sizes[0] < 2:
        return None
    start = max(0, before.pop())
    inner = [b // a for a, b in pairwise([1, *sizes])]
    outer = (length - start) // sizes[-1]
    return ((outer, *reversed(inner)), start) if outer > 1 else None


def dilation(mask: Expr) -> int:
    """The step of which q - k is a multiple wherever the mask holds; 1 where there is none."""
    if mask.op == "and":
        one, other = (dilation(a) for a in mask.args)
        return one * other // gcd(one, other)
    if mask.op != "eq" or mask.args[0].op != "mod" or mask.args[0].sort is not Sort.INDEX:
        return 1
    (distance, modulus), rest = mask.args[0].args, mask.args[1]
    step, between = modulus.value, linear(distance)
    known = isinstance(step, int) and rest == const(0) and between.factors in ({q: 1, k: -1}, {q: -1, k: 1})
    return step if known and isinstance(step, int) and step > 0 and between.constant % step == 0 else 1


def _tiled(length: int, size: Sequence[int], before: int, tile: int) -> Integers:
    """Tiles of about equal sides with `tile` tokens each, one after the other."""
    inside = int(np.prod(size))
    axes = np.unravel_index(np.arange(inside), tuple(size))
    sides = _sides(len(size), tile)
    outer = [axis // side for axis, side in zip(axes, sides, strict=True)]
    inner = np.lexsort([*axes[::-1], *outer[::-1]]) + before
    return np.concatenate([np.arange(before), inner, np.arange(before + inside, length)])


def _sides(axes: int, tile: int) -> list[int]:
    """Powers of two whose product is the largest one within `tile`, the last axes getting the larger ones."""
    exponent = tile.bit_length() - 1
    share, more = divmod(exponent, axes)
    return [1 << (share + (axis >= axes - more)) for axis in range(axes)]
