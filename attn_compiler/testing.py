"""Checks a variant, yours too, against its meaning: random cases, derived error budgets, one call that sweeps a variant."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attn_compiler.algebra import expr as e
from attn_compiler.algebra.expr import Expr, Sort
from attn_compiler.algebra.integers import IntegerSet
from attn_compiler.algebra.variant import SOFTMAX, EmptyRows, Normalizer, Variant
from attn_compiler.runtime.attend import attend
from attn_compiler.runtime.call import operands_of
from attn_compiler.targets.blocks import in_real, whole
from attn_compiler.targets.torch_target import by_group, carry_out

LENGTHS = (1, 2, 7, 31, 67)


@dataclass(frozen=True)
class Case:
    """A variant and the operands of one call; tables by name."""

    variant: Variant
    q: Tensor
    k: Tensor
    v: Tensor
    tables: Mapping[str, Tensor]
    q_positions: int | Tensor | None = None

    def to(self, dtype: torch.dtype) -> Case:
        """The same numbers in another precision, as new leaves that want gradients."""
        real = {name: t.to(dtype).detach().requires_grad_() for name, t in self.tables.items() if t.dtype.is_floating_point}
        q, k, v = (x.to(dtype).detach().requires_grad_() for x in (self.q, self.k, self.v))
        return replace(self, q=q, k=k, v=v, tables={**self.tables, **real})

    def leaves(self) -> list[Tensor]:
        return [self.q, self.k, self.v, *(t for _, t in sorted(self.tables.items()) if t.dtype.is_floating_point)]


Attend = Callable[[Case], Tensor]


def on(target: str) -> Attend:
    """How a target attends."""

    def run(case: Case) -> Tensor:
        out = attend(case.q, case.k, case.v, case.variant, tables=case.tables, q_positions=case.q_positions, target=target)  # type: ignore[arg-type]
        assert isinstance(out, Tensor)
        return out

    return run


def plain(case: Case) -> Tensor:
    """The formula, every step in the operands' own precision: what a target's error is measured by."""
    operands = operands_of(case.q, case.k, case.v, case.variant, case.tables, case.q_positions, None, 0, 1, False)

    def written_out(part: object, of_group: Variant) -> tuple[Tensor, Tensor | None]:
        arrangement = in_real(whole(part, case.q.dtype), case.q.dtype)  # type: ignore[arg-type]
        return carry_out(arrangement, of_group, dropout=0.0, lse=False)

    return by_group(operands, case.variant, written_out)[0]


def budget(plain_result: Tensor, exact: Tensor, magnitude: float = 0.0) -> float:
    """The largest error that a target may make: twice that of a plain implementation, and a few units in the last place.

    `magnitude` is that of what the result was computed from: a gradient that cancels to nothing keeps its terms' rounding.
    """
    if not exact.numel():
        return 0.0
    error = (plain_result.double() - exact.double()).abs().max().item()
    return 2 * error + 4 * torch.finfo(plain_result.dtype).eps * max(magnitude, exact.double().abs().max().item())


def assert_within_budget(actual: Tensor, exact: Tensor, plain_result: Tensor, where: str = "", magnitude: float = 0.0) -> None:
    """Raise where `actual` is further from `exact` than the budget allows, or is not finite."""
    assert actual.shape == exact.shape, f"{where}: shape {list(actual.shape)} instead of {list(exact.shape)}"
    if not exact.numel():
        return
    allowed, error = budget(plain_result, exact, magnitude), (actual.double() - exact.double()).abs().max().item()
    assert error <= allowed, f"{where}: the error is {error:.3g}, where {allowed:.3g} is allowed"


def with_gradients(attend_with: Attend, case: Case) -> list[Tensor]:
    """The output, and the gradients of everything that has one."""
    out = attend_with(case)
    leaves = case.leaves()
    if not out.requires_grad:
        return [out.detach()]
    weights = torch.linspace(-1, 1, max(1, out.numel()), dtype=torch.float64)[: out.numel()].reshape(out.shape).to(out.dtype)
    gradients = torch.autograd.grad((out * weights).sum(), leaves, allow_unused=True)
    filled = (torch.zeros_like(x) if g is None else g for g, x in zip(gradients, leaves, strict=True))
    return [out.detach(), *filled]


def assert_case(case: Case, dtype: torch.dtype, target: str = "torch") -> None:
    """Check one case in one precision: the output and all gradients are within budget of the float64 reference."""
    low = case.to(dtype)
    exact = with_gradients(on("reference"), low.to(torch.float64))
    expected, actual = with_gradients(plain, low), with_gradients(on(target), low)
    names = ["output", "gradient of q", "gradient of k", "gradient of v"] + ["gradient of a table"] * (len(exact) - 4)
    magnitude = max((x.abs().max().item() for x in exact if x.numel()), default=0.0)
    pairs = case.q.shape[:3].numel() * case.k.shape[2]
    for name, a, x, p in zip(names, actual, exact, expected, strict=False):
        terms = pairs / x.numel() if name == "gradient of a table" else 1  # each entry sums so many; roundings add like noise
        assert_within_budget(a, x, p, f"{target}, {dtype}, {name}", magnitude * max(1.0, terms) ** 0.5)


def check_variant(
    variant: Variant,
    *,
    tables: Mapping[str, Tensor] | None = None,
    targets: Sequence[str] = ("torch",),
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16),
) -> None:
    """Sweep a variant over lengths, head counts and precisions, forward and backward, on every target; and test its peak law."""
    generator = torch.Generator().manual_seed(0)
    for length in LENGTHS:
        for q_len, heads, kv_heads in ((length, 2, 2), (max(1, length // 3), 4, 2)):
            shapes = ((2, heads, q_len, 8), (2, kv_heads, length, 8), (2, kv_heads, length, 8))
            q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
            case = Case(variant, q, k, v, tables or {})
            assert_peak_law(case)
            for target in targets:
                for dtype in dtypes:
                    assert_case(case, dtype, target)


def assert_peak_law(case: Case) -> None:
    """Check that shifting `peak` changes nothing: only then may a kernel find it tile by tile."""

    def shifted(one: Variant) -> Variant:
        change = {e.peak: e.peak + 1.0}
        weight, output = one.normalizer.weight.substitute(change), one.normalizer.output.substitute(change)
        return replace(one, normalizer=replace(one.normalizer, weight=weight, output=output))

    variant = case.variant
    moved = replace(shifted(variant), groups=tuple((heads, shifted(of_group)) for heads, of_group in variant.groups))
    low, high = case.to(torch.float32), case.to(torch.float64)
    exact = on("reference")(high)
    assert_within_budget(on("reference")(replace(high, variant=moved)), exact, on("reference")(low), "shifting the peak")


def random_case(seed: int) -> Case:
    """A variant drawn from everything the algebra can say, over shapes with their edge cases."""
    draw = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    batch, kv_heads, ratio = draw.choice((1, 2)), draw.choice((1, 2)), draw.choice((1, 2, 3))
    heads, k_len = kv_heads * ratio, draw.choice((0, 1, 2, 7, 31, 67, 70, 97))
    q_len = draw.choice((k_len, k_len, 1, max(0, k_len // 2), 5))
    dim, value_dim = draw.choice((4, 8, 16)), draw.choice((4, 8, 16))
    shapes = ((batch, heads, q_len, dim), (batch, kv_heads, k_len, dim), (batch, kv_heads, k_len, value_dim))
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    tables = {
        "slopes": torch.rand(heads, generator=generator, dtype=torch.float64),
        "bias": torch.randn(1, heads, max(1, q_len), max(1, k_len), generator=generator, dtype=torch.float64),
        "relative": torch.randn(heads, 9, generator=generator, dtype=torch.float64),
        "sinks": torch.randn(heads, generator=generator, dtype=torch.float64),
        "padding": torch.rand(batch, max(1, k_len), generator=generator) < 0.8,
        "documents": torch.randint(0, 3, (batch, max(1, k_len)), generator=generator).sort(dim=-1).values,
        "prefixes": torch.randint(0, 6, (batch,), generator=generator),
    }
    variant = _random_variant(draw)
    if heads > 1 and draw.random() < 0.3:
        own = replace(_random_variant(draw), dropout=0.0)
        variant = replace(variant, groups=((IntegerSet.parse(draw.choice(("0", "0::2", "-1"))), own),))
    read = variant.tables()
    position = draw.choice((None, None, None, 0, 3, torch.arange(q_len) * 2 if q_len != batch else None))
    return Case(variant, q, k, v, {name: t for name, t in tables.items() if name in read}, position)


def _random_variant(draw: random.Random) -> Variant:
    return Variant(
        mask=_random_mask(draw, depth=2),
        empty_rows=draw.choice([EmptyRows.ZERO, EmptyRows.MEAN, EmptyRows.UNMASKED]),  # NaN has no budget
        scale=draw.choice((Variant().scale, Variant().scale, e.const(0.3), e.table("slopes", e.h, sort=Sort.REAL))),
        score=_random_score(draw),
        normalizer=_random_normalizer(draw),
    )


def _random_mask(draw: random.Random, depth: int) -> Expr:
    left, right = draw.randint(1, 9), draw.randint(1, 9)
    if depth and draw.random() < 0.5:
        a, b = _random_mask(draw, depth - 1), _random_mask(draw, depth - 1)
        return draw.choice((a & b, a & b, a | b, a & ~b))
    return draw.choice(
        (
            e.true,
            e.k <= e.q,
            e.k <= e.q,
            (e.q - e.k < left) & (e.k - e.q < right),
            (e.k <= e.q) & (e.q - e.k < left),
            (e.k <= e.q) & ((e.q - e.k < left) | (e.k < right)),
            e.k < left,
            e.same((e.q - e.k) % left, 0),
            e.same(e.q // left, e.k // left),
            e.k < e.table("prefixes", e.b),
            e.table("padding", e.b, e.k, sort=Sort.BOOL),
            e.same(e.table("documents", e.b, e.q), e.table("documents", e.b, e.k)),
            e.same((e.k // right + e.kv) % 2, 0),
            e.real(e.q - e.k) < e.table("slopes", e.h, sort=Sort.REAL) * 20.0,
        )
    )


def _random_score(draw: random.Random) -> Expr:
    distance = e.real(e.q - e.k)
    return draw.choice(
        (
            e.score,
            e.score,
            e.score + e.table("bias", e.b, e.h, e.i, e.k, sort=Sort.REAL),
            e.score - e.table("slopes", e.h, sort=Sort.REAL) * abs(distance),
            e.score + e.table("relative", e.h, e.q - e.k + 4, sort=Sort.REAL),
            e.tanh(e.score / 5.0) * 5.0,
            e.dot / (e.q_norm * e.k_norm + 0.1) * 3.0,
        )
    )


def _random_normalizer(draw: random.Random) -> Normalizer:
    sink = e.mass + e.exp(e.table("sinks", e.h, sort=Sort.REAL) - e.peak)
    return draw.choice(
        (
            SOFTMAX,
            SOFTMAX,
            SOFTMAX,
            Normalizer("softmax_one", weight=e.exp(e.score - e.peak), output=e.acc / (e.mass + e.exp(-e.peak))),
            Normalizer("sink", weight=e.exp(e.score - e.peak), output=e.acc / sink),
            Normalizer("sigmoid", weight=e.sigmoid(e.score - 1.0), output=e.acc),
            Normalizer("relu", weight=e.maximum(e.score, 0.0), output=e.acc / e.maximum(e.real(e.k_len), 1.0)),
        )
    )
