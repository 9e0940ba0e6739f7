"""Attention as Hopper likes it: some warps of a program do nothing but copy tiles of keys, while the others multiply them.

Triton divides the warps where there is one loop without branches and descriptors say what is copied; rows beyond the last
token are copied as zeros.
"""

import triton
import triton.language as tl
from tiles import absorb, collect, described, norm, note, numbered, read, task, untouched

# <constants>
DIM, VALUE_DIM = tl.constexpr(64), tl.constexpr(64)  # numbers of a query or a key, and of a value
WIDTH, VALUE_WIDTH = tl.constexpr(64), tl.constexpr(64)  # the same, up to a power of two
STRETCHES = tl.constexpr(1)
INFINITY, LN2 = tl.constexpr(float("inf")), tl.constexpr(0.6931471805599453)
BY_PEAK = False
# </constants>


@triton.jit(do_not_specialize=["q_len", "k_len", "layer", "first_query", "first_key"])
def forward(
    q, k, v, out, totals, kept, visits, tables,
    heads, kv_heads, q_len, k_len, layer, layers, first_query, first_key, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Arguments, `peak`, `mass` and `acc` are those of the kernel with a loop for tiles with hidden pairs, and one for others."""
    tile, b, h, kv, met = task(visits, heads // kv_heads, 4 * STRETCHES)
    # <tables>
    # <per head>

    row = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)[:, None]  # queries are the rows of a tile, keys the columns
    i = tl.minimum(row, q_len - 1)
    queries = described(q, b, h, q_len, DIM, BLOCK_Q, WIDTH).load([tile * BLOCK_Q, 0])
    # <per query>

    all_keys, all_values = (
        described(k, b, kv, k_len, DIM, BLOCK_K, WIDTH),
        described(v, b, kv, k_len, VALUE_DIM, BLOCK_K, VALUE_WIDTH),
    )
    peak, mass, acc = untouched(BLOCK_Q, VALUE_WIDTH)
    steps = tl.cdiv(k_len, BLOCK_K)  # <steps>
    for step in tl.range(0, steps, warp_specialize=True):
        other = step  # <other tile>
        column = other * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
        j = tl.minimum(column, k_len - 1)
        keys = all_keys.load([other * BLOCK_K, 0])
        # <per key>
        dot = tl.dot(queries, keys.T, input_precision="ieee")
        score = dot * 0.125  # <score>
        visible = column < k_len  # <visible>
        score = tl.where(visible, score, -INFINITY)
        if BY_PEAK:
            weight, peak, mass, acc = absorb(score, peak, mass, acc)
        else:
            weight = score  # <weight>
            weight, peak, mass = collect(score, weight, peak, mass)
        acc = tl.dot(weight.to(queries.dtype), all_values.load([other * BLOCK_K, 0]), acc, input_precision="ieee")
    seen, factor, total, filling = peak != -INFINITY, 1.0 / mass, peak * LN2 + tl.log(mass), 0.0  # <result>
    found = tl.where(seen, acc * factor, filling).to(queries.dtype)
    described(out, b, h, q_len, VALUE_DIM, BLOCK_Q, VALUE_WIDTH).store([tile * BLOCK_Q, 0], found)
    query, count = numbered(b, h, i, heads, q_len)
    note(totals, query, count, (total,), row < q_len)
    note(kept, query, count, (tl.where(seen, peak, -INFINITY), mass), row < q_len)
