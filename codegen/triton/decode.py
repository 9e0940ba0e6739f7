"""Attention of few queries: one program owns a slice of the keys, and meets it with all queries of the heads that share it.

Which keys these may see follows from the positions of the queries, when the kernel runs: some first ones, and those near; and
from tables, of which another kernel has found out between which tiles of keys all stand that are seen in a row of the batch.
"""

import triton
import triton.language as tl
from tiles import absorb, between, collect, give, highest, norm, note, numbered, reached, read, rows, some, take, untouched

# <constants>
DIM, VALUE_DIM = tl.constexpr(64), tl.constexpr(64)  # numbers of a query or a key, and of a value
WIDTH, VALUE_WIDTH = tl.constexpr(64), tl.constexpr(64)  # the same, up to a power of two
NEAREST, FARTHEST = tl.constexpr(0), tl.constexpr(1023)  # how far behind a query the keys stand that it may see
FIRST_KEYS = tl.constexpr(4)  # positions below, which may be seen from anywhere
INFINITY, LN2 = tl.constexpr(float("inf")), tl.constexpr(0.6931471805599453)
BY_PEAK = EVERY = MEAN = False
# </constants>


@triton.jit(do_not_specialize=["q_len", "k_len", "layer", "first_query", "first_key"])
def decode(
    q, k, v, sums, peaks, masses, members, starts, owners, limits, tables,
    heads, kv_heads, q_len, k_len, layer, layers, first_query, first_key, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """For each slice and query, `sums` take that of weight * v, `peaks` and `masses` the largest score and the sum of weights."""
    # <tables>
    number, group, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, kv = tl.load(starts + group), tl.load(owners + group)
    last = (tl.load(starts + group + 1) - start) * q_len - 1
    # <per head>

    row = tl.arange(0, BLOCK_Q)[:, None]  # the queries of one head, then those of the next
    place = tl.minimum(row, last)
    h, i = tl.load(members + start + place // q_len), place % q_len
    queries = take(rows(q, b, h, i), DIM, WIDTH)
    # <per query>
    query, count = numbered(b, h, i, heads, q_len)
    peak, mass, acc = untouched(BLOCK_Q, VALUE_WIDTH)

    if EVERY:
        # An earlier launch has found who sees no key: those meet all, in parts of their own.
        left = highest(peaks, count, query, tl.num_programs(0)) == -INFINITY
        start = tl.where(tl.max(tl.cast(left, tl.int32)) != 0, k_len, 0)
        gone, split, met = 0, start, start
    else:
        position = i + first_query  # <position>
        position, first = tl.cast(position, tl.int64) - first_key, tl.cast(FIRST_KEYS, tl.int64) - first_key
        split, start, met = reached(position, first, k_len, NEAREST, FARTHEST)
        gone, split, start, met = between(limits, b, split, start, met, BLOCK_K)
    length = tl.cdiv(tl.cdiv(met, tl.num_programs(0)), BLOCK_K) * BLOCK_K
    begin = number * length
    end = tl.minimum(begin + length, met)

    for step in tl.range(begin, end, BLOCK_K):
        column = step + tl.arange(0, BLOCK_K)[None, :]
        j = tl.minimum(tl.where(column < split, column + gone, column - split + start), k_len - 1)
        # <per key>
        visible = column < end  # <visible>
        wanted = tl.max(tl.cast(visible, tl.int32), 0, keep_dims=True).T != 0  # what nobody sees is not read
        values = some(rows(v, b, kv, j.T), wanted, VALUE_DIM, VALUE_WIDTH)  # <values>
        if MEAN:
            weight = tl.where(visible, 1.0, 0.0)
        else:
            keys = some(rows(k, b, kv, j.T), wanted, DIM, WIDTH)  # <keys>
            # <per pair>
            dot = tl.dot(queries, keys.T, input_precision="ieee")  # <dot>
            score = dot * 0.125  # <score>
            score = tl.where(visible, score, -INFINITY)
            if BY_PEAK:
                weight, peak, mass, acc = absorb(score, peak, mass, acc)
            else:
                weight = score  # <weight>
                weight, peak, mass = collect(score, weight, peak, mass)
        acc = tl.dot(weight.to(values.dtype), values, acc, input_precision="ieee")
    found = number * count + query
    if EVERY:
        found += tl.num_programs(0) * count
    tl.store(peaks + found, peak, mask=row <= last)
    tl.store(masses + found, mass, mask=row <= last)
    give(sums + found * VALUE_DIM, acc, row <= last, VALUE_DIM, VALUE_WIDTH)
