"""What the slices of the keys have found becomes one: one program owns one query of one head."""

import triton
import triton.language as tl
from tiles import give, note, numbered, read, rows

# <constants>
DIM, VALUE_DIM = tl.constexpr(64), tl.constexpr(64)  # numbers of a query or a key, and of a value
WIDTH, VALUE_WIDTH = tl.constexpr(64), tl.constexpr(64)  # the same, up to a power of two
INFINITY, LN2 = tl.constexpr(float("inf")), tl.constexpr(0.6931471805599453)
BY_PEAK = False
# </constants>


@triton.jit(do_not_specialize=["q_len", "k_len", "layer", "first_query", "first_key", "parts"])
def merge(
    sums, peaks, masses, out, totals, members, tables,
    heads, kv_heads, q_len, k_len, layer, layers, first_query, first_key, parts, PARTS: tl.constexpr,
):  # fmt: skip
    """`parts` are what was found of each query, of which PARTS are read at once; `totals`, the log-sum-exp, may be None."""
    # <tables>
    b, h = tl.program_id(2), tl.load(members + tl.program_id(1))
    kv = h // (heads // kv_heads)
    # <per head>
    i = tl.program_id(0) + tl.zeros([1, 1], tl.int32)
    # <per query>
    query, count = numbered(b, h, i, heads, q_len)

    peak = tl.full([PARTS, 1], -INFINITY, tl.float32)
    for first in tl.range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)[:, None]
        peak = tl.maximum(peak, tl.load(peaks + part * count + query, mask=part < parts, other=-INFINITY))
    peak = tl.max(peak, 0, keep_dims=True)
    seen = peak != -INFINITY
    origin = tl.where(seen, peak, 0.0)

    mass = tl.zeros([PARTS, 1], tl.float32)
    acc = tl.zeros([PARTS, VALUE_WIDTH], tl.float32)
    d = tl.arange(0, VALUE_WIDTH)[None, :]
    for first in tl.range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)[:, None]
        found = part * count + query
        some_mass = tl.load(masses + found, mask=part < parts, other=0.0)
        some_acc = tl.load(sums + found * VALUE_DIM + d, mask=(part < parts) & (d < VALUE_DIM), other=0.0)
        if BY_PEAK:
            keep = tl.exp2(tl.load(peaks + found, mask=part < parts, other=-INFINITY) - origin)
            keep = tl.where(seen, keep, 1.0)  # a query that saw no key may still have been given the values of all
            some_mass, some_acc = some_mass * keep, some_acc * keep
        mass += some_mass
        acc += some_acc
    mass, acc = tl.sum(mass, 0, keep_dims=True), tl.sum(acc, 0, keep_dims=True)
    seen |= mass != mass  # no score of NaN is the largest
    factor, total, filling = 1.0 / mass, peak * LN2 + tl.log(mass), 0.0  # <result>
    give(rows(out, b, h, i), tl.where(seen, acc * factor, filling), i < q_len, VALUE_DIM, VALUE_WIDTH)
    note(totals, query, count, (total,), i < q_len)
