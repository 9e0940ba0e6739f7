"""Attention laid out by lists of tiles in PyTorch's own operators: what files of MLIR and .pt2 hold of any pattern."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import attn_compiler as attn
from attn_compiler.algebra import expr as e
from attn_compiler.algebra.variant import Variant
from attn_compiler.export.mlir.engine import Engine
from attn_compiler.export.plain import LISTED
from attn_compiler.runtime.exported import attend_by
from attn_compiler.runtime.reading import read_variant
from attn_compiler.targets import tilings as chosen
from attn_compiler.targets.tilings import Tilings, tilings
from attn_compiler.testing.budget import assert_all_within_budget
from attn_compiler.testing.case import Case, on, plain
from attn_compiler.testing.fuzz import random_case
from export.single import contents, spec_of

LENGTH, BLOCK = 512, 64
MASKS = {
    "blocks": f"blocks(bitmap, {BLOCK})",
    "dilated": "causal & window(256) & dilated(8)",
    "apart": "dilated(16)",
    "global": "window(8) | queries(some) | keys(some)",
}


def listed(case: Case, *, known: bool) -> tuple[Tilings, Tensor]:
    """How a case is laid out, and what it computes then."""
    spec, tables = spec_of(case)
    by = tilings(spec, contents(tables) if known else {})
    with torch.no_grad():
        return by, attend_by([case.q, case.k, case.v, *tables.values()], spec.call, by)


def assert_right(case: Case, *, known: bool = True) -> Tilings:
    by, out = listed(case, known=known)
    exact = on("reference")(case.to(torch.float64)).detach()
    with torch.no_grad():
        assert_all_within_budget([out], [exact], lambda: [plain(case)])
    return by


def assert_random_case(seed: int) -> bool:
    case = random_case(seed).to(torch.float32)
    case = replace(case, tables={name: table.detach() for name, table in case.tables.items()})
    if 0 in (case.q.shape[2], case.k.shape[2]):
        return False
    return bool(assert_right(case, known=bool(seed % 3)).lists)


def test_random_variants_mean_the_same_in_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chosen, "LISTING", 0.0)
    assert sum(assert_random_case(seed) for seed in range(40)) > 10


@pytest.mark.full
@pytest.mark.parametrize("start", range(40, 1040, 100))
def test_many_random_variants_mean_the_same_in_lists(start: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chosen, "LISTING", 0.0)
    assert sum(assert_random_case(seed) for seed in range(start, start + 100)) > 10


def bitmap(heads: int) -> Tensor:
    """Few of the blocks, other ones for each head, and the diagonal."""
    count = LENGTH // BLOCK
    found = torch.rand(heads, count, count, generator=torch.Generator().manual_seed(0)) < 0.06
    return found | torch.eye(count, dtype=torch.bool)


def case_of(mask: str, heads: int = 4, length: int = LENGTH, **tables: Tensor) -> Case:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, length, 8, generator=generator) for n in (heads, 2, 2))
    variant = read_variant(
        mask, Variant(), heads=heads, kv_heads=2, q_len=length, k_len=length, head_dim=8, values=None, layer=0, layers=1
    )
    return Case(variant, q, k, v, tables)


def test_heads_with_blocks_of_their_own_are_laid_out_apart() -> None:
    by = assert_right(case_of(MASKS["blocks"], bitmap=bitmap(4)))
    assert {heads for heads, _ in by.lists} == {(0,), (1,), (2,), (3,)}


def test_nobody_asks_a_mask_that_hides_nothing_of_the_tiles() -> None:
    diagonal = torch.eye(LENGTH // BLOCK, dtype=torch.bool)
    (by,) = assert_right(case_of(MASKS["blocks"], bitmap=diagonal)).lists.values()
    assert by.shows_all
    assert all(batch.exist for batch in by.batches)


def test_a_length_that_is_no_multiple_of_tiles_is_right() -> None:
    assert assert_right(case_of("causal & window(400) & dilated(8)", length=2 * LENGTH - 13)).lists


def test_rows_that_see_everything_cost_only_themselves() -> None:
    everywhere = replace(Variant(), mask=(e.q - e.k < 16) & (e.k - e.q < 16) | (e.q < 3) | (e.k < 3))
    (by,) = assert_right(replace(case_of("all", length=1024), variant=everywhere)).lists.values()
    assert min(batch.queries.shape[0] for batch in by.batches) == 1
    assert len(by.batches) > 1


def test_a_window_needs_no_list() -> None:
    assert not listed(case_of("causal & window(40)"), known=True)[0].lists


def test_what_is_not_known_of_a_table_is_computed_densely() -> None:
    assert not listed(case_of(MASKS["blocks"], bitmap=bitmap(1)[0]), known=False)[0].lists


class Attention(nn.Module):
    """Nothing but an attention."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(x, x, x)


def policy(name: str) -> dict[str, object]:
    rule: dict[str, object] = {"match": {}, "attn": {"mask": MASKS[name]}}
    more: dict[str, object] = {"labels": {"bitmap": {"given": "bitmap"}}} if name == "blocks" else {}
    if name == "global":
        more = {"roles": {"some": "0:2"}}
    return {"version": 1, **more, "rules": [rule]}


def seen(name: str) -> Tensor:
    q, k = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
    near = (q - k).abs()
    return {
        "blocks": bitmap(1)[0][q // BLOCK, k // BLOCK],
        "dilated": (k <= q) & (near < 256) & (near % 8 == 0),
        "apart": near % 16 == 0,
        "global": (near < 8) | (q < 2) | (k < 2),
    }[name]


def assert_as_seen(name: str, x: Tensor, out: Tensor) -> None:
    attend = nn.functional.scaled_dot_product_attention
    exact = attend(x.double(), x.double(), x.double(), attn_mask=seen(name))
    assert_all_within_budget([out], [exact], lambda: [attend(x, x, x, attn_mask=seen(name))])


@pytest.mark.parametrize("name", ["blocks", "dilated", "apart", "global"])
def test_mlir_holds_the_tiles_that_a_mask_shows(name: str, tmp_path: Path) -> None:
    pytest.importorskip("torch_mlir", reason="torch-mlir has no wheel for this platform")
    path, x = tmp_path / "one.mlir", torch.randn(1, 1, LENGTH, 4)
    tables = {"bitmap": bitmap(1)[0]} if name == "blocks" else {}
    report = attn.export_mlir(Attention().eval(), (x,), path, policy(name), tables=tables, vmfb=False)
    assert [decision.form for decision in report.report.decisions] == [LISTED]
    assert f"{LENGTH}x{LENGTH}x" not in path.read_text()
    assert_as_seen(name, x, Engine(path, "linalg").run("main", [x])[0])


@pytest.mark.parametrize("name", ["blocks", pytest.param("dilated", marks=pytest.mark.full)])
def test_a_compiled_file_holds_the_tiles_that_a_mask_shows(name: str, tmp_path: Path) -> None:
    path, x = tmp_path / "one.pt2", torch.randn(1, 1, LENGTH, 4)
    tables = {"bitmap": bitmap(1)[0]} if name == "blocks" else {}
    report = attn.export_pt2(Attention().eval(), (x,), path, policy(name), tables=tables)
    assert [decision.form for decision in report.report.decisions] == [LISTED]
    assert_as_seen(name, x, torch._inductor.aoti_load_package(str(path))(x))
