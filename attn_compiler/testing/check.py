"""Sweeps a variant, yours too: every target against the reference, forward and backward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from attn_compiler.algebra import expr as e
from attn_compiler.algebra.variant import Variant
from attn_compiler.testing.budget import assert_within_budget
from attn_compiler.testing.case import Case, assert_case, on

LENGTHS = (1, 2, 7, 31, 67)


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
