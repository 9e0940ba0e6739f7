"""Where queries stand, what rows get that see nothing, and what parts are called."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional as F

from attn_compiler import torch_private as private
from attn_compiler.algebra.expr import Expr, i, k, k_len, q, q_len, score
from attn_compiler.algebra.simplify import simplify
from attn_compiler.algebra.variant import EmptyRows
from attn_compiler.graph.capture import capture
from attn_compiler.graph.frame import first_key, frame, kind, phase, restated
from attn_compiler.graph.match import match
from attn_compiler.graph.record import GraphSite
from attn_compiler.graph.recover import Recovered, recover
from attn_compiler.graph.sliding import slides
from attn_compiler.graph.symbolic import SymbolicReader
from attn_compiler.planning.classify import classify
from attn_compiler.planning.plan import Refusal
from attn_compiler.planning.site import Frame, Kind, Phase

BATCH, HEADS, TOKENS, WIDTH = 2, 2, 6, 8
x = torch.randn(BATCH, TOKENS, HEADS * WIDTH)
projection = torch.nn.Linear(HEADS * WIDTH, HEADS * WIDTH)
ONE = torch.zeros(BATCH, 1, HEADS * WIDTH)
LOWEST = torch.finfo(torch.float32).min


def split(y: Tensor) -> Tensor:
    return y.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2)


def one_site(
    function: Callable[..., Tensor | tuple[Tensor, ...]], *args: Tensor
) -> tuple[GraphSite, Recovered | Refusal, Frame | None]:
    found: list[tuple[GraphSite, Recovered | Refusal, Frame | None]] = []

    def backend(gm: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        graph = capture(gm, examples)
        reader = SymbolicReader(graph)
        for site in match(graph).sites:
            result = recover(graph, site, reader)
            found.append((site, result, frame(site, result, reader) if isinstance(result, Recovered) else None))
        return gm.forward

    torch.compiler.reset()
    with torch.no_grad():
        torch.compile(function, backend=backend, dynamic=False)(*args)
    (result,) = found
    return result


def recovered(function: Callable[..., Tensor], *args: Tensor) -> tuple[GraphSite, Recovered, Frame | None]:
    site, result, where = one_site(function, *args)
    assert isinstance(result, Recovered), result
    return site, result, where


def masked(mask: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Attention whose raw scores go through `mask`."""

    def attention(y: Tensor) -> Tensor:
        query = split(projection(y))
        result: Tensor = mask(query @ query.mT).softmax(-1) @ query
        return result

    return attention


def hidden(size: int = TOKENS) -> Tensor:
    return torch.ones(size, size, dtype=torch.bool).triu(1)


def test_a_causal_mask_says_where_queries_stand() -> None:
    _, found, where = recovered(masked(lambda s: s.masked_fill(hidden(), -torch.inf)), x)
    assert found.variant.mask == simplify(k <= i)
    assert where == Frame(i, "the causal mask")
    assert restated(found.variant, where).mask == simplify(k <= q)


def test_keys_appended_to_a_cache_put_the_last_query_at_the_last_key() -> None:
    def decode(y: Tensor, past: Tensor, mask: Tensor) -> Tensor:
        query = split(projection(y))
        key = torch.cat([past, query], 2)
        return F.scaled_dot_product_attention(query, key, key, attn_mask=mask)

    past, mask = torch.randn(BATCH, HEADS, 9, WIDTH), torch.ones(BATCH, 1, 1, 10, dtype=torch.bool)
    site, found, where = recovered(decode, ONE, past, mask)
    assert where is not None
    assert simplify(where.position) == simplify(i + (k_len - q_len))
    graph = site.q.node.graph
    assert phase(site, private.recorded(graph)) is Phase.TRAIN
    with torch.no_grad():
        assert phase(site, private.recorded(graph)) is Phase.DECODE
    assert [part.name for part in classify(found.variant.mask, found.variant.score, found.facts)] == ["padding"]


def test_a_cache_that_keeps_only_its_newest_keys_slides() -> None:
    """A key's place there is no position."""

    def decode(keeps: slice, reads: slice) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        def attention(y: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
            query = split(projection(y))
            whole = torch.cat([past, query], 2)
            key = whole[:, :, reads].repeat_interleave(1, 1)
            return F.scaled_dot_product_attention(query, key, key), whole[:, :, keeps]

        return attention

    every, newest, oldest = slice(None), slice(-9, None), slice(0, 9)
    cases = [(every, every, False), (newest, every, True), (every, newest, True), (oldest, every, False)]
    for keeps, reads, expected in cases:
        site, _, _ = one_site(decode(keeps, reads), ONE, torch.randn(BATCH, HEADS, 9, WIDTH))
        assert slides(site) is expected


def test_a_static_cache_is_read_at_the_given_places() -> None:
    def decode(y: Tensor, cache: Tensor, places: Tensor, mask: Tensor) -> Tensor:
        query = split(projection(y))
        cache.index_copy_(2, places, query)
        return F.scaled_dot_product_attention(query, cache, cache, attn_mask=mask)

    cache, mask = torch.randn(BATCH, HEADS, 9, WIDTH), torch.ones(BATCH, 1, 1, 9, dtype=torch.bool)
    _, _, where = recovered(decode, ONE, cache, torch.tensor([4]), mask)
    assert where is not None
    assert where.position.op == "table"


def rolled(cache: Tensor, new: Tensor) -> Tensor:
    keys = cache.roll(-1, dims=2)
    keys[:, :, torch.tensor([-1])] = new
    return keys


def rolled_and_copied(cache: Tensor, new: Tensor) -> Tensor:
    return cache.copy_(rolled(cache, new))


def rolled_in_place(cache: Tensor, new: Tensor) -> Tensor:
    cache.copy_(cache.roll(-1, dims=2))
    cache[:, :, torch.tensor([-1])] = new
    return cache


@pytest.mark.parametrize("update", [rolled, rolled_and_copied, rolled_in_place])
def test_a_static_cache_that_rolls_says_nothing_of_positions(update: Callable[[Tensor, Tensor], Tensor]) -> None:
    def decode(y: Tensor, cache: Tensor, mask: Tensor) -> Tensor:
        query = split(projection(y))
        keys = update(cache, query)
        return F.scaled_dot_product_attention(query, keys, keys, attn_mask=mask)

    cache, mask = torch.randn(BATCH, HEADS, 9, WIDTH), torch.ones(BATCH, 1, 1, 9, dtype=torch.bool)
    _, _, where = recovered(decode, ONE, cache, mask)
    assert where is None


def test_other_tokens_stand_nowhere() -> None:
    def cross(y: Tensor, other: Tensor) -> Tensor:
        key = split(projection(other))
        return F.scaled_dot_product_attention(split(projection(y)), key, key)

    site, _, where = recovered(cross, x, torch.randn_like(x))
    assert where is None
    assert kind(site) is Kind.CROSS


def test_the_same_tokens_start_together() -> None:
    site, _, where = recovered(masked(lambda s: s * 0.5), x)
    assert where is not None
    assert where.position == i
    assert kind(site) is Kind.SELF


@pytest.mark.parametrize(
    "moved",
    [lambda y: (y[:, 1:], y[:, :-1]), lambda y: (y.roll(1, 1), y), lambda y: (y, y.flip(1))],
    ids=["cut", "rolled", "flipped"],
)
def test_tokens_that_are_moved_against_each_other_do_not_start_together(moved: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
    def attention(y: Tensor) -> Tensor:
        queries, keys = (split(projection(z)) for z in moved(y))
        return F.scaled_dot_product_attention(queries, keys, keys)

    assert recovered(attention, x)[2] is None


def test_tokens_that_are_moved_together_start_together() -> None:
    def rotated(y: Tensor) -> Tensor:
        first, rest = y[:, :, :1], y[:, :, 1:]  # a token for the class has no position
        return torch.cat([first, rest * torch.linspace(1, 2, WIDTH)], 2)

    def attention(y: Tensor) -> Tensor:
        value = split(projection(y))
        return F.scaled_dot_product_attention(rotated(split(projection(y))), rotated(value), value)

    site, _, where = recovered(attention, x)
    assert where == Frame(i, "queries and keys are the same tokens")
    assert kind(site) is Kind.SELF


def test_two_streams_one_behind_the_other_are_joint() -> None:
    def attention(y: Tensor, other: Tensor) -> Tensor:
        query = torch.cat([split(projection(other)), split(projection(y))], 2)
        return F.scaled_dot_product_attention(query, query * 0.5, query)

    site, _, where = recovered(attention, x, torch.randn_like(x))
    assert kind(site) is Kind.JOINT
    assert where == Frame(i, "queries and keys are the same tokens")


def test_queries_that_are_parameters_pool() -> None:
    class Pool(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.probe = torch.nn.Parameter(torch.randn(BATCH, 1, HEADS * WIDTH))
            self.projection = projection

        def forward(self, y: Tensor) -> Tensor:
            key = split(self.projection(y))
            return F.scaled_dot_product_attention(split(self.projection(self.probe)), key, key)

    site, _, where = recovered(Pool(), x)
    assert kind(site) is Kind.POOL
    assert where is None


def test_padding_gives_the_table_to_count_from() -> None:
    valid = torch.ones(BATCH, TOKENS, dtype=torch.long)

    def attention(y: Tensor, valid: Tensor) -> Tensor:
        query = split(projection(y))
        return F.scaled_dot_product_attention(query, query, query, attn_mask=(valid != 0)[:, None, None, :])

    site, found, _ = recovered(attention, x, valid)
    padding = first_key(site, found.variant.mask)
    assert padding is not None
    assert padding.valid == found.variant.mask


def padded(fill: float, added: bool) -> Callable[[Tensor, Tensor], Tensor]:
    def attention(y: Tensor, valid: Tensor) -> Tensor:
        query = split(projection(y))
        bias = torch.where(valid[:, None, None, :] != 0, 0.0, fill)
        scores = query @ query.mT
        scores = scores + bias if added else torch.where(valid[:, None, None, :] != 0, scores, fill)
        result: Tensor = scores.softmax(-1) @ query
        return result

    return attention


@pytest.mark.parametrize(
    ("fill", "added", "rows"),
    [
        (LOWEST, True, EmptyRows.MEAN),
        (LOWEST, False, EmptyRows.MEAN),
        (-1e4, True, EmptyRows.UNMASKED),
        (-1e4, False, EmptyRows.MEAN),
        (-torch.inf, True, EmptyRows.NAN),
    ],
)
def test_a_fill_decides_what_empty_rows_get(fill: float, added: bool, rows: EmptyRows) -> None:
    _, found, _ = recovered(padded(fill, added), x, torch.ones(BATCH, TOKENS, dtype=torch.long))
    assert found.variant.empty_rows is rows
    assert not found.notes


def test_a_small_penalty_is_a_bias() -> None:
    _, found, _ = recovered(masked(lambda s: s + torch.where(hidden(), -100.0, 0.0)), x)
    assert found.variant.mask.is_const
    assert found.variant.score.mentions(score, i, k)


def test_a_mask_of_products_is_a_mask() -> None:
    def gpt1(s: Tensor) -> Tensor:
        seen = torch.ones(TOKENS, TOKENS).tril()
        return s * 0.25 * seen + -1e4 * (1 - seen)

    _, found, _ = recovered(masked(gpt1), x)
    assert (found.variant.mask, found.variant.score) == (simplify(k <= i), score)


def test_two_fills_whose_empty_rows_are_no_one_thing_are_refused() -> None:
    def attention(y: Tensor, valid: Tensor) -> Tensor:
        query = split(projection(y))
        bias = torch.where(valid[:, None, None, :] != 0, 0.0, -1e4)
        scores = (query @ query.mT + bias).masked_fill(hidden(), LOWEST)
        result: Tensor = scores.softmax(-1) @ query
        return result

    _, found, _ = one_site(attention, x, torch.ones(BATCH, TOKENS, dtype=torch.long))
    assert isinstance(found, Refusal)


def names(e: Expr, found: Recovered) -> list[str]:
    return [part.name for part in classify(e, found.variant.score, found.facts)]


def test_windows_and_chunks_are_named() -> None:
    def rule(s: Tensor) -> Tensor:
        at = torch.arange(TOKENS)
        query, key = at[:, None], at[None, :]
        seen = (key <= query) & (query - key < 3) & (query // 2 == key // 2)
        return torch.where(seen, s, -torch.inf)

    _, found, _ = recovered(masked(rule), x)
    assert set(names(found.variant.mask, found)) == {"causal", "window(3)", "chunks(2)"}


def room_of(end: int, at: int, *, again: bool = False) -> Callable[[Tensor, Tensor], Tensor]:
    """One query beside the front of a tensor, up to `end`, which was written at `at`, perhaps elsewhere afterwards."""

    def attention(token: Tensor, room: Tensor) -> Tensor:
        new = split(projection(token))
        room[:, :, at : at + 1] = new
        if again:
            room[:, :, 0:1] = new
        front = room[:, :, :end]
        result: Tensor = F.scaled_dot_product_attention(new, front, front)
        return result

    return attention


def test_queries_are_the_latest_keys_where_the_front_of_a_tensor_ends_with_what_was_written_last() -> None:
    room = torch.zeros(BATCH, HEADS, 9, WIDTH)
    site, _, found = recovered(room_of(5, 4), ONE, room)
    assert found == Frame(i + (k_len - q_len), "the cache that new keys are written behind")
    assert kind(site) is Kind.SELF
    for elsewhere in (room_of(5, 3), room_of(5, 5), room_of(5, 4, again=True)):
        assert recovered(elsewhere, ONE, room)[2] is None
