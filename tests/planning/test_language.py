"""Texts of the policy language: what they mean, and what is said of texts that mean nothing."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attn_compiler import library
from attn_compiler.algebra.evaluate import evaluate_scalar
from attn_compiler.algebra.expr import Sort, const, dim, h, k, k_len, layer, q, sqrt, table
from attn_compiler.algebra.integers import IntegerSet
from attn_compiler.algebra.variant import SOFTMAX, Variant
from attn_compiler.errors import LanguageError
from attn_compiler.planning.geometry import Geometry
from attn_compiler.planning.language import Scope, parse_call, parse_expression, parse_mask
from attn_compiler.planning.plan import Refusal
from attn_compiler.planning.words import with_phantoms

ATOMS = ("causal", "window(3)", "sinks(2)", "dilated(2)", 'keys("1:4")')
GRID = Scope(geometry=Geometry.of([4, 4]))


def _texts() -> st.SearchStrategy[str]:
    return st.recursive(
        st.sampled_from(ATOMS),
        lambda inner: st.one_of(
            inner.map(lambda x: f"~({x})"),
            st.tuples(inner, st.sampled_from("&|"), inner).map(lambda x: f"({x[0]}) {x[1]} ({x[2]})"),
        ),
        max_leaves=6,
    )


def _python(text: str, x: int, y: int) -> bool:
    meaning = dict(zip(ATOMS, (y <= x, abs(x - y) < 3, y < 2, (x - y) % 2 == 0, 1 <= y < 4), strict=True))
    for atom, value in meaning.items():
        text = text.replace(atom, str(value))
    return bool(eval(text.replace("~", " not ").replace("&", " and ").replace("|", " or ")))


@given(_texts(), st.integers(0, 9), st.integers(0, 9))
def test_masks_join_as_truth_values_do(text: str, x: int, y: int) -> None:
    keep = parse_mask(text, library.words(), Scope()).keep
    assert evaluate_scalar(keep, {q: x, k: y}) == _python(text, x, y)


@given(_texts())
def test_spaces_and_parentheses_mean_nothing(text: str) -> None:
    spaced = "(\n ( " + text.replace("&", "  &\n ") + " ) ) "
    assert parse_mask(spaced, library.words(), Scope()) == parse_mask(text, library.words(), Scope())


def test_an_atom_without_arguments_needs_no_parentheses() -> None:
    assert parse_mask("causal", library.words(), Scope()) == parse_mask("causal()", library.words(), Scope())


WRONG_MASKS = [
    ("causal & windw(3)", 10, 'did you mean "window"'),
    ("window(-1)", 8, "at least 1"),
    ("window(True)", 8, "at least 1"),
    ("window(1.5)", 8, "at least 1"),
    ("window", 1, "missing a required argument"),
    ("causal and window(3)", 1, "`&` instead of `and`"),
    ("not causal", 1, "`~` instead of `not`"),
    ("window(3, lft=2)", 15, 'did you mean "left"'),
    ("causal &", 9, "no expression"),
    ("3", 1, "expected a mask"),
    ("ball(3)", 1, "set the slot `geometry`"),
    ("queries(text)", 9, 'no role "text"'),
    ("same(document)", 6, 'no table "document"'),
    ("keys('0:x')", 6, "neither an integer nor a slice"),
    ("window(*x)", 8, "`*` is not part"),
]


@pytest.mark.parametrize(("text", "column", "says"), WRONG_MASKS)
def test_an_error_points_to_its_place(text: str, column: int, says: str) -> None:
    with pytest.raises(LanguageError) as caught:
        parse_mask(text, library.words(), Scope())
    head, shown, caret = str(caught.value).splitlines()
    assert says in head
    assert head.startswith(f"column {column}:")
    assert (shown, caret) == (f"    {text}", " " * (3 + column) + "^")


@pytest.mark.parametrize("text", ["__import__('os')", "(lambda: 0)()", "causal.x()", "[causal]", "causal if 1 else none"])
def test_nothing_is_executed(text: str) -> None:
    with pytest.raises(LanguageError):
        parse_mask(text, library.words(), Scope())


@pytest.mark.parametrize("text", ["~{}", "{} | causal"])
def test_a_mask_that_adds_keys_is_the_whole_or_an_operand_of_and(text: str) -> None:
    adding = 'neighborhood(3, edge="zero")'
    assert parse_mask(f"causal & {adding}", library.words(), GRID).adds_keys
    with pytest.raises(LanguageError, match="adds keys"):
        parse_mask(text.format(adding), library.words(), GRID)


def test_added_keys_go_to_the_denominator_of_a_softmax_only() -> None:
    seen = parse_mask('neighborhood(3, edge="zero")', library.words(), GRID)
    carried = with_phantoms(Variant(), seen)
    assert isinstance(carried, Variant)
    assert carried.normalizer.weight == SOFTMAX.weight
    sigmoid = parse_call("sigmoid", "normalizers", library.words(), Scope())
    assert isinstance(with_phantoms(Variant(normalizer=sigmoid), seen), Refusal)  # type: ignore[arg-type]


def test_a_number_per_head_is_read_at_layer_and_head() -> None:
    scope = Scope(data=frozenset({"alpha"}))
    alpha = table("alpha", layer, h, sort=Sort.REAL)
    assert parse_expression("alpha[h] / sqrt(dim)", library.words(), scope) == alpha / sqrt(dim)
    assert parse_expression("bias[h, q - k]", library.words(), Scope(strict=False)) == table("bias", h, q - k, sort=Sort.REAL)


def test_a_value_given_at_compile_time_is_a_number() -> None:
    assert parse_expression("w", library.words(), Scope(values={"w": 3})) == const(3)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("0 < q < k", "cannot be chained"),
        ("scor + 1", 'did you mean "score"'),
        ("sqrt(1, 2)", "takes 1 argument"),
        ("where(1, 2, 3)", "must be a truth value"),
        ("q << 1", "expected a number"),
    ],
)
def test_an_expression_that_means_nothing_is_an_error(text: str, says: str) -> None:
    with pytest.raises(LanguageError, match=says):
        parse_expression(text, library.words(), Scope())


WORKED_MASKS = [
    "causal & (window(1024) | sinks(4))",
    "causal & (span(spans.alpha, spans.beta, round=64) | sinks(64))",
    "queries(text) | keys(text) | neighborhood([8, 15, 26], stride=[1, 5, 13])",
    "queries(text) | keys(text) | ball(16)",
    "chunks([7, 7, 7], shift=[3, 3, 3])",
    "causal & permuted(window(256), random(seed=layer))",
    "causal & same(document) & window(4096)",
    "causal & ~window(64)",
    "causal & window(9, of=document)",
]


@pytest.mark.parametrize("text", WORKED_MASKS)
def test_the_worked_examples_can_be_read(text: str) -> None:
    scope = Scope(
        geometry=Geometry.of([16, 30, 52], before=512),
        roles={"text": IntegerSet.parse("0:512")},
        labels={"document": "document_ids"},
        data=frozenset({"spans", "alpha"}),
    )
    assert parse_mask(text, library.words(), scope).keep.sort is Sort.BOOL
    assert parse_expression("sqrt(log(k_len) / log(25472) / dim)", library.words(), scope).sort is Sort.REAL


@pytest.mark.parametrize("size", ["square", ["side", "side"]], ids=str)
def test_a_geometry_may_follow_from_the_length_or_a_value(size: str | list[int | str]) -> None:
    scope = Scope(geometry=Geometry.of(size, before=1, values={"side": 4}))
    keep = parse_mask("ball(2)", library.words(), scope).keep
    assert evaluate_scalar(keep, {q: 1, k: 1 + 5, k_len: 17})  # one step along both axes
    assert not evaluate_scalar(keep, {q: 1, k: 1 + 3, k_len: 17})


def test_what_was_parsed_can_be_pickled() -> None:
    seen = parse_mask("causal & window(3)", library.words(), Scope())
    assert pickle.loads(pickle.dumps(seen)) == seen
