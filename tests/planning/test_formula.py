"""Formulas as people read them: every part by its name, nothing that only a compiler could want to know."""

from __future__ import annotations

import pytest

from attn_compiler.algebra.context import Context
from attn_compiler.algebra.expr import Expr, Sort, b, const, exp, h, i, k, layer, q, same, score, table, tanh, where
from attn_compiler.algebra.feature import x
from attn_compiler.algebra.integers import IntegerSet
from attn_compiler.algebra.made import Made, channel
from attn_compiler.algebra.variant import EmptyRows, Variant
from attn_compiler.planning.formula import Formula, formulas, whole
from attn_compiler.planning.site import Frame, Kind, Phase, Site, TableShape

MANGLED = "l_self_modules_encoder_modules_0_parameters_relative_position_bias_table_"
INDEX = table("l_self_modules_encoder_modules_0_buffers_relative_position_index_", i * 49 + k)
BIAS = table(MANGLED, where(const(0) <= INDEX, INDEX, INDEX + 169), h, sort=Sort.REAL)
TITLES = {
    MANGLED: "relative_position_bias_table",
    str(INDEX.value): "relative_position_index",
    "l_kwargs_attention_mask_": "attention_mask",
}
PADDING = ~same(table("l_kwargs_attention_mask_", b, k), 0)


def formula(variant: Variant, position: Expr = i) -> Formula:
    (found,) = formulas(variant, site(variant, position))
    return found


def site(variant: Variant, position: Expr = i) -> Site:
    tables = {name: TableShape((), Sort.REAL, title) for name, title in TITLES.items()}
    return Site(
        "attn",
        Kind.SELF,
        Phase.PREFILL,
        0,
        1,
        2,
        4,
        4,
        49,
        49,
        16,
        16,
        "float32",
        variant,
        Frame(position),
        49,
        49,
        tables=tables,
    )


def parts(variant: Variant, position: Expr = i) -> list[tuple[str, str]]:
    return [(part.name, part.says) for part in formula(variant, position).parts]


def test_the_usual_scale_is_the_root_of_the_width() -> None:
    assert formula(Variant()).says == "softmax( q·k / √16 )"
    assert formula(Variant(scale=const(0.25))).says == "softmax( q·k / √16 )"
    assert formula(Variant(scale=const(1.0))).says == "softmax( q·k )"
    assert formula(Variant(scale=const(0.3))).says == "softmax( q·k·0.3 )"


def test_what_changes_the_score_stands_around_it() -> None:
    assert formula(Variant(score=tanh(score / 30.0) * 30.0)).says == "softmax( tanh(q·k / √16 / 30)·30 )"


def test_padding_and_causality_are_named_and_tables_are_called_as_the_model_calls_them() -> None:
    assert parts(Variant(mask=(k <= q) & PADDING)) == [("causal", "k ≤ q"), ("padding", "attention_mask[b, k] ≠ 0")]


def test_documents_are_named() -> None:
    mask = same(table("ids", b, i), table("ids", b, k))
    assert parts(Variant(mask=mask)) == [("documents", "ids[b, q] = ids[b, k]")]


@pytest.mark.parametrize(
    ("mask", "name"),
    [
        ((k <= q) & (q <= k + 1023), ["causal", "window(1024)"]),
        ((k <= q + 7) & (q <= k + 7), ["window(8)"]),
        ((k <= q) & ((q <= k + 7) | (k <= 3)), ["causal", "window(8) or sinks(4)"]),
        ((k <= q) & (((q <= k + 7) & (k <= q + 7)) | (k <= 3)), ["causal", "window(8) or sinks(4)"]),
        ((k <= q + 7) & (q <= k + 6), ["causal(7)", "window(7)"]),
        (k <= q, ["causal"]),
    ],
)
def test_masks_are_called_what_a_policy_calls_them(mask: Expr, name: list[str]) -> None:
    assert [found for found, _ in parts(Variant(mask=mask))] == name


def test_a_long_term_stands_below_the_formula_under_its_name() -> None:
    found = formula(Variant(score=score + BIAS))
    assert found.says == "softmax( q·k / √16 + bias table )"
    assert [(part.name, part.says) for part in found.parts] == [
        ("bias table", "relative_position_bias_table[relative_position_index[q·49 + k], h]")
    ]


def test_terms_of_one_kind_are_numbered() -> None:
    other = table("relative_position_bias_of_the_keys", where(const(0) <= INDEX, INDEX, INDEX + 169), h, sort=Sort.REAL)
    found = formula(Variant(score=score + BIAS + other))
    assert found.says == "softmax( q·k / √16 + bias table 1 + bias table 2 )"


def region(at: Expr) -> Expr:
    return where(const(11) <= 7 * (b // 2) + at // 7, const(1), const(0)) * 3 + where(const(11) <= at % 7, const(1), const(0))


def test_regions_that_two_tokens_share_are_said_once() -> None:
    """Swin's shifted windows: a difference of labels that is zero, and asked for twice."""
    apart = region(k) - region(q)
    hidden = where(same(apart, 0), const(0.0), where(same(apart, 0), const(1.0), const(-100.0)))
    found = formula(Variant(score=score + hidden))
    assert found.says == "softmax( q·k / √16 + regions )"
    assert [(part.name, part.says) for part in found.parts] == [
        ("regions", "0 if label(q) = label(k) else −100"),
        ("label(k)", "3·(1 if 11 ≤ 7·⌊b / 2⌋ + ⌊k / 7⌋ else 0) + (1 if 11 ≤ k mod 7 else 0)"),
    ]


def test_rows_that_see_nothing_are_told_where_they_are_not_zero() -> None:
    assert parts(Variant(mask=PADDING, empty_rows=EmptyRows.MEAN))[-1] == ("no key seen", "the mean of v")


def test_queries_elsewhere_than_their_index_keep_both() -> None:
    mask = (k <= q) & (q <= k + 7) & same(table("ids", b, i), table("ids", b, k))
    found = parts(Variant(mask=mask), i + 5)
    assert found == [("causal", "k ≤ q"), ("window(8)", "q − k < 8"), ("documents", "ids[b, i] = ids[b, k]")]


def test_groups_of_heads_have_formulas_of_their_own() -> None:
    grouped = Variant(groups=((IntegerSet.parse("0:2"), Variant(mask=k <= q)), (IntegerSet.parse("2:4"), Variant())))
    found = formulas(grouped, site(grouped))
    assert [one.heads for one in found] == ["0:2", "2:4"]
    assert whole(found) == "heads 0:2: softmax( q·k / √16 ) where causal: k ≤ q; heads 2:4: softmax( q·k / √16 )"


def test_what_an_attention_works_on_is_said_where_it_is_not_q_and_k_as_they_come() -> None:
    gate = Made("gate", table("gate_x", layer, h, channel, sort=Sort.REAL), -exp(x), running=True)
    assert parts(Variant(context=(Context("agents", (7, 7), (14, 14)),), unrotated=("q", "k"), made=(gate,))) == [
        ("keys", "7 by 7 agents, pooled queries that gather the values first"),
        ("q and k", "as they are before the rotary embedding"),
        ("gate", "−exp(x·gate_x), summed up over the tokens"),
    ]
