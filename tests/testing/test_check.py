"""One call checks a variant whole: a mistake in any part of it is found."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attn_compiler.algebra import expr as e
from attn_compiler.algebra.expr import Sort
from attn_compiler.algebra.integers import IntegerSet
from attn_compiler.algebra.variant import SOFTMAX, Variant
from attn_compiler.errors import TableError
from attn_compiler.planning.schedule import schedule
from attn_compiler.testing import check_variant, tiles

CAUSAL = Variant(mask=e.k <= e.q)
DOCUMENTS = Variant(mask=e.same(e.table("documents", e.b, e.q), e.table("documents", e.b, e.k)) & CAUSAL.mask)
SLOPES = replace(CAUSAL, score=e.score - e.table("slopes", e.h, sort=Sort.REAL) * abs(e.real(e.q - e.k)))
BY_HEAD = replace(CAUSAL, groups=((IntegerSet.parse("-1"), Variant(mask=CAUSAL.mask & (e.q - e.k < 5))),))
TABLES = {"documents": torch.arange(67).expand(2, -1) // torch.tensor([[20], [30]])}


@pytest.mark.parametrize(
    ("variant", "tables"),
    [(CAUSAL, {}), (DOCUMENTS, TABLES), (SLOPES, {"slopes": torch.rand(4, dtype=torch.float64)}), (BY_HEAD, {})],
    ids=["causal", "documents", "slopes", "by head"],
)
def test_a_variant_that_is_right_passes(variant: Variant, tables: dict[str, torch.Tensor]) -> None:
    check_variant(variant, tables=tables, dtypes=(torch.float32,))


@pytest.mark.parametrize(
    ("scheduled", "message"),
    [
        (Variant(mask=CAUSAL.mask & (e.q - e.k < 9)), r"query \d+, key \d+ is visible, and its tile is not visited"),
        (Variant(), r"query 0, key 1 is hidden, and its tile is called full"),
        (BY_HEAD, r"head 1: query \d+, key \d+ is visible, and its tile is not visited"),
    ],
    ids=["too few tiles", "too many full ones", "in one head"],
)
def test_a_wrong_schedule_is_found(scheduled: Variant, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "schedule", lambda variant, *lengths, **settings: schedule(scheduled, *lengths, **settings))
    with pytest.raises(AssertionError, match=message):
        check_variant(CAUSAL, dtypes=(torch.float32,))


def test_a_weight_that_notices_its_peak_is_found() -> None:
    wrong = replace(SOFTMAX, weight=e.exp(e.score - e.peak) + e.peak * e.peak)
    with pytest.raises(AssertionError, match="shifting the peak"):
        check_variant(replace(CAUSAL, normalizer=wrong), dtypes=(torch.float32,))


def test_tables_are_those_that_the_variant_reads() -> None:
    with pytest.raises(TableError, match='reads a table "documents" that is not in `tables`; did you mean "document"'):
        check_variant(DOCUMENTS, tables={"document": TABLES["documents"]})
    with pytest.raises(TableError, match='reads no table "slopes"'):
        check_variant(DOCUMENTS, tables={**TABLES, "slopes": torch.rand(2)})
