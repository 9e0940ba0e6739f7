"""Linear attention, keys: one program adds up a piece of the state that the keys of a segment leave."""

import triton
import triton.language as tl
from apart import faded, logs
from tiles import left, logged, piece, rows, state_of

# <constants>
DIM, VALUE_DIM = tl.constexpr(64), tl.constexpr(64)  # numbers of a key, and of a value
WIDTH, VALUE_WIDTH = tl.constexpr(64), tl.constexpr(64)  # of which so many are at work at once: a power of two
SEGMENT = tl.constexpr(256)  # keys between two states
PRECISION = tl.constexpr("ieee")
FADES = False
APART, ROWS_FADE, COLUMNS_FADE = False, False, False  # parts of a state fade each by itself: which ones
# </constants>


@triton.jit(do_not_specialize=["count"])
def states(k, v, held, at_key, sharing, count, BLOCK_K: tl.constexpr):
    """Operands are a pointer and the strides of batch, heads and tokens; behind a log, so far away is what rounding left of it.

    `held` has room for `count` states of each head: DIM rows of VALUE_DIM sums of key * value, then DIM sums of keys.
    `sharing` says how many heads share one of q, of k, of v, a state, and one of the past.
    """
    pieces, values_wide = tl.cdiv(DIM, WIDTH), tl.cdiv(VALUE_DIM, VALUE_WIDTH)
    segment, at = tl.program_id(0) // (pieces * values_wide), tl.program_id(0) % (pieces * values_wide)
    first, first_value = at // values_wide * WIDTH, at % values_wide * VALUE_WIDTH
    b, member = tl.program_id(2), tl.program_id(1)
    h = member * sharing[3]
    if FADES:
        end = logged(at_key, b, h, segment * SEGMENT + SEGMENT - 1)
    if APART:
        end = logs(at_key, b, h, segment * SEGMENT + SEGMENT - 1)
    acc, total = tl.zeros([WIDTH, VALUE_WIDTH], tl.float32), tl.zeros([1, WIDTH], tl.float32)
    for near in tl.range(0, SEGMENT, BLOCK_K):
        j = segment * SEGMENT + near + tl.arange(0, BLOCK_K)[:, None]
        keys = piece(rows(k, b, h // sharing[1], j), first, DIM, WIDTH)
        values = piece(rows(v, b, h // sharing[2], j), first_value, VALUE_DIM, VALUE_WIDTH)
        counted = keys.to(tl.float32)
        if FADES:
            fade = left(end, logged(at_key, b, h, j))
            counted, values = counted * fade, (values.to(tl.float32) * fade).to(values.dtype)
        if ROWS_FADE:
            counted = faded(keys, end, logs(at_key, b, h, j), first, DIM, WIDTH)
            keys = counted.to(keys.dtype)
        if COLUMNS_FADE:
            values = faded(values, end, logs(at_key, b, h, j), first_value, VALUE_DIM, VALUE_WIDTH).to(values.dtype)
        acc = tl.dot(keys.T, values, acc, input_precision=PRECISION)
        total += tl.sum(counted, 0, keep_dims=True)
    state = state_of(held, b * tl.num_programs(1) + member, count, segment, DIM * VALUE_DIM + DIM)
    d, e = first + tl.arange(0, WIDTH), first_value + tl.arange(0, VALUE_WIDTH)[None, :]
    tl.store(state + d[:, None] * VALUE_DIM + e, acc, mask=(d[:, None] < DIM) & (e < VALUE_DIM))
    if first_value == 0:
        tl.store(state + DIM * VALUE_DIM + d[None, :], total, mask=d[None, :] < DIM)
