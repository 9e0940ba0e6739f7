"""Linear attention, queries, where parts of a state fade each by itself: keys that not all of a tile see are met one by one."""

import triton
import triton.language as tl
from apart import added, faded, logs, paired
from tiles import numbered, piece, products, rows, state_of

# <constants>
DIM, VALUE_DIM = tl.constexpr(64), tl.constexpr(64)  # numbers of a query or a key, and of a value
WIDTH, VALUE_WIDTH = tl.constexpr(64), tl.constexpr(64)  # of which so many are at work at once: a power of two
SEGMENT = tl.constexpr(256)  # keys between two states
PRECISION = tl.constexpr("ieee")
ROWS_FADE, COLUMNS_FADE, BEHIND = True, False, False  # where columns fade, nobody asks for the sums of weights
# </constants>


@triton.jit
def meet(queries_at, now, then, turn, sums, of_row, masses, of_mass, first_value, acc, total):
    """Add what queries gather of a state, and their weights: rows of sums, and sums of keys, stand so far apart."""
    for first in tl.range(0, DIM, WIDTH):
        queries = piece(queries_at, first, DIM, WIDTH)
        if ROWS_FADE:
            queries = faded(queries, now, then, first, DIM, WIDTH).to(queries.dtype)
        d = tl.minimum(first + tl.arange(0, WIDTH), DIM - 1)  # beyond the last one queries are zero
        part = piece(sums + d[:, None] * of_row, first_value, VALUE_DIM, VALUE_WIDTH)
        acc = tl.dot(queries, part.to(queries.dtype), acc, input_precision=PRECISION)
        total += products(queries, tl.load(masses + d[None, :] * of_mass))
    if COLUMNS_FADE:
        acc = faded(acc, turn, then, first_value, VALUE_DIM, VALUE_WIDTH)
    return acc, total


@triton.jit
def scored(queries_at, now, keys_at, at_keys, turn, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """The products of queries and keys; where rows fade, of what is left of keys at a turn, and of that up to the queries."""
    score = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    for first in tl.range(0, DIM, WIDTH):
        queries, keys = piece(queries_at, first, DIM, WIDTH), piece(keys_at, first, DIM, WIDTH)
        if ROWS_FADE:
            queries = faded(queries, now, turn, first, DIM, WIDTH).to(queries.dtype)
            keys = faded(keys, turn, at_keys, first, DIM, WIDTH).to(keys.dtype)
        score = tl.dot(queries, keys.T, score, input_precision=PRECISION)
    return score


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
    # What all of a tile see fades up to the last key of that, and from there on: so nothing grows on the way.
    stop = tl.minimum(tl.maximum(tile * BLOCK_Q + offset + 1, 0), k_len)
    segments = stop // SEGMENT
    start, later = segments * SEGMENT, tl.minimum(tl.maximum((tile + 1) * BLOCK_Q + offset, 0), k_len)
    now, turn = logs(at_query, b, h, i), logs(at_key, b, h, tl.maximum(stop - 1, 0))

    acc, total = tl.zeros([BLOCK_Q, VALUE_WIDTH], tl.float32), tl.zeros([BLOCK_Q, 1], tl.float32)
    if BEHIND:
        state, then = rows(past, b, h // sharing[4], 0), logs(before, b, h, 0)
        acc, total = meet(queries_at, now, then, turn, state, past[3], state + VALUE_DIM, past[3], first_value, acc, total)
    if segments > 0:
        head, then = (b * tl.num_programs(1) + h) // sharing[3], logs(at_key, b, h, start - 1)
        state = state_of(held, head, count, segments - 1, DIM * VALUE_DIM + DIM)
        masses = state + DIM * VALUE_DIM
        acc, total = meet(queries_at, now, then, turn, state, VALUE_DIM, masses, 1, first_value, acc, total)
    for near in tl.range(start, stop, BLOCK_K):
        column = near + tl.arange(0, BLOCK_K)[None, :]
        j = tl.minimum(column, k_len - 1).T
        score = scored(queries_at, now, rows(k, b, h // sharing[1], j), logs(at_key, b, h, j), turn, BLOCK_Q, BLOCK_K)
        weight = tl.where(column < stop, score, 0.0)
        total += tl.sum(weight, 1, keep_dims=True)
        values = piece(rows(v, b, h // sharing[2], j), first_value, VALUE_DIM, VALUE_WIDTH)
        if COLUMNS_FADE:
            values = faded(values, turn, logs(at_key, b, h, j), first_value, VALUE_DIM, VALUE_WIDTH).to(values.dtype)
        acc = tl.dot(weight.to(values.dtype), values, acc, input_precision=PRECISION)
    # Of the keys that some of a tile see, and some do not, none is later than all: each fades up to each query.
    column = stop + tl.arange(0, BLOCK_Q)[None, :]
    j = tl.minimum(column, k_len - 1).T
    if ROWS_FADE:
        score = paired(queries_at, now, k, at_key, b, h, h // sharing[1], stop, later, DIM, WIDTH, BLOCK_Q)
        weight = tl.where(column <= i + offset, score, 0.0)
        total += tl.sum(weight, 1, keep_dims=True)
        values = piece(rows(v, b, h // sharing[2], j), first_value, VALUE_DIM, VALUE_WIDTH)
        acc = tl.dot(weight.to(values.dtype), values, acc, input_precision=PRECISION)
    if COLUMNS_FADE:
        score = scored(queries_at, now, rows(k, b, h // sharing[1], j), now, turn, BLOCK_Q, BLOCK_Q)
        weight, acc = tl.where(column <= i + offset, score, 0.0), faded(acc, now, turn, first_value, VALUE_DIM, VALUE_WIDTH)
        acc = added(acc, weight, now, v, at_key, b, h, h // sharing[2], stop, later, first_value, VALUE_DIM, VALUE_WIDTH)
    tl.store(rows(out, b, h, i) + e, acc, mask=(row < q_len) & (e < VALUE_DIM))
    if ROWS_FADE:
        if first_value == 0:
            query, _ = numbered(b, h, i, tl.num_programs(1), q_len)
            tl.store(mass + query, total, mask=row < q_len)
