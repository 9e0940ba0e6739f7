"""Triton kernels visit the blocks that a table on the device shows, and no others."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

import attn_compiler as attn
from attn_compiler.runtime import visits
from attn_compiler.runtime.ahead import MACHINES, Order, compile_ahead
from attn_compiler.runtime.kernel_source import shape_of
from attn_compiler.runtime.kernels import spec_at
from attn_compiler.runtime.triton_visits import Visits
from attn_compiler.targets.cpp.spec import FIRST_KEY, FIRST_QUERY
from attn_compiler.targets.triton.blocks import Blocks
from attn_compiler.targets.triton.clip import alike, clipping, divided
from attn_compiler.testing.budget import assert_within_budget

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("small_tiles")

TILE, LENGTH = 16, 75  # the last tile is not whole
TILES = -(-LENGTH // TILE)


def bitmap(*shape: int, often: float = 0.4) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape))) < often


CASES: Mapping[str, tuple[object, Tensor]] = {
    "blocks that are tiles": ("blocks(keep, 16)", bitmap(5, 5)),
    "blocks of several tiles": ("blocks(keep, 32)", bitmap(3, 3)),
    "blocks that are no power of two": ("blocks(keep, 48)", bitmap(2, 2)),
    "causal": ("causal & blocks(keep, 16)", bitmap(5, 5)),
    "bitmaps by head": ("causal & blocks(keep, 16)", bitmap(2, 5, 5)),
    "or near": ("causal & (blocks(keep, 16) | window(7))", bitmap(5, 5)),
    "all but": ("causal & ~blocks(keep, 16)", bitmap(5, 5)),
    "no block": ({"mask": "blocks(keep, 16)", "empty_rows": "mean"}, bitmap(5, 5, often=0.0)),
    "every block": ("blocks(keep, 16)", bitmap(5, 5, often=1.0)),
    "of two tables": ("blocks(keep, 16) & blocks(keep, 32)", bitmap(5, 5, often=0.7)),
    "a bitmap that is too small": ("blocks(keep, 16)", bitmap(2, 3)),
}


@pytest.fixture
def met(monkeypatch: pytest.MonkeyPatch) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Of every launch so far where the tiles of each task stand, [tasks, tiles, 2, 2], and the list of them."""
    found: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    of_call = Visits.of_call

    def noted(self: Visits, *given: object) -> tuple[Tensor, ...]:
        arrays = of_call(self, *given)  # type: ignore[arg-type]
        tiles, listed = (x.numpy().astype(np.int64) for x in arrays[2:4])
        found.append((tiles.reshape(-1, TILES, 2, 2), listed.reshape(-1)))
        return arrays

    monkeypatch.setattr(Visits, "of_call", noted)
    return found


def results(name: str, target: str, queries: int = LENGTH) -> list[Tensor]:
    """The output, and the gradients of q, k and v."""
    variant, keep = CASES[name]
    generator = torch.Generator().manual_seed(1)
    given = [torch.randn(2, 2, n, 16, generator=generator, requires_grad=True) for n in (queries, LENGTH, LENGTH)]
    out = attn.attend(*given, variant, tables={"keep": keep}, target=target)  # type: ignore[arg-type]
    assert isinstance(out, Tensor)
    out.square().sum().backward()
    return [out.detach(), *(x.grad for x in given if x.grad is not None)]


@pytest.mark.parametrize("queries", [LENGTH, LENGTH - 16, LENGTH - 5])
@pytest.mark.parametrize("name", CASES)
def test_what_is_listed_computes_what_it_means(name: str, queries: int) -> None:
    for numbers in zip(*(results(name, target, queries) for target in ("triton", "reference", "torch")), strict=True):
        assert_within_budget(*numbers)


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize("name", CASES)
def test_tiles_are_visited_that_hold_a_pair_and_masked_if_they_hide_one(
    name: str, met: list[tuple[NDArray[np.int64], NDArray[np.int64]]]
) -> None:
    results(name, "triton")
    variant, keep = CASES[name]
    pairs = shown(variant, keep)
    assert len(met) == 3
    for (numbers, listed), side in zip(met, (pairs, pairs, pairs.transpose(0, 2, 1)), strict=True):
        for task, of_task in enumerate(numbers):
            for tile, ranges in enumerate(of_task):
                rows = side[task, TILE * tile : TILE * (tile + 1)]
                whole = {n for n in range(LENGTH // TILE) if rows[:, TILE * n : TILE * (n + 1)].all()}
                some = {n for n in range(TILES) if rows[:, TILE * n : TILE * (n + 1)].any()}
                mixed, full = (listed[begin : begin + count].tolist() for begin, count in ranges)
                assert sorted(full) == sorted(whole)
                assert sorted(mixed) == sorted(some - whole)


def shown(variant: object, keep: Tensor) -> NDArray[np.bool_]:
    """[heads, queries, keys]: who sees whom, as the reference says it."""
    q, v = torch.zeros(1, 2, LENGTH, 16), torch.eye(LENGTH).expand(1, 2, LENGTH, LENGTH)
    mask = variant["mask"] if isinstance(variant, Mapping) else variant
    weights = attn.attend(q, q, v, mask, tables={"keep": keep}, target="reference")
    assert isinstance(weights, Tensor)
    return (weights[0] > 0).numpy()


def blocks_of(mask: str, q_len: int = LENGTH) -> tuple[int, int] | None:
    """How many neighbors a kernel takes for the same, None where no table of blocks is looked at."""
    shape = shape_of({"mask": mask}, q_len=q_len, k_len=LENGTH, heads=1, head_dim=16, target="triton")
    firsts = {FIRST_QUERY: shape.first_query, FIRST_KEY: shape.first_key}
    spec = spec_at(shape, shape.variant)
    return alike(divided(spec.variant.mask, spec.variant.mask.tables(), firsts)[1], firsts)


def test_neighbors_are_alike_where_blocks_begin_with_tiles() -> None:
    assert blocks_of("blocks(keep, 64)") == (64, 64)
    assert blocks_of("blocks(keep, 48)") == (16, 16)
    assert blocks_of("blocks(keep, 64)", LENGTH - 32) == (32, 64)
    assert blocks_of("blocks(keep, 64)", LENGTH - 5) is None
    assert blocks_of("blocks(keep, 8)") is None
    assert blocks_of("causal & same(documents)") is None


def test_a_list_that_would_be_too_long_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents are cut all the same."""
    shape = shape_of({"mask": "same(documents) & blocks(keep, 32)"}, q_len=256, k_len=256, heads=2, head_dim=16, target="triton")
    of_call = shape, (0, 1), shape.variant, spec_at(shape, shape.variant), (32, 32)
    assert visits.visited(*of_call).blocks == (32, 32)
    monkeypatch.setattr(visits, "MOST_LISTED", 2 * 8 * 8 - 1)
    cut = visits.visited(*of_call)
    assert cut.blocks is None
    assert cut.tasks is not None
    assert cut.shown.tables() == {"documents"}


@pytest.mark.parametrize("by_key", [False, True], ids=["queries", "keys"])
def test_the_kernel_that_lists_spills_nothing(by_key: bool) -> None:
    shape = shape_of(
        {"mask": "causal & blocks(keep, 32)"}, q_len=4096, k_len=4096, heads=8, head_dim=64, dtype="bfloat16", target="triton"
    )
    spec = spec_at(shape, shape.variant)
    _, found_out = divided(spec.variant.mask, {"keep"}, {FIRST_QUERY: 0, FIRST_KEY: 0})
    tables = tuple((stored.dtype, stored.axes) for _, stored in spec.tables)
    text = clipping(spec, found_out, by_key=by_key)
    found = compile_ahead([Order(text, "bfloat16", tables, machine, Blocks(128, 128)) for machine in MACHINES])
    assert not any(one.spills for one in found)
