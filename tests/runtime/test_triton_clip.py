"""Triton kernels visit only what tables show: documents, padding, positions, windows by head."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

import attn_compiler as attn
from attn_compiler.algebra import expr as e
from attn_compiler.algebra.variant import Variant
from attn_compiler.runtime import triton_visits
from attn_compiler.runtime.ahead import MACHINES, Order, compile_ahead
from attn_compiler.runtime.kernel_source import shape_of
from attn_compiler.runtime.kernels import spec_at
from attn_compiler.runtime.triton_visits import Visits
from attn_compiler.targets.triton.blocks import Blocks
from attn_compiler.targets.triton.clip import clipping, divided
from attn_compiler.testing import Case, assert_case
from attn_compiler.testing.budget import assert_within_budget

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("small_tiles")

TILE, LENGTH = 16, 75  # the last tile is not whole
TILES = -(-LENGTH // TILE)
PACKED = torch.tensor([0] * 35 + [1] * 3 + [2] * 26 + [5] * 11)
BACK = PACKED.flip(0)  # which falls
SHUFFLED = PACKED[torch.randperm(LENGTH, generator=torch.Generator().manual_seed(0))]
AWAKE = torch.arange(LENGTH) >= torch.tensor([[40], [0]])
ENDING = torch.arange(LENGTH) < torch.tensor([[50], [75]])
NOBODY = torch.zeros(2, LENGTH, dtype=torch.bool)

CASES: Mapping[str, tuple[object, Mapping[str, Tensor]]] = {
    "documents": ("same(documents)", {"documents": torch.stack([PACKED, BACK])}),
    "causal documents": ("causal & same(documents)", {"documents": torch.stack([PACKED, PACKED * 0])}),
    "documents in disorder": ("causal & same(documents)", {"documents": torch.stack([SHUFFLED, PACKED])}),
    "documents in a window": ("causal & window(20) & same(documents)", {"documents": torch.stack([PACKED, BACK])}),
    "documents, dilated": ("causal & dilated(3) & same(documents)", {"documents": torch.stack([PACKED, PACKED])}),
    "documents and first keys": ("causal & (same(documents) | sinks(4))", {"documents": torch.stack([PACKED, PACKED])}),
    "padding before": ("causal & valid(tokens)", {"tokens": AWAKE}),
    "padding behind": ({"mask": "valid(tokens)", "empty_rows": "mean"}, {"tokens": ENDING}),
    "nothing but padding": ({"mask": "valid(tokens)", "empty_rows": "unmasked"}, {"tokens": NOBODY}),
    "a prefix of each row": ("causal | prefix(length)", {"length": torch.tensor([20, 50])}),
    "what is no interval": ("causal & ~same(documents)", {"documents": torch.stack([PACKED, PACKED])}),
    "windows by head": ("causal & span(reaches, 0)", {"reaches": torch.tensor([9.0, 40.0])}),
}
HEADS = {"windows by head": 2}
SORTED = ("documents", "causal documents", "documents in a window", "padding before", "padding behind", "a prefix of each row")


@pytest.fixture
def met(monkeypatch: pytest.MonkeyPatch) -> list[NDArray[np.int64]]:
    """The stretches of every launch so far, [tasks, tiles, 2, stretches, 2]."""
    found: list[NDArray[np.int64]] = []
    of_call = Visits.of_call

    def noted(self: Visits, *given: object) -> tuple[Tensor, ...]:
        arrays = of_call(self, *given)  # type: ignore[arg-type]
        stretches = arrays[2].numpy().astype(np.int64)
        found.append(stretches.reshape(-1, TILES, 2, stretches.size // (len(stretches) * stretches.shape[1] * 4), 2))
        return arrays

    monkeypatch.setattr(Visits, "of_call", noted)
    return found


def results(name: str, target: str, tables: Mapping[str, Tensor] | None = None) -> list[Tensor]:
    """The output, and the gradients of q, k and v."""
    variant, own = CASES[name]
    generator = torch.Generator().manual_seed(1)
    heads = HEADS.get(name, 1)
    given = [torch.randn(2, heads, LENGTH, 16, generator=generator, requires_grad=True) for _ in "qkv"]
    out = attn.attend(*given, variant, tables=tables or own, target=target)  # type: ignore[arg-type]
    assert isinstance(out, Tensor)
    out.square().sum().backward()
    return [out.detach(), *(x.grad for x in given if x.grad is not None)]


@pytest.mark.parametrize("name", CASES)
def test_what_is_cut_computes_what_it_means(name: str, met: list[NDArray[np.int64]]) -> None:
    found, exact, plain = (results(name, target) for target in ("triton", "reference", "torch"))
    assert len(met) == 3
    for numbers in zip(found, exact, plain, strict=True):
        assert_within_budget(*numbers)


def test_a_comparison_of_which_one_side_is_a_number_is_bounded() -> None:
    """Places of queries stand in a table, and their remainders by 1 are known to be 0."""
    given = [torch.randn(1, 1, LENGTH, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64) for _ in "qkv"]
    mask = (e.k <= e.q) & e.same((e.q - e.k) % 1, 0)
    assert_case(Case(Variant(mask=mask), *given, {}, q_positions=torch.arange(LENGTH)), torch.float32, "triton")


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize("name", SORTED)
def test_no_tile_is_visited_in_vain(name: str, met: list[NDArray[np.int64]]) -> None:
    """Forward and for q tiles of queries meet tiles of keys, for k and v the other way round."""
    results(name, "triton")
    padded = np.zeros((2, TILES * TILE, TILES * TILE), bool)
    padded[:, :LENGTH, :LENGTH] = shown(name)
    tiles = padded.reshape(2, TILES, TILE, TILES, TILE).any((2, 4))
    for launch, needed in zip(met, (tiles, tiles, tiles.transpose(0, 2, 1)), strict=True):
        for row in range(2):
            for tile in range(TILES):
                assert visited(launch[row, tile]) == set(np.flatnonzero(needed[row, tile]))


def shown(name: str) -> NDArray[np.bool_]:
    """[batch, queries, keys]: who sees whom, as the reference says it."""
    variant, tables = CASES[name]
    q, v = torch.zeros(2, 1, LENGTH, 16), torch.eye(LENGTH).expand(2, 1, LENGTH, LENGTH)
    mask = variant["mask"] if isinstance(variant, Mapping) else variant
    weights = attn.attend(q, q, v, mask, tables=tables, target="reference")
    assert isinstance(weights, Tensor)
    return (weights[:, 0] > 0).numpy()


def visited(stretches: NDArray[np.int64]) -> set[int]:
    """The tiles of some stretches, each of which is visited once."""
    tiles = [tile for start, stop in stretches.reshape(-1, 2) for tile in range(start, stop)]
    assert len(tiles) == len(set(tiles))
    return set(tiles)


@pytest.mark.usefixtures("idle")
def test_tiles_within_a_document_carry_no_mask(met: list[NDArray[np.int64]]) -> None:
    results("documents", "triton", {"documents": torch.arange(LENGTH).expand(2, -1) // (2 * TILE)})
    stretches = met[0][0]
    assert [visited(stretches[tile, 1]) for tile in range(4)] == [{0, 1}, {0, 1}, {2, 3}, {2, 3}]
    assert not any(visited(stretches[tile, 0]) for tile in range(4))
    assert visited(stretches[4, 0]) == {4}  # which reaches beyond the last key


@pytest.mark.usefixtures("idle")
def test_what_is_in_disorder_is_masked_all_the_way(met: list[NDArray[np.int64]]) -> None:
    """The control: where documents lie across each other, every tile has to be visited, and none without a mask."""
    results("documents", "triton", {"documents": torch.arange(LENGTH).expand(2, -1) % 2})
    for tile in range(TILES):
        assert visited(met[0][0, tile, 0]) == set(range(TILES))
        assert not visited(met[0][0, tile, 1])


@pytest.mark.usefixtures("idle")
def test_windows_that_stand_in_a_table_are_those_of_each_head(met: list[NDArray[np.int64]]) -> None:
    results("windows by head", "triton")
    first, second = (sum(len(visited(stretches)) for stretches in task) for task in met[0])
    assert first < second < TILES * (TILES + 1) // 2


@pytest.mark.usefixtures("idle")
def test_a_kernel_that_cuts_is_launched_only_where_tables_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[object] = []
    call = triton_visits.call
    monkeypatch.setattr(triton_visits, "call", lambda *given: (launched.append(given), call(*given)))
    attn.attend(*(torch.zeros(1, 1, LENGTH, 16) for _ in "qkv"), "causal & window(40)", target="triton")
    assert not launched
    results("causal documents", "triton")
    assert len(launched) == 3


@pytest.mark.parametrize("by_key", [False, True], ids=["queries", "keys"])
def test_the_kernel_that_cuts_spills_nothing(by_key: bool) -> None:
    variant = {"mask": "causal & same(documents) & valid(tokens)"}
    shape = shape_of(variant, q_len=4096, k_len=4096, heads=8, head_dim=64, dtype="bfloat16", target="triton")
    spec = spec_at(shape, shape.variant)
    _, shown = divided(spec.variant.mask, {"documents", "tokens"})
    tables = tuple((stored.dtype, stored.axes) for _, stored in spec.tables)
    text = clipping(spec, shown, by_key=by_key)
    found = compile_ahead([Order(text, "bfloat16", tables, machine, Blocks(128, 128)) for machine in MACHINES])
    assert not any(one.spills for one in found)
