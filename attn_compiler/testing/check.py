"""Sweeps a variant, yours too: every target against the reference, forward and backward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from attn_compiler.algebra import expr as e
from attn_compiler.algebra.variant import Variant
from attn_compiler.errors import TableError, did_you_mean
from attn_compiler.testing.budget import assert_within_budget
from attn_compiler.testing.case import Case, assert_case, on
from attn_compiler.testing.tiles import assert_tiles

LENGTHS = (1, 2, 7, 31, 67)
GRADIENTS_AT = 7  # differences are slow: one length will do


def check_variant(
    variant: Variant,
    *,
    tables: Mapping[str, Tensor] | None = None,
    targets: Sequence[str] = ("torch",),
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16),
) -> None:
    """Sweep a variant over lengths, head counts and precisions, and raise where something does not compute what it means.

    Checked are: its tables, all given and all read; the tiles of its schedule against the dense mask, with the values of the
    tables and without; its peak law; that the reference's gradients are the slopes of its values; and on every target the
    output and all gradients (those of real tables too) against the float64 reference, within the budget that `testing.budget`
    derives.
    """
    _check_tables(variant, tables or {})
    generator = torch.Generator().manual_seed(0)
    for length in LENGTHS:
        for q_len, heads, kv_heads in ((length, 2, 2), (max(1, length // 3), 4, 2)):
            shapes = ((2, heads, q_len, 8), (2, kv_heads, length, 8), (2, kv_heads, length, 8))
            q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
            case = Case(variant, q, k, v, tables or {})
            assert_tiles(case)
            assert_peak_law(case)
            if length == GRADIENTS_AT:
                assert_slopes(case)
            for target in targets:
                for dtype in dtypes:
                    assert_case(case, dtype, target)


def _check_tables(variant: Variant, tables: Mapping[str, Tensor]) -> None:
    read = variant.tables() - {table.name for part in variant.parts() for table in part.derived}
    if missing := sorted(read - tables.keys()):
        raise TableError(f'the variant reads a table "{missing[0]}" that is not in `tables`{did_you_mean(missing[0], tables)}')
    if idle := sorted(tables.keys() - read):
        raise TableError(f'the variant reads no table "{idle[0]}"{did_you_mean(idle[0], read)}')


def assert_peak_law(case: Case) -> None:
    """Check that shifting `peak` changes nothing: only then may a kernel find it tile by tile."""

    def shifted(one: Variant) -> Variant:
        return replace(one, normalizer=one.normalizer.map(lambda x: x.substitute({e.peak: e.peak + 1.0})))

    variant = case.variant
    moved = replace(shifted(variant), groups=tuple((heads, shifted(of_group)) for heads, of_group in variant.groups))
    low, high = case.to(torch.float32), case.to(torch.float64)
    exact = on("reference")(high)
    assert_within_budget(on("reference")(replace(high, variant=moved)), exact, on("reference")(low), "shifting the peak")


def assert_slopes(case: Case) -> None:
    """Check the gradients of the reference, which targets are held to, by differences. Through codes they pass straight."""
    if any(True for part in case.variant.parts() for _ in part.storage.held()):
        return
    high = case.to(torch.float64)
    real = high.names()[3:]

    def run(q: Tensor, k: Tensor, v: Tensor, *tables: Tensor) -> Tensor:
        return on("reference")(replace(high, q=q, k=k, v=v, tables={**high.tables, **dict(zip(real, tables, strict=True))}))

    torch.autograd.gradcheck(run, high.leaves(), fast_mode=True)
