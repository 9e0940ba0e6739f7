"""The gradient of q, and those of tables in what is divided by: one program owns a tile of queries of one head.

With out = factor * sum of weight * v, above = the gradient of out and pull = (above · out) * d log factor / d mass, every
pair that sees each other has gradient of the weight = factor * (above · v) + pull, of the score = that * d weight / d score.
The gradient of the log-sum-exp, where there is one, is a further summand of pull.
"""

import triton
import triton.language as tl
from tiles import (
    add,
    draw,
    dropped,
    give,
    key_word,
    norm,
    note,
    noted,
    numbered,
    outward,
    products,
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
BY_PEAK = DROPS = FILLS = ORDERED = NORMED = False
# </constants>


@triton.jit(do_not_specialize=["q_len", "k_len", "layer", "first_query", "first_key"])
def backward(
    q, k, v, out, above, of_q, of_totals, kept, numbers, visits, tables, sums,
    heads, kv_heads, q_len, k_len, layer, layers, first_query, first_key, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`kept` are the peak and the mass of each query; `numbers` take its peak, factor, pull and whether it saw no key."""
    tile, b, h, kv, met = task(visits, heads // kv_heads, 4 * STRETCHES)
    listed, q_order, k_order = visits[3:]
    # <tables>
    # <per head>
    row = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)[:, None]  # queries are the rows of a tile, keys the columns
    i = tl.minimum(row, q_len - 1)
    if ORDERED:
        i = tl.load(q_order + i)
    queries, of_out = take(rows(q, b, h, i), DIM, WIDTH), take(rows(above, b, h, i), VALUE_DIM, VALUE_WIDTH)
    # <per query>
    if DROPS:
        drawn = draw(tables[0], b * heads + h)  # <drawn>
        words = query_words(drawn, i)
    query, count = numbered(b, h, i, heads, q_len)
    peak, mass = tl.load(kept + query), tl.load(kept + count + query)
    saw, inside = peak != -INFINITY, row < q_len
    along = tl.where(saw, products(take(rows(out, b, h, i), VALUE_DIM, VALUE_WIDTH), of_out), 0.0)
    of_total = tl.where(saw, noted(of_totals, query), 0.0)
    factor, pull = 1.0 / mass, -along / mass  # <numbers>
    factor, base = tl.where(saw, factor, 0.0), tl.where(saw, peak, 0.0)
    note(numbers, query, count, (base, factor, pull), inside)
    # <query sums>

    highest, of_norm, acc = untouched(BLOCK_Q, WIDTH)
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
            dot = tl.dot(queries, keys.T, input_precision="ieee")
            score = dot * 0.125  # <score>
            if phase != 1:
                visible = (column < k_len) & ~seen  # <visible>
                score = tl.where(visible, score, -INFINITY)
            if FILLS:
                highest = tl.maximum(highest, tl.max(score, 1, keep_dims=True))
            along_value = tl.dot(of_out, values.T, input_precision="ieee")
            if DROPS:
                along_value = tl.where(dropped(words, key_word(drawn, j), DROPPED), 0.0, along_value)
            of_weight = along_value * factor + pull
            of_score = of_weight * tl.exp2(score - base)  # <score gradient>
            of_dot = of_score * 0.125  # <dot gradient>
            acc = tl.dot(of_dot.to(keys.dtype), keys, acc, input_precision="ieee")
            if NORMED:
                of_norm += of_score  # <norm gradient>
    if FILLS:
        note(numbers + 3 * count, query, count, (tl.where(seen, 0.0, 1.0),), inside)
    if NORMED:
        acc += outward(of_norm, queries)
    give(rows(of_q, b, h, i), acc, inside, DIM, WIDTH)
