"""What kernels need of operands in few bits: products of codes, and rows of them as a cache holds them."""

import triton
import triton.language as tl
from tiles import some


@triton.jit
def whole(x):
    """The nearest whole numbers, of two as near ones the even one; for numbers below 2^22."""
    return (x + 12582912.0) - 12582912.0  # where floats are whole


@triton.jit
def of_floats(weight, values, acc, MOST: tl.constexpr):
    """The sums of values, each times its weight, in floats of a byte: a weight of one is MOST.

    Hopper adds such products up in few bits, so no more of them than those of a tile.
    """
    return tl.dot((weight * MOST).to(values.dtype), values, acc, max_num_imprecise_acc=weight.shape[1])


@triton.jit
def of_bytes(weight, values, acc, MOST: tl.constexpr):
    """The sums of values, each times its weight, in whole numbers of a byte: a weight of one is MOST.

    Above 127 weights have no sign, which nothing multiplies with numbers that have one: half of that range is added up apart.
    """
    offset: tl.constexpr = 128 if MOST > 127 else 0
    found = tl.dot((whole(weight * MOST) - offset).to(tl.int8), values)
    if offset:
        found += offset * tl.sum(values.to(tl.int32), 0, keep_dims=True)
    return acc + found.to(tl.float32)


@triton.jit
def coded(operand, b, h, tokens, BYTES: tl.constexpr):
    """Where the rows of codes of some tokens start; what is whole words long starts at words."""
    pointer, of_batch, of_head, of_token = operand
    at = tl.cast(b, tl.int64) * of_batch + tl.cast(h, tl.int64) * of_head + tl.cast(tokens, tl.int64) * of_token
    return pointer + (tl.multiple_of(at, [4, 4]) if BYTES % 4 == 0 else at)


@triton.jit
def scale_of(row, wanted, BYTES: tl.constexpr):
    """The float behind the codes of each row."""
    n = tl.arange(0, 4)[None, :]
    bits = tl.load(row + BYTES + n, mask=wanted, other=0).to(tl.uint32) << (8 * n).to(tl.uint32)
    return tl.sum(bits, 1, keep_dims=True).to(tl.float32, bitcast=True)


@triton.jit
def whole8(row, wanted, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """The codes of the rows that are `wanted`, and their scales."""
    return some(row, wanted, DIM, WIDTH).to(tl.int8, bitcast=True), scale_of(row, wanted, DIM)


@triton.jit
def whole4(row, wanted, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """The same of codes that share bytes: the first half of a row with the second one."""
    d = tl.arange(0, WIDTH)[None, :]
    half: tl.constexpr = DIM // 2
    bits = tl.load(row + d % half, mask=wanted & (d < DIM), other=0x88)
    bits = tl.where(d < half, bits & 15, bits >> 4)
    return bits.to(tl.int8) - 8, scale_of(row, wanted, half)


@triton.jit
def e4m3(row, wanted, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """The same of floats with three bits of mantissa: a half with their bits is smaller, and scaled by more."""
    bits = some(row, wanted, DIM, WIDTH).to(tl.uint16)
    bits = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
    return bits.to(tl.float16, bitcast=True), scale_of(row, wanted, DIM) * 256


@triton.jit
def e5m2(row, wanted, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """The same of floats with two, which begin as a half does."""
    bits = some(row, wanted, DIM, WIDTH).to(tl.uint16) << 8
    return bits.to(tl.float16, bitcast=True), scale_of(row, wanted, DIM)
