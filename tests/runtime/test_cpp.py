"""The generated C++ kernels against the float64 reference."""

from __future__ import annotations

import pytest
import torch

from attn_compiler.algebra.variant import Variant
from attn_compiler.errors import ShapeError
from attn_compiler.runtime import kernels
from attn_compiler.runtime.attend import attend
from attn_compiler.runtime.reading import read_variant
from attn_compiler.targets.cpp.spec import Stored
from attn_compiler.testing import Case, assert_case, random_case

WANTED = (torch.float32, torch.bfloat16, torch.float16)


def carried(case: Case, dtype: torch.dtype) -> bool:
    """Whether the kernels carry a case; if they do, what they compute is checked."""
    with torch.no_grad():
        try:
            assert_case(case, dtype, "cpp")
        except ShapeError:
            return False
    return True


@pytest.mark.parametrize("seeds", [range(n, n + 25) for n in range(0, 150, 25)], ids=str)
def test_random_variants_are_within_budget(seeds: range) -> None:
    count = sum(carried(random_case(seed), WANTED[seed % 3]) for seed in seeds)
    assert 10 * count > 9 * len(seeds)


def visited(mask: str, **tables: torch.Tensor) -> float:
    """How many keys each query meets on average, where tables say who sees whom."""
    q, k, v = torch.randn(3, 2, 2, 512, 8)
    with torch.no_grad():
        assert_case(Case(read(mask), q.double(), k.double(), v.double(), tables), torch.float32, "cpp")
    shape = kernels.Shape(
        read(mask), tuple(tables), tuple(Stored(str(t.dtype).removeprefix("torch."), t.ndim) for t in tables.values()),
        True, True, 2, 2, 2, 512, 512, 8, 8, "float32", 0, 1, 0, 0,
        tuple(map(kernels.contents_of, tables.values())),
    )  # fmt: skip
    [launch] = kernels.launches(shape)
    schedules = len(set(launch.visits.schedule_of.tolist()))
    return launch.visits.pairs / schedules / launch.visits.vectors


def read(mask: str) -> Variant:
    return read_variant(mask, Variant(), heads=2, kv_heads=2, q_len=512, k_len=512, head_dim=8, values=None, layer=0, layers=1)


def test_documents_are_skipped_row_by_row() -> None:
    documents = torch.stack([torch.arange(512) // 64, torch.arange(512) // 128])
    assert 90 <= visited("same(document)", document=documents) <= 110


def test_padding_is_skipped() -> None:
    assert visited("valid(tokens)", tokens=torch.arange(512)[None] < 100) == 104


def test_blocks_are_skipped() -> None:
    assert visited("blocks(seen, 64)", seen=torch.eye(8, dtype=torch.bool)) == 64


def test_a_table_that_changes_is_read_again() -> None:
    q = torch.randn(1, 1, 64, 8)
    documents = torch.zeros(1, 64, dtype=torch.int64)
    first = attend(q, q, q, "same(document)", tables={"document": documents}, target="cpp")
    documents[0, 32:] = 1
    second = attend(q, q, q, "same(document)", tables={"document": documents}, target="cpp")
    kernels.launches.cache_clear()
    afresh = attend(q, q, q, "same(document)", tables={"document": documents}, target="cpp")
    assert isinstance(first, torch.Tensor)
    assert isinstance(second, torch.Tensor)
    assert isinstance(afresh, torch.Tensor)
    assert torch.equal(second, afresh)
    assert not torch.equal(first, second)
