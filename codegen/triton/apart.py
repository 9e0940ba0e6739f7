"""What kernels of linear attention need where parts of a state fade each by itself: each has a running log."""

import triton
import triton.language as tl
from tiles import left, piece, products, rows


@triton.jit
def logs(log, b, h, tokens):
    """Where the running logs of some tokens start that have one for each number, as two floats."""
    place = rows(log[:4], b, h, tokens)
    return place, place + log[4]


@triton.jit
def one_of(log, number):
    """The running log of a number."""
    return tl.load(log[0] + number), tl.load(log[1] + number)


@triton.jit
def pieces(log, first, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """So many of the running logs of some tokens."""
    return piece(log[0], first, DIM, WIDTH), piece(log[1], first, DIM, WIDTH)


@triton.jit
def faded(x, now, before, first, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """What is left of a piece of rows, each number of which has running logs of its own."""
    return x.to(tl.float32) * left(pieces(now, first, DIM, WIDTH), pieces(before, first, DIM, WIDTH))


@triton.jit
def paired(x, now, other, at_other, b, h, of_other, start, stop, DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The products of a tile's rows with some other ones, each of which fades up to each of these: a column at a time."""
    place, found = start + tl.arange(0, BLOCK)[None, :], tl.zeros([BLOCK, BLOCK], tl.float32)
    for first in tl.range(0, DIM, WIDTH):
        here, later = piece(x, first, DIM, WIDTH).to(tl.float32), pieces(now, first, DIM, WIDTH)
        for j in tl.range(start, stop):
            kept = here * left(later, pieces(logs(at_other, b, h, j), first, DIM, WIDTH))
            one = products(kept, piece(rows(other, b, of_other, j), first, DIM, WIDTH))
            found += tl.where(place == j, one, 0.0)
    return found


@triton.jit
def added(acc, weight, now, other, at_other, b, h, of_other, start, stop, first, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Sums, and some other rows beside them as weights say, each of which fades up to each of the tile's: one at a time."""
    place, later = start + tl.arange(0, weight.shape[1])[None, :], pieces(now, first, DIM, WIDTH)
    for j in tl.range(start, stop):
        kept = left(later, pieces(logs(at_other, b, h, j), first, DIM, WIDTH))
        one = tl.sum(tl.where(place == j, weight, 0.0), 1, keep_dims=True)
        acc += one * kept * piece(rows(other, b, of_other, j), first, DIM, WIDTH).to(tl.float32)
    return acc
