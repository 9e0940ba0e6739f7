"""Linear attention, queries: one program owns a tile of them, which meets a state and then the keys that came after it."""

import triton
import triton.language as tl
from tiles import left, logged, numbered, piece, products, rows, state_of

# <constants>
DIM, VALUE_DIM = tl.constexpr(64), tl.constexpr(64)  # numbers of a query or a key, and of a value
WIDTH, VALUE_WIDTH = tl.constexpr(64), tl.constexpr(64)  # of which so many are at work at once: a power of two
SEGMENT = tl.constexpr(256)  # keys between two states
PRECISION = tl.constexpr("ieee")
FADES, BEHIND = False, False
# </constants>


@triton.jit
def meet(queries_at, sums, of_row, masses, of_mass, first_value, acc, total):
    """Add what queries gather of a state, and their weights: rows of sums, and sums of keys, stand so far apart."""
    for first in tl.range(0, DIM, WIDTH):
        queries = piece(queries_at, first, DIM, WIDTH)
        d = tl.minimum(first + tl.arange(0, WIDTH), DIM - 1)  # beyond the last one queries are zero
        part = piece(sums + d[:, None] * of_row, first_value, VALUE_DIM, VALUE_WIDTH)
        acc = tl.dot(queries, part.to(queries.dtype), acc, input_precision=PRECISION)
        total += products(queries, tl.load(masses + d[None, :] * of_mass))
    return acc, total


@triton.jit(do_not_specialize=["q_len", "k_len", "offset", "count"])
def gather(
    q, k, v, out, mass, held, at_query, at_key, past, before, sharing, q_len, k_len, offset, count,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Query i sees keys up to i + `offset`; `mass` takes the sum of its weights. The rest is said in `states`.

    `past` is a state of the tokens before the first key, if there is one: rows of sums, behind each that of the keys.
    """
    values_wide = tl.cdiv(VALUE_DIM, VALUE_WIDTH)
    tile, first_value = tl.program_id(0) // values_wide, tl.program_id(0) % values_wide * VALUE_WIDTH
    b, h = tl.program_id(2), tl.program_id(1)
    row = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)[:, None]  # queries are the rows of a tile, keys the columns
    i = tl.minimum(row, q_len - 1)
    queries_at, e = rows(q, b, h // sharing[0], i), first_value + tl.arange(0, VALUE_WIDTH)[None, :]
    # What all of a tile see of whole segments is one state; the keys behind them are met one by one.
    segments = tl.minimum(tl.maximum(tile * BLOCK_Q + offset + 1, 0), k_len) // SEGMENT
    start = segments * SEGMENT
    stop = tl.minimum(tl.maximum((tile + 1) * BLOCK_Q + offset, 0), k_len)
    if FADES:
        now = logged(at_query, b, h, i)

    acc, total = tl.zeros([BLOCK_Q, VALUE_WIDTH], tl.float32), tl.zeros([BLOCK_Q, 1], tl.float32)
    if BEHIND:
        state = rows(past, b, h // sharing[4], 0)
        acc, total = meet(queries_at, state, past[3], state + VALUE_DIM, past[3], first_value, acc, total)
        if FADES:
            then = logged(before, b, h, 0)
            kept = left(now, then)
            if segments > 0:  # up to the end of these; the rest is that of their state
                kept = left(logged(at_key, b, h, start - 1), then) + tl.zeros([BLOCK_Q, 1], tl.float32)
            acc, total = acc * kept, total * kept
    if segments > 0:
        heads = tl.num_programs(1) // sharing[3]
        state = state_of(held, b * heads + h // sharing[3], count, segments - 1, DIM * VALUE_DIM + DIM)
        acc, total = meet(queries_at, state, VALUE_DIM, state + DIM * VALUE_DIM, 1, first_value, acc, total)
        if FADES:
            kept = left(now, logged(at_key, b, h, start - 1))
            acc, total = acc * kept, total * kept
    for near in tl.range(start, stop, BLOCK_K):
        column = near + tl.arange(0, BLOCK_K)[None, :]
        j = tl.minimum(column, k_len - 1)
        keys_at = rows(k, b, h // sharing[1], j.T)
        score = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
        for first in tl.range(0, DIM, WIDTH):
            queries = piece(queries_at, first, DIM, WIDTH)
            keys = piece(keys_at, first, DIM, WIDTH)
            score = tl.dot(queries, keys.T, score, input_precision=PRECISION)
        if FADES:
            score *= left(now, logged(at_key, b, h, j))
        weight = tl.where((column <= i + offset) & (column < k_len), score, 0.0)
        total += tl.sum(weight, 1, keep_dims=True)
        values = piece(rows(v, b, h // sharing[2], j.T), first_value, VALUE_DIM, VALUE_WIDTH)
        acc = tl.dot(weight.to(values.dtype), values, acc, input_precision=PRECISION)
    tl.store(rows(out, b, h, i) + e, acc, mask=(row < q_len) & (e < VALUE_DIM))
    if first_value == 0:
        query, _ = numbered(b, h, i, tl.num_programs(1), q_len)
        tl.store(mass + query, total, mask=row < q_len)
