"""Attention: one program owns a tile of queries of one head, and meets the tiles of keys that these may see."""

import triton
import triton.language as tl
from tiles import (
    absorb,
    collect,
    draw,
    dropped,
    give,
    key_word,
    norm,
    note,
    numbered,
    query_words,
    read,
    rows,
    take,
    task,
    untouched,
)

# <constants>
DIM, VALUE_DIM = tl.constexpr(64), tl.constexpr(64)  # numbers of a query or a key, and of a value
WIDTH, VALUE_WIDTH = tl.constexpr(64), tl.constexpr(64)  # the same, up to a power of two
PHASES, STRETCHES = tl.constexpr(2), tl.constexpr(1)
INFINITY, LN2 = tl.constexpr(float("inf")), tl.constexpr(0.6931471805599453)
DROPPED = tl.constexpr(429496730)
BY_PEAK = DROPS = MEAN = ORDERED = False
# </constants>


@triton.jit(do_not_specialize=["q_len", "k_len", "layer", "first_query", "first_key"])
def forward(
    q, k, v, out, totals, kept, visits, tables,
    heads, kv_heads, q_len, k_len, layer, layers, first_query, first_key, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Operands are a pointer and the strides of batch, heads and tokens.

    `totals` takes the log-sum-exp of each query, `kept` its peak and its mass, which gradients need; either may be None.
    After each tile `peak` is the largest score so far as a power of two, `mass` the sum of weights 2 ** (score - peak),
    `acc` that of weight * v.
    """
    tile, b, h, kv, met = task(visits, heads // kv_heads, 4 * STRETCHES)
    listed, q_order, k_order = visits[3:]
    # <tables>
    # <per head>

    row = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)[:, None]  # queries are the rows of a tile, keys the columns
    i = tl.minimum(row, q_len - 1)
    if ORDERED:
        i = tl.load(q_order + i)
    queries = take(rows(q, b, h, i), DIM, WIDTH)
    # <per query>
    if DROPS:
        drawn = draw(tables[0], b * heads + h)  # <drawn>
        words = query_words(drawn, i)

    peak, mass, acc = untouched(BLOCK_Q, VALUE_WIDTH)
    for phase in tl.static_range(PHASES):  # tiles with hidden pairs; tiles without; all, for queries that saw no key
        steps, seen = tl.cdiv(k_len, BLOCK_K), False  # <steps>
        for step in tl.range(0, steps):
            other = step  # <other tile>
            column = other * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
            j = column if phase == 1 else tl.minimum(column, k_len - 1)
            if ORDERED:
                j = tl.load(k_order + j)
            keys, values = take(rows(k, b, kv, j.T), DIM, WIDTH), take(rows(v, b, kv, j.T), VALUE_DIM, VALUE_WIDTH)
            # <per key>
            dot = tl.dot(queries, keys.T, input_precision="ieee")  # <dot>
            score = dot * 0.125  # <score>
            if phase != 1:
                visible = (column < k_len) & ~seen  # <visible>
                score = tl.where(visible, score, -INFINITY)
            if BY_PEAK:
                weight, peak, mass, acc = absorb(score, peak, mass, acc)
            else:
                weight = score  # <weight>
                weight, peak, mass = collect(score, weight, peak, mass)
            if DROPS:
                gone = dropped(words, key_word(drawn, j), DROPPED)
                if MEAN:
                    gone = gone & (phase < 2)
                weight = tl.where(gone, 0.0, weight)
            acc = tl.dot(weight.to(values.dtype), values, acc, input_precision="ieee")  # <sum>
    seen, factor, total, filling = peak != -INFINITY, 1.0 / mass, peak * LN2 + tl.log(mass), 0.0  # <result>
    give(rows(out, b, h, i), tl.where(seen, acc * factor, filling), row < q_len, VALUE_DIM, VALUE_WIDTH)
    query, count = numbered(b, h, i, heads, q_len)
    note(totals, query, count, (total,), row < q_len)
    note(kept, query, count, (tl.where(seen, peak, -INFINITY), mass), row < q_len)
