"""The gradients of tables that are read by distance: one program owns tiles whose queries are equally far ahead of their keys.

What stands at one place of such tiles has one distance, so their shares are added up as they are, and then along diagonals.
"""

import triton
import triton.language as tl
from tiles import add, diagonals, draw, dropped, key_word, norm, numbered, query_words, read, rows, take

# <constants>
DIM, VALUE_DIM = tl.constexpr(64), tl.constexpr(64)  # numbers of a query or a key, and of a value
WIDTH, VALUE_WIDTH = tl.constexpr(64), tl.constexpr(64)  # the same, up to a power of two
INFINITY, LN2 = tl.constexpr(float("inf")), tl.constexpr(0.6931471805599453)
DROPPED = tl.constexpr(429496730)
TILES = tl.constexpr(32)
BY_PEAK = DROPS = NORMED = False
# </constants>


@triton.jit(do_not_specialize=["q_len", "k_len", "layer", "first_query", "first_key", "least"])
def backward(
    q, k, v, above, numbers, members, tables, sums,
    heads, kv_heads, q_len, k_len, layer, layers, first_query, first_key, least, BLOCK: tl.constexpr,
):  # fmt: skip
    """Tiles are squares of BLOCK tokens; in the first programs queries are `least` tiles ahead of keys."""
    # <tables>
    pieces = tl.cdiv(tl.cdiv(q_len, BLOCK), TILES)
    lead, first = least + tl.program_id(0) // pieces, tl.program_id(0) % pieces * TILES
    h, b = tl.load(members + tl.program_id(1)), tl.program_id(2)
    kv = h // (heads // kv_heads)
    # <per head>
    if DROPS:
        drawn = draw(tables[0], b * heads + h)  # <drawn>
    summed = tl.zeros([BLOCK, BLOCK], tl.float32)  # <start>
    stop = tl.minimum(tl.cdiv(q_len, BLOCK), tl.cdiv(k_len, BLOCK) + lead)
    for tile in tl.range(tl.maximum(first, lead), tl.minimum(first + TILES, stop)):
        row = tile * BLOCK + tl.arange(0, BLOCK)[:, None]
        column = (tile - lead) * BLOCK + tl.arange(0, BLOCK)[None, :]
        i, j = tl.minimum(row, q_len - 1), tl.minimum(column, k_len - 1)
        query, count = numbered(b, h, i, heads, q_len)
        if NORMED:
            queries, keys = take(rows(q, b, h, i), DIM, WIDTH), take(rows(k, b, kv, j.T), DIM, WIDTH)
        # <per query>
        # <per key>
        visible = (row < q_len) & (column < k_len)  # <visible>
        if tl.max(tl.max(tl.cast(visible, tl.int32), 1), 0) != 0:
            queries, of_out = take(rows(q, b, h, i), DIM, WIDTH), take(rows(above, b, h, i), VALUE_DIM, VALUE_WIDTH)
            keys, values = take(rows(k, b, kv, j.T), DIM, WIDTH), take(rows(v, b, kv, j.T), VALUE_DIM, VALUE_WIDTH)
            base, factor = tl.load(numbers + query), tl.load(numbers + count + query)
            pull = tl.load(numbers + 2 * count + query)
            dot = tl.dot(queries, keys.T, input_precision="ieee")
            score = dot * 0.125  # <score>
            score = tl.where(visible, score, -INFINITY)
            along_value = tl.dot(of_out, values.T, input_precision="ieee")
            if DROPS:
                along_value = tl.where(dropped(query_words(drawn, i), key_word(drawn, j), DROPPED), 0.0, along_value)
            of_weight = along_value * factor + pull
            weight, of_score = tl.exp2(score - base), of_weight * tl.exp2(score - base)  # <score gradient>
            # <pair sums>
            share = of_score * weight
            summed += tl.where(visible, share, 0.0)
            # </pair sums>
    # <sums>
    ahead, total = diagonals(summed, BLOCK)
    distance = lead * BLOCK + first_query - first_key + ahead
    add(sums[0], (distance,), total)
    # </sums>
