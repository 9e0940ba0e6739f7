"""What is visited where tables of whole blocks of tokens show it: one program owns a tile, and lists those it meets.

Tables are known when kernels run, and on the device: the host waits for nothing.
"""

import triton
import triton.language as tl
from tiles import apart, append, extremes, put, read, standing, tokens

# <constants>
DIM = tl.constexpr(64)
# </constants>


@triton.jit(do_not_specialize=["q_len", "k_len", "layer", "first_query", "first_key"])
def sift(
    spans, met, listed, tasks, orders, tables,
    heads, kv_heads, q_len, k_len, layer, layers, first_query, first_key, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    SPANS: tl.constexpr, TILES: tl.constexpr, Q_ALIKE: tl.constexpr, K_ALIKE: tl.constexpr,
):  # fmt: skip
    """`tasks` are schedules, each in a row of the batch and for a head; so many neighbors are `ALIKE`, since they share a block.

    `spans` are neighbors that each tile of a schedule visits: where they start, where those among them start and stop that need
    no mask besides the tables, and where all stop. `listed` has room for all tiles that another one may meet: those that need
    a mask stand at its front, the others at its end, and `met` takes where both begin, and how many they are.
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
    spans += (schedule * tl.num_programs(0) + tile) * (4 * SPANS)
    owned = task * tl.num_programs(0) + tile
    begin = owned * tiles
    mixed, full = begin - 1, begin + tiles
    for start in tl.range(tl.load(spans), tl.load(spans + 4 * SPANS - 1), TILES):
        other = start + tl.arange(0, TILES)[:, None]
        near, clear = standing(spans, other, SPANS)
        j = tokens(other, k_len, k_order, BLOCK_K)  # <others>
        # <blocks>
        key = apart(other, k_len, BLOCK_K, K_ALIKE)
        least, most = 1, 0
        for n in tl.static_range(0, BLOCK_Q, Q_ALIKE):
            query = tl.minimum(tile * BLOCK_Q + n, q_len - 1)
            low, high = extremes(tl.cast(key <= query, tl.int32))
            least, most = tl.minimum(least, low), tl.maximum(most, high)
        # </blocks>
        somewhere, everywhere = most != 0, least != 0  # <truth>
        clear = clear & everywhere
        mixed = append(listed, mixed, other, near & somewhere & ~clear, 1)
        full = append(listed, full, other, clear, -1)
    put(met + 4 * owned, (begin, mixed + 1 - begin, full, begin + tiles - full))
