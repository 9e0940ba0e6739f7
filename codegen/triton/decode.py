"""Attention of few queries: one program owns a slice of the keys, and meets it with all queries of the heads that share it.

Which keys these may see follows from the positions of the queries, when the kernel runs: some first ones, and those near.
"""

import triton
import triton.language as tl
from tiles import absorb, collect, give, norm, read, rows, some, take, within

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
    q, k, v, sums, peaks, masses, members, starts, owners, tables,
    heads, kv_heads, q_len, k_len, layer, layers, first_query, first_key, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """For each slice and query, `sums` take that of weight * v, `peaks` and `masses` the largest score and the sum of weights."""
    # <tables>
    number, group, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first, kv = tl.load(starts + group), tl.load(owners + group)
    last = (tl.load(starts + group + 1) - first) * q_len - 1
    # <per head>

    row = tl.arange(0, BLOCK_Q)[:, None]  # the queries of one head, then those of the next
    place = tl.minimum(row, last)
    h, i = tl.load(members + first + place // q_len), place % q_len
    queries = take(rows(q, b, h, i), DIM, WIDTH)
    # <per query>
    count = tl.cast(tl.num_programs(2) * heads, tl.int64) * q_len
    query = (tl.cast(b, tl.int64) * heads + h) * q_len + i

    if EVERY:
        # An earlier launch has found who sees no key: those meet all, in parts of their own.
        peak = tl.full([BLOCK_Q, 1], -INFINITY, tl.float32)
        for part in tl.range(0, tl.num_programs(0)):
            peak = tl.maximum(peak, tl.load(peaks + part * count + query))
        left = peak == -INFINITY
        start = tl.where(tl.max(tl.cast(left, tl.int32)) != 0, k_len, 0)
        split, reached = start, start
    else:
        position = i + first_query  # <position>
        position = tl.cast(position, tl.int64) - first_key
        split = within(tl.cast(FIRST_KEYS, tl.int64) - first_key, k_len)
        start = tl.maximum(split, within(tl.min(position) - FARTHEST, k_len))
        reached = split + tl.maximum(0, within(tl.max(position) - NEAREST + 1, k_len) - start)
    length = tl.cdiv(tl.cdiv(reached, tl.num_programs(0)), BLOCK_K) * BLOCK_K
    begin = number * length
    end = tl.minimum(begin + length, reached)

    peak = tl.full([BLOCK_Q, 1], -INFINITY, tl.float32)
    mass = tl.zeros([BLOCK_Q, 1], tl.float32)
    acc = tl.zeros([BLOCK_Q, VALUE_WIDTH], tl.float32)
    for step in tl.range(begin, end, BLOCK_K):
        column = step + tl.arange(0, BLOCK_K)[None, :]
        j = tl.minimum(tl.where(column < split, column, column - split + start), k_len - 1)
        # <per key>
        visible = column < end  # <visible>
        wanted = tl.max(tl.cast(visible, tl.int32), 0, keep_dims=True).T != 0  # what nobody sees is not read
        values = some(rows(v, b, kv, j.T), wanted, VALUE_DIM, VALUE_WIDTH)
        if MEAN:
            weight = tl.where(visible, 1.0, 0.0)
        else:
            keys = some(rows(k, b, kv, j.T), wanted, DIM, WIDTH)
            # <per pair>
            dot = tl.dot(queries, keys.T, input_precision="ieee")
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
