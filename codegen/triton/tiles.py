"""What kernels need of tiles: rows of operands, numbers of tables, functions of real numbers."""

import triton
import triton.language as tl

INFINITY = tl.constexpr(float("inf"))  # a kernel's file has it among its constants


@triton.jit
def task(visits, group, VISIT: tl.constexpr):
    """The tile of queries of this program, its row of the batch, its head, the key head of that, and where its visits start."""
    members, schedule_of, met = visits[:3]
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the last tiles first: under a causal mask they are the long ones
    b, member = tl.program_id(2), tl.program_id(1)
    h = tl.load(members + member)
    schedule = tl.load(schedule_of + b * tl.num_programs(1) + member)
    return tile, b, h, h // group, met + (schedule * tl.num_programs(0) + tile) * VISIT


@triton.jit
def tokens(tiles, length, order, BLOCK: tl.constexpr):
    """The tokens of some tiles, side by side, from an order if there is one; beyond the last one it is taken again."""
    token = tl.minimum(tiles * BLOCK + tl.arange(0, BLOCK)[None, :], length - 1)
    if order is not None:
        token = tl.load(order + token)
    return token


@triton.jit
def apart(tiles, length, BLOCK: tl.constexpr, ALIKE: tl.constexpr):
    """The tokens of some tiles that stand so far apart, side by side."""
    step = tl.arange(0, BLOCK // ALIKE if BLOCK > ALIKE else 1)
    return tl.minimum(tiles * BLOCK + step[None, :] * ALIKE, length - 1)


@triton.jit
def extremes(x):
    """The least and the largest number of each row."""
    return tl.min(x, 1, keep_dims=True), tl.max(x, 1, keep_dims=True)


@triton.jit
def ends(holds, tile, first, last):
    """Where the tiles for which something holds start and stop, and those that were found before."""
    start, stop = tl.where(holds, tile, 0x7FFFFFFF), tl.where(holds, tile + 1, 0)
    return tl.minimum(first, tl.min(tl.min(start, 1), 0)), tl.maximum(last, tl.max(tl.max(stop, 1), 0))


@triton.jit
def standing(spans, tile, SPANS: tl.constexpr):
    """Which tiles stand in one of some spans, and which in their cores."""
    near, clear = tile < 0, tile < 0
    for n in tl.static_range(SPANS):
        near = near | (tile >= tl.load(spans + 4 * n)) & (tile < tl.load(spans + 4 * n + 3))
        clear = clear | (tile >= tl.load(spans + 4 * n + 1)) & (tile < tl.load(spans + 4 * n + 2))
    return near, clear


@triton.jit
def append(listed, last, tile, wanted, STEP: tl.constexpr):
    """Write the tiles that are `wanted` one after the other behind the last one, or before it, and say which is the last then."""
    number = tl.cast(wanted, tl.int32)
    tl.store(listed + last + STEP * tl.cumsum(number, 0), tile, mask=wanted)
    return last + STEP * tl.sum(tl.sum(number, 1), 0)


@triton.jit
def put(place, numbers):
    """Write numbers one after the other."""
    for n in tl.static_range(len(numbers)):
        tl.store(place + n, numbers[n])


@triton.jit
def read(table, at):
    """What stands in a table; an index outside is moved to the border."""
    pointer, sizes, strides = table
    for axis in tl.static_range(len(sizes)):
        pointer += tl.cast(tl.minimum(tl.maximum(at[axis], 0), sizes[axis] - 1), tl.int64) * strides[axis]
    return tl.load(pointer)


@triton.jit
def add(table, at, x):
    """Add to what stands in a table, where programs share it."""
    pointer, sizes, strides = table
    for axis in tl.static_range(len(sizes)):
        pointer += tl.cast(tl.minimum(tl.maximum(at[axis], 0), sizes[axis] - 1), tl.int64) * strides[axis]
    tl.atomic_add(pointer + tl.zeros(x.shape, tl.int32), x.to(pointer.dtype.element_ty), sem="relaxed")


@triton.jit
def diagonals(x, BLOCK: tl.constexpr):
    """By how much rows are ahead of columns on each diagonal of a square tile, and the sum of what stands there.

    Once each row is turned by its number, a diagonal stands in a column, beside another one that came in from behind.
    """
    start = tl.arange(0, BLOCK)[None, :]
    place = start + tl.arange(0, BLOCK)[:, None]
    turned = tl.gather(x, place % BLOCK, 1)
    near, far = tl.where(place < BLOCK, turned, 0.0), tl.where(place < BLOCK, 0.0, turned)
    return -tl.join(start, start - BLOCK), tl.join(tl.sum(near, 0, keep_dims=True), tl.sum(far, 0, keep_dims=True))


@triton.jit
def rows(operand, b, h, tokens):
    """Where the rows of some tokens start."""
    pointer, of_batch, of_head, of_token = operand
    return pointer + tl.cast(b, tl.int64) * of_batch + tl.cast(h, tl.int64) * of_head + tl.cast(tokens, tl.int64) * of_token


@triton.jit
def described(operand, b, h, length, DIM: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """The rows of one head, as what copies whole tiles of them has to know them."""
    pointer, of_batch, of_head, of_token = operand
    pointer += tl.cast(b, tl.int64) * of_batch + tl.cast(h, tl.int64) * of_head
    return tl.make_tensor_descriptor(pointer, [length, DIM], [tl.cast(of_token, tl.int64), 1], [BLOCK, WIDTH])


@triton.jit
def take(row, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """The numbers of some rows, then zeros up to a width that is a power of two."""
    d = tl.arange(0, WIDTH)[None, :]
    if WIDTH == DIM:
        return tl.load(row + d)
    return tl.load(row + d, mask=d < DIM, other=0.0)


@triton.jit
def some(row, wanted, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """The numbers of the rows that are `wanted`, and zeros for the others, which are not read."""
    d = tl.arange(0, WIDTH)[None, :]
    return tl.load(row + d, mask=wanted & (d < DIM), other=0.0)


@triton.jit
def give(row, x, inside, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Write the rows that are `inside`."""
    d = tl.arange(0, WIDTH)[None, :]
    tl.store(row + d, x.to(row.dtype.element_ty), mask=inside & (d < DIM))


@triton.jit
def piece(row, first, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """So many numbers of some rows from `first` on, and zeros beyond the last one."""
    d = first + tl.arange(0, WIDTH)[None, :]
    if DIM % WIDTH == 0:
        return tl.load(row + d)
    return tl.load(row + d, mask=d < DIM, other=0.0)


@triton.jit
def state_of(held, head, count, segment, NUMBERS: tl.constexpr):
    """Where the state after a segment starts, one of `count` that each head has."""
    return held + (tl.cast(head, tl.int64) * count + segment) * NUMBERS


@triton.jit
def logged(log, b, h, tokens):
    """The running log of a decay at some tokens, as two floats: differences of these are as exact as those of float64."""
    place = rows(log[:4], b, h, tokens)
    return tl.load(place), tl.load(place + log[4])


@triton.jit
def left(now, before):
    """What is left after a log went from `before` to `now`: never more than there was."""
    fall = (now[0] - before[0]) + (now[1] - before[1])
    return tl.exp(tl.where(fall > 0, 0.0, fall))


@triton.jit
def numbered(b, h, i, heads, q_len):
    """The number of a query among those of all heads and rows of the batch, and how many these are."""
    return (tl.cast(b, tl.int64) * heads + h) * q_len + i, tl.cast(tl.num_programs(2) * heads, tl.int64) * q_len


@triton.jit
def note(numbers, query, count, found, inside):
    """Write what was found of each query that is `inside`, one number behind those of all others, where they are wanted."""
    if numbers is not None:
        for n in tl.static_range(len(found)):
            tl.store(numbers + n * count + query, found[n] + tl.zeros(query.shape, tl.float32), mask=inside)


@triton.jit
def noted(numbers, query):
    """A number of each query, or zero where there are none."""
    if numbers is None:
        return tl.zeros(query.shape, tl.float32)
    return tl.load(numbers + query)


@triton.jit
def untouched(QUERIES: tl.constexpr, WIDTH: tl.constexpr):
    """The largest score, a sum, and the sums of a row, of queries that have met no key."""
    nothing = tl.zeros([QUERIES, 1], tl.float32)
    return nothing - INFINITY, nothing, tl.zeros([QUERIES, WIDTH], tl.float32)


@triton.jit
def highest(peaks, count, query, parts):
    """The largest score of each query that any of some parts has found."""
    peak = tl.load(peaks + query)
    for part in tl.range(1, parts):
        peak = tl.maximum(peak, tl.load(peaks + part * count + query))
    return peak


@triton.jit
def absorb(score, peak, mass, acc):
    """The weights of a tile, relative to the peak, and the sums brought to that of all tiles so far."""
    highest = tl.maximum(peak, tl.max(score, 1, keep_dims=True))
    origin = tl.where(highest == -INFINITY, 0.0, highest)
    weight, keep = tl.exp2(score - origin), tl.exp2(peak - origin)
    mass = mass * keep + tl.sum(weight, 1, keep_dims=True)
    return weight, highest, mass, acc * keep


@triton.jit
def collect(score, weight, peak, mass):
    """The weights of a tile as they stand, but for what is hidden, and the sums with them."""
    weight = tl.where(score == -INFINITY, 0.0, weight)
    return weight, tl.maximum(peak, tl.max(score, 1, keep_dims=True)), mass + tl.sum(weight, 1, keep_dims=True)


@triton.jit
def mixed(x):
    """A number of which every bit depends on all bits of x (splitmix64)."""
    x += 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def draw(seed, task):
    """The random number of one head, from which follows what is dropped: the same as in C++."""
    return mixed(tl.load(seed[0]).to(tl.uint64) + mixed(tl.cast(task, tl.uint64)))


@triton.jit
def query_words(drawn, i):
    """The two random words of each query."""
    x = mixed(drawn + i.to(tl.uint64))
    return x.to(tl.uint32), (x >> 32).to(tl.uint32)


@triton.jit
def key_word(drawn, j):
    """The random word of keys."""
    inverted = drawn ^ 0xFFFFFFFFFFFFFFFF  # which Triton's interpreter cannot say as `~drawn`
    return (mixed(inverted - j.to(tl.uint64)) >> 32).to(tl.uint32)


@triton.jit
def dropped(words, word, DROPPED: tl.constexpr):
    """Whether the weight of a pair is dropped: this follows from its words alone, in whatever order pairs are met."""
    first, second = words
    x = (first ^ word) * 0x7FEB352D
    x = ((x ^ (x >> 15)) + second) * 0x846CA68B
    x = (x ^ (x >> 16)) * 0x9E3779B1
    return x < DROPPED


@triton.jit
def within(place, k_len):
    """A place, moved to the first or behind the last key where it is none."""
    return tl.cast(tl.minimum(tl.maximum(place, 0), k_len), tl.int32)


@triton.jit
def reached(position, first, k_len, NEAREST: tl.constexpr, FARTHEST: tl.constexpr):
    """What queries at some places may see of the keys: how many first ones, where the others start, how many both are."""
    split = within(first, k_len)
    start = tl.maximum(split, within(tl.min(position) - FARTHEST, k_len))
    return split, start, split + tl.maximum(0, within(tl.max(position) - NEAREST + 1, k_len) - start)


@triton.jit
def between(limits, b, split, start, met, BLOCK: tl.constexpr):
    """The same of keys between two tiles, if there are limits: how many first ones are left out, how many stay, and so on."""
    low, high = 0, start + met
    if limits is not None:
        low, high = tl.load(limits + 8 * b) * BLOCK, tl.load(limits + 8 * b + 1) * BLOCK
    stop = tl.minimum(start + met - split, high)
    gone = tl.minimum(split, low)
    split, start = tl.maximum(tl.minimum(split, high) - gone, 0), tl.maximum(start, low)
    return gone, split, start, split + tl.maximum(stop - start, 0)


@triton.jit
def products(x, y):
    """The sum of the products of each row with its counterpart."""
    return tl.sum(x.to(tl.float32) * y.to(tl.float32), 1, keep_dims=True)


@triton.jit
def norm(x):
    """The length of each row."""
    return tl.sqrt(products(x, x))


@triton.jit
def outward(of_norm, x):
    """The gradient of each row that the gradient of its length asks for."""
    length = norm(x)
    return tl.where(length == 0.0, 0.0, of_norm / length) * x.to(tl.float32)


@triton.jit
def quotient(a, b):
    """What is left of `a / b` without its fraction, rounded down."""
    found = a // b
    rest = a - found * b
    return tl.where((rest != 0) & ((rest < 0) != (b < 0)), found - 1, found)


@triton.jit
def remainder(a, b):
    """What rounding the quotient down leaves."""
    return a - quotient(a, b) * b


@triton.jit
def tangent(x):
    """The hyperbolic one."""
    small = tl.exp(-2.0 * tl.abs(x))
    found = (1.0 - small) / (1.0 + small)
    return tl.where(x < 0, -found, found)


@triton.jit
def power(a, b):
    """`a` to the power of `b`; below zero that of whole numbers."""
    found = tl.exp2(b * tl.log2(tl.abs(a)))
    found = tl.where((a < 0) & (b - 2 * tl.floor(b / 2) == 1), -found, found)
    return tl.where(b == 0, 1.0, tl.where(a == 0, 0.0, found))
