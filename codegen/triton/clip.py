"""What is visited, cut to what tables show: one program owns a tile, and asks of all others whether some pair sees each other.

Tables are known when kernels run, and on the device: the host waits for nothing.
"""

import triton
import triton.language as tl
from tiles import ends, extremes, put, read, tokens

# <constants>
DIM = tl.constexpr(64)
# </constants>


@triton.jit(do_not_specialize=["q_len", "k_len", "layer", "first_query", "first_key"])
def clip(
    spans, clipped, tasks, orders, tables,
    heads, kv_heads, q_len, k_len, layer, layers, first_query, first_key, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    SPANS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """`tasks` are schedules, each in a row of the batch and for a head.

    `spans` are neighbors that each tile of a schedule visits: where they start, where those among them start and stop that need
    no mask besides the tables, and where all stop. Of each, `clipped` takes two stretches that need a mask, then, behind those of
    all, one that needs none and one without tiles.
    """
    heads_of, rows_of, schedules = tasks
    q_order, k_order = orders
    tile, task = tl.program_id(0), tl.program_id(1)
    h, b, schedule = tl.load(heads_of + task), tl.load(rows_of + task), tl.load(schedules + task)
    kv = h // (heads // kv_heads)
    # <tables>
    # <per head>
    i = tokens(tile, q_len, q_order, BLOCK_Q)  # <own>
    j, tiles = k_len, tl.cdiv(k_len, BLOCK_K)  # <count>
    first, last, begin, end, clear = tiles, 0, tiles, 0, 0
    for start in tl.range(0, tiles, TILES):
        other = start + tl.arange(0, TILES)[:, None]
        j = tokens(other, k_len, k_order, BLOCK_K)  # <others>
        somewhere, everywhere = i <= j, i < j  # <truth>
        somewhere, everywhere = somewhere & (other < tiles), everywhere & (other < tiles)
        first, last = ends(somewhere, other, first, last)
        begin, end = ends(everywhere, other, begin, end)
        clear += tl.sum(tl.cast(everywhere, tl.int32))
    if clear != end - begin:  # those without hidden pairs do not follow each other
        begin, end = last, last
    spans += (schedule * tl.num_programs(0) + tile) * (4 * SPANS)
    clipped += (task * tl.num_programs(0) + tile) * (8 * SPANS)
    for n in tl.static_range(SPANS):
        start = tl.maximum(tl.load(spans + 4 * n), first)
        stop = tl.maximum(tl.minimum(tl.load(spans + 4 * n + 3), last), start)
        core = tl.minimum(tl.maximum(tl.load(spans + 4 * n + 1), tl.maximum(begin, start)), stop)
        rest = tl.maximum(tl.minimum(tl.load(spans + 4 * n + 2), tl.minimum(end, stop)), core)
        put(clipped + 4 * n, (start, core, rest, stop))
        put(clipped + 4 * SPANS + 4 * n, (core, rest, rest, rest))
