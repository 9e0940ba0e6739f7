"""Which body an exported attention gets."""

from __future__ import annotations

import pytest

from attn_compiler.algebra import expr as e
from attn_compiler.algebra.expr import Expr
from attn_compiler.algebra.variant import Variant
from attn_compiler.planning.site import Length
from attn_compiler.targets.exported import Call, Spec
from attn_compiler.targets.onnx.choice import Likely, choose, shortest

CAUSAL = e.k <= e.q


def spec(mask: Expr, length: Length) -> Spec:
    return Spec(Call("attention", Variant(mask=mask), (), 0, 0, 1), (), 1, 8, 8, length, length, 64, 64, "float32")


def chosen(mask: Expr, length: Length, likely: int, wanted: str = "auto") -> str:
    return choose(spec(mask, length), Likely(likely, likely), {}, wanted)


@pytest.mark.parametrize("mask", [e.true, e.table("documents", e.b, e.k) < 3])
def test_where_nothing_is_out_of_reach_all_keys_are_met(mask: Expr) -> None:
    assert chosen(mask, "tokens", 4096) == "dense"


def test_a_short_text_meets_all_keys_and_a_long_one_those_in_reach() -> None:
    window = CAUSAL & (e.q - e.k < 256)
    assert chosen(window, 128, 128) == "dense"
    assert chosen(window, 4096, 4096) in ("scan", "listed")


def test_where_lengths_change_the_function_decides() -> None:
    assert chosen(CAUSAL, "tokens", 16) == chosen(CAUSAL, "tokens", 4096) == "either"


def test_what_has_no_simple_reach_is_listed() -> None:
    assert chosen(e.same((e.q // 64) % 8, (e.k // 64) % 8), 4096, 4096) == "listed"


def test_a_body_that_does_not_suit_gives_way() -> None:
    assert chosen(e.true, 4096, 4096, "scan") == "dense"
    assert chosen(CAUSAL, "tokens", 4096, "listed") == "dense"


def test_a_window_that_no_text_fills_costs_what_causal_costs() -> None:
    endless = CAUSAL & (e.q - e.k < 1 << 30)
    assert shortest(spec(endless, "tokens"), Variant(mask=endless)) == shortest(spec(CAUSAL, "tokens"), Variant(mask=CAUSAL))
