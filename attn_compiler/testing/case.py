"""One call of attention, run by a target, by the reference and by the plain formula: values and gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attn_compiler.algebra.variant import Variant
from attn_compiler.runtime.attend import attend
from attn_compiler.runtime.call import operands_of
from attn_compiler.runtime.reading import VariantLike, read_variant
from attn_compiler.targets.operands import Operands
from attn_compiler.targets.torch_target import Result, attend_densely, by_group
from attn_compiler.testing.budget import assert_all_within_budget


@dataclass(frozen=True)
class Case:
    """A variant and the operands of one call; tables by name."""

    variant: Variant
    q: Tensor
    k: Tensor
    v: Tensor
    tables: Mapping[str, Tensor]
    q_positions: int | Tensor | None = None
    with_total: bool = False  # whether the log-sum-exp, 0 where no key is seen, is one more column of the output

    def to(self, dtype: torch.dtype) -> Case:
        """The same numbers in another precision, as new leaves that want gradients."""
        real = {name: t.to(dtype).detach().requires_grad_() for name, t in self.tables.items() if t.dtype.is_floating_point}
        q, k, v = (x.to(dtype).detach().requires_grad_() for x in (self.q, self.k, self.v))
        return replace(self, q=q, k=k, v=v, tables={**self.tables, **real})

    def last(self, most: int) -> Case:
        """The same call for its last queries."""
        gone, positions = max(0, self.q.shape[2] - most), self.q_positions
        if positions is not None:
            positions = positions[gone:] if isinstance(positions, Tensor) else positions + gone
        return replace(self, q=self.q[:, :, gone:], q_positions=positions)

    def names(self) -> list[str]:
        """What gradients are taken of."""
        return ["q", "k", "v", *sorted(name for name, t in self.tables.items() if t.dtype.is_floating_point)]

    def leaves(self) -> list[Tensor]:
        return [self.q, self.k, self.v, *(self.tables[name] for name in self.names()[3:])]


def variant_of(slots: VariantLike, *, heads: int = 4, kv_heads: int = 2, length: int = 300, dim: int = 8) -> Variant:
    """What the slots of a policy mean in an attention of these sizes."""
    sizes = {"heads": heads, "kv_heads": kv_heads, "q_len": length, "k_len": length, "head_dim": dim}
    return read_variant(slots, Variant(), **sizes, values=None, layer=0, layers=1)


def drawn_case(
    slots: Mapping[str, object],
    tables: Mapping[str, Tensor],
    q_len: int,
    k_len: int,
    *,
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 8,
    value_dim: int | None = None,
) -> Case:
    """What slots mean, on random operands of a batch of two, with those of the tables that it reads."""
    generator = torch.Generator().manual_seed(q_len)
    shapes = (2, heads, q_len, dim), (2, kv_heads, k_len, dim), (2, kv_heads, k_len, value_dim or dim)
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    variant = variant_of(slots, heads=heads, kv_heads=kv_heads, dim=dim)
    return Case(variant, q, k, v, {table: tables[table] for table in variant.tables()})


Attend = Callable[[Case], Tensor]


def on(target: str) -> Attend:
    """How a target attends."""

    def run(case: Case) -> Tensor:
        given = case.q, case.k, case.v, case.variant
        found = attend(
            *given,
            tables=case.tables,
            q_positions=case.q_positions,
            return_lse=case.with_total,
            target=target,  # type: ignore[arg-type]
        )
        return found if isinstance(found, Tensor) else _joined(*found)

    return run


def _joined(out: Tensor, total: Tensor | None) -> Tensor:
    return out if total is None else torch.cat((out, total.masked_fill(total == -math.inf, 0.0)[..., None].to(out.dtype)), dim=-1)


def plain(case: Case) -> Tensor:
    """The formula, every step in the operands' own precision: what a target's error is measured by."""
    operands = operands_of(case.q, case.k, case.v, case.variant, case.tables, case.q_positions, None, 0, 1, False)

    def run(part: Operands, of_group: Variant) -> Result:
        return attend_densely(part, of_group, case.q.dtype, lse=case.with_total)

    out, total = by_group(operands, case.variant, run)
    return _joined(out, total if case.with_total else None)


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
    actual, exact = with_gradients(on(target), low), with_gradients(on("reference"), low.to(torch.float64))
    names = [f"{target}, {dtype}, {what}" for what in ("output", *(f"gradient of {name}" for name in low.names()))]
    assert_all_within_budget(actual, exact, lambda: with_gradients(plain, low), names[: len(actual)])
