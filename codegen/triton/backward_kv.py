"""The gradients of k and v, and those of tables in scores and weights: one program owns a tile of keys of one head."""

import triton
import triton.language as tl
from tiles import add, draw, dropped, give, key_word, norm, numbered, outward, query_words, read, rows, take

# <constants>
DIM, VALUE_DIM = tl.constexpr(64), tl.constexpr(64)  # numbers of a query or a key, and of a value
WIDTH, VALUE_WIDTH = tl.constexpr(64), tl.constexpr(64)  # the same, up to a power of two
PHASES, STRETCHES = tl.constexpr(2), tl.constexpr(1)
INFINITY, LN2 = tl.constexpr(float("inf")), tl.constexpr(0.6931471805599453)
DROPPED = tl.constexpr(429496730)
BY_PEAK = DROPS = ORDERED = NORMED = False
# </constants>


@triton.jit(do_not_specialize=["q_len", "k_len", "layer", "first_query", "first_key"])
def backward(
    q, k, v, above, of_k, of_v, numbers, visits, tables, sums,
    heads, kv_heads, q_len, k_len, layer, layers, first_query, first_key, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The heads that share the keys come one after the other; `numbers` are what the other kernel found for each query."""
    members, schedule_of, every_met, listed, k_order, q_order, owners, starts, unseeing = visits
    # <tables>
    tile, b = tl.program_id(0), tl.program_id(2)
    kv = tl.load(owners + tl.program_id(1))
    row = tile * BLOCK_K + tl.arange(0, BLOCK_K)[:, None]  # keys are the rows of a tile, queries the columns
    j = tl.minimum(row, k_len - 1)
    if ORDERED:
        j = tl.load(k_order + j)
    keys, values = take(rows(k, b, kv, j), DIM, WIDTH), take(rows(v, b, kv, j), VALUE_DIM, VALUE_WIDTH)
    acc_k, acc_v = tl.zeros([BLOCK_K, WIDTH], tl.float32), tl.zeros([BLOCK_K, VALUE_WIDTH], tl.float32)
    of_norm = tl.zeros([BLOCK_K, 1], tl.float32)
    for member in tl.range(tl.load(starts + tl.program_id(1)), tl.load(starts + tl.program_id(1) + 1)):
        h = tl.load(members + member)
        schedule = tl.load(schedule_of + b * tl.load(starts + tl.num_programs(1)) + member)
        met = every_met + (schedule * tl.num_programs(0) + tile) * (4 * STRETCHES)
        # <per head>
        # <per key>
        if DROPS:
            drawn = draw(tables[0], b * heads + h)  # <drawn>
            word = key_word(drawn, j)
        for phase in tl.static_range(PHASES):  # tiles with hidden pairs; tiles without; all, for queries that saw no key
            steps = tl.cdiv(q_len, BLOCK_Q)  # <steps>
            for step in tl.range(0, steps):
                other = step  # <other tile>
                column = other * BLOCK_Q + tl.arange(0, BLOCK_Q)[None, :]
                i = column if phase == 1 else tl.minimum(column, q_len - 1)
                if ORDERED:
                    i = tl.load(q_order + i)
                queries, of_out = take(rows(q, b, h, i.T), DIM, WIDTH), take(rows(above, b, h, i.T), VALUE_DIM, VALUE_WIDTH)
                query, count = numbered(b, h, i, heads, q_len)
                base, factor = tl.load(numbers + query), tl.load(numbers + count + query)
                pull = tl.load(numbers + 2 * count + query)
                # <per query>
                dot = tl.dot(keys, queries.T, input_precision="ieee")
                score = dot * 0.125  # <score>
                if phase != 1:
                    visible = column < q_len  # <visible>
                    score = tl.where(visible, score, -INFINITY)
                along_value = tl.dot(values, of_out.T, input_precision="ieee")
                if DROPS:
                    factor = tl.where(dropped(query_words(drawn, i), word, DROPPED), 0.0, factor)
                of_weight = along_value * factor + pull
                weight, of_score = tl.exp2(score - base), of_weight * tl.exp2(score - base)  # <score gradient>
                acc_v = tl.dot((weight * factor).to(of_out.dtype), of_out, acc_v, input_precision="ieee")
                of_dot = of_score * 0.125  # <dot gradient>
                acc_k = tl.dot(of_dot.to(queries.dtype), queries, acc_k, input_precision="ieee")
                if NORMED:
                    of_norm += of_score  # <norm gradient>
                inside = (row < k_len) & (column < q_len)
                # <pair sums>
    if NORMED:
        acc_k += outward(of_norm, keys)
    give(rows(of_k, b, kv, j), acc_k, row < k_len, DIM, WIDTH)
    give(rows(of_v, b, kv, j), acc_v, row < k_len, VALUE_DIM, VALUE_WIDTH)
