"""Makes codes of the rows of one operand, and the scales that bring them back: one program owns some tokens of one head."""

import torch
import triton
import triton.language as tl
from codes import whole
from tiles import give, rows, some


@triton.jit
def magnitude(x):
    """The bits of magnitudes, which stand in their order: NaN is the greatest."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def finite(bits, LEAST: tl.constexpr):
    """What numbers up to such a magnitude are scaled by: NaN, which whatever reads them meets, where not all are finite."""
    largest = bits.to(tl.float32, bitcast=True)
    largest = tl.where(largest < LEAST, LEAST, largest)
    return tl.where(largest < float("inf"), largest, float("nan"))


@triton.jit
def standing(places, b, h, n, last):
    """Where some tokens stand, of those before the last one."""
    token = n
    if places is not None:
        token = tl.load(rows(places, b, h, n), mask=n < last, other=0)
    return token


@triton.jit(do_not_specialize=["tokens", "group"])
def encode(
    x, codes, scales, means, others, dots, places, largest, tokens, group, ratio,
    MOST: tl.constexpr, LEAST: tl.constexpr, ALONE: tl.constexpr, BLOCK: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Operands are a pointer and the strides of batch, heads and tokens. `means`, `largest` and `others` are numbers of channels.

    Rows lose the `means`. `largest` is what a channel is scaled by for all tokens; without, a `group` of tokens shares a scale,
    which stand at so many `places`, or one after the other, or each is ALONE. `dots` take what comes back of a row times
    `others`, of which `ratio` heads share one.
    """
    h, b = tl.program_id(1), tl.program_id(2)
    head = tl.cast(b, tl.int64) * tl.num_programs(1) + h
    first = tl.program_id(0) * group
    last = tl.minimum(first + group, tokens)
    d = tl.arange(0, WIDTH)[None, :]
    mean = tl.zeros([1, WIDTH], tl.float32)
    if means is not None:
        mean = tl.load(means + head * DIM + d, mask=d < DIM, other=0.0)
    most = tl.full([1, 1], LEAST, tl.float32)
    if largest is not None:
        most = tl.load(largest + head * DIM + d, mask=d < DIM, other=1.0)
    elif not ALONE:
        bits = tl.zeros([1, 1], tl.int32)
        for start in tl.range(first, last, BLOCK):
            n = start + tl.arange(0, BLOCK)[:, None]
            numbers = some(rows(x, b, h, standing(places, b, h, n, last)), n < last, DIM, WIDTH).to(tl.float32) - mean
            here = tl.max(tl.where(n < last, magnitude(numbers), 0), 1, keep_dims=True)
            bits = tl.maximum(bits, tl.max(here, 0, keep_dims=True))
        most = finite(bits, LEAST)

    for start in tl.range(first, last, BLOCK):
        n = start + tl.arange(0, BLOCK)[:, None]
        token = standing(places, b, h, n, last)
        numbers = some(rows(x, b, h, token), n < last, DIM, WIDTH).to(tl.float32) - mean
        by = finite(tl.max(magnitude(numbers), 1, keep_dims=True), LEAST) if ALONE else most
        numbers *= tl.div_rn(tl.zeros_like(by) + MOST, by)
        numbers = tl.where(numbers == numbers, numbers, 0.0)  # NaN has no code, but a scale
        if codes[0].dtype.element_ty == tl.int8:
            numbers = whole(numbers)
        scale = tl.div_rn(by, tl.zeros_like(by) + MOST)
        give(rows(codes, b, h, token), numbers, n < last, DIM, WIDTH)
        if scales is not None:
            tl.store(scales + head * tokens + token, scale + tl.zeros(token.shape, tl.float32), mask=n < last)
        if dots is not None:
            other = tl.load(others + head // ratio * DIM + d, mask=d < DIM, other=0.0)
            back = numbers.to(codes[0].dtype.element_ty).to(tl.float32) * scale
            tl.store(dots + head * tokens + token, tl.sum(back * other, 1, keep_dims=True), mask=n < last)


def codes_of(x, most, dtype, per, smooth=False, others=None, places=None):
    """Codes of [batch, heads, tokens, dim] up to `most`, their scales, and the means that they lost, or the dots with `others`.

    A scale is shared `per` so many tokens, all of a "head", or those of a "channel", and stands for each token or channel.
    Tokens that share one stand at `places`, [1 or batch, 1 or heads, tokens, 1], or one after the other.
    """
    batch, heads, tokens, dim = x.shape
    least = 2.0**-100  # groups of smaller numbers are scaled as if they held this one
    codes = torch.empty(x.shape, dtype=dtype, device=x.device)
    if not tokens:
        nothing = torch.zeros((batch, heads, dim), device=x.device)
        return codes, nothing, nothing if smooth else None
    mean = x.mean(2, dtype=torch.float32) if smooth else None
    dots = None if others is None else x.new_empty((batch, heads, tokens), dtype=torch.float32)
    largest = written = None
    if per in ("head", "channel"):
        low, high = (end.float() - (0 if mean is None else mean) for end in x.aminmax(dim=2))
        largest = torch.maximum(low.abs(), high.abs()).clamp_min(least)
        largest = torch.where(largest < float("inf"), largest, float("nan"))
        largest = largest.amax(2, keepdim=True).expand(batch, heads, dim).contiguous() if per == "head" else largest
        scales = largest / torch.full_like(largest, most)
        scales = scales[..., :1].expand(batch, heads, tokens) if per == "head" else scales
    else:
        scales = written = x.new_empty((batch, heads, tokens), dtype=torch.float32)
    width = max(16, 1 << (dim - 1).bit_length())
    block = 64 if width <= 128 else 32
    group = per if isinstance(per, int) and per > 1 else block
    at = None
    if places is not None and group == per:
        places = places.expand(batch, heads, tokens, 1)
        at = (places, *places.stride()[:3])
    encode[triton.cdiv(tokens, group), heads, batch](
        (x, *x.stride()[:3]), (codes, *codes.stride()[:3]), written, mean, others, dots, at, largest, tokens, group,
        heads // (heads if others is None else others.shape[1]), most, least, per == 1, block, dim, width,
    )  # fmt: skip
    return codes, scales, mean if smooth else dots
