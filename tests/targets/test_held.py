"""What queries see of the past: no key that is let go is ever missed, where places are known."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_compiler.algebra.evaluate import evaluate_scalar
from attn_compiler.algebra.expr import k, q
from attn_compiler.algebra.variant import Variant
from attn_compiler.planning.kept import Kept, together
from attn_compiler.targets.held import seen
from attn_compiler.targets.held_past import is_state
from attn_compiler.testing import variant_of

ALIBI = "score + alibi()"
NEAR, FAR = {"mask": "causal & window(3)"}, {"mask": "causal & window(6)", "feature": "elu_one"}


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ("causal", None),
        ("causal & window(6)", Kept(0, 5)),
        ("causal & (window(6) | sinks(2))", Kept(2, 5)),
        ("causal & (window(6) | sinks(2)) & window(9)", Kept(0, 8)),
        ("causal & same(document) & window(6)", Kept(0, 5)),
        ("causal & window(6) & chunks(4)", Kept(0, 5)),
        ("causal & span(0, 0.5)", None),
        ({"mask": "causal & (window(6) | sinks(2))", "score": ALIBI}, Kept(2, 5)),
        ({"mask": "causal & window(6)", "scale": "log(k_len)"}, None),
        ({"heads": {"0:2": {"mask": "causal & (window(3) | sinks(1))"}, "rest": {"mask": "causal & window(6)"}}}, Kept(1, 5)),
        ({"heads": {"0:2": "exact", "rest": {"mask": "causal & window(6)"}}}, None),
        (FAR | {"state": "delta(beta)"}, None),
        ({"mix": {"how": "sum", "branches": {"near": NEAR, "far": FAR | {"score": "score * k"}}}}, Kept(0, 5)),
    ],
    ids=str,
)
def test_what_is_seen_follows_from_the_mask(variant: str | Mapping[str, object], expected: Kept | None) -> None:
    assert seen(variant_of(variant), heads=4) == expected


def test_what_serves_several_serves_each() -> None:
    assert together([Kept(0, 5), Kept(2, 3)]) == Kept(2, 5)
    assert together([Kept(0, 5), None]) is None
    assert together([]) is None
    assert Kept(2, 5).covers(Kept(0, 5))
    assert not Kept(2, 5).covers(Kept(0, 6))
    assert not Kept(2, 5).covers(None)


@given(st.integers(1, 6), st.integers(0, 4), st.integers(1, 4), st.integers(1, 9), st.integers(0, 40))
@settings(max_examples=60)
def test_no_query_sees_what_is_let_go(window: int, sinks: int, step: int, chunk: int, at: int) -> None:
    near = f"window({window}) & dilated({step})" if step > 1 else f"window({window})"
    mask = variant_of(f"causal & ({near} | sinks({sinks})) & (window({chunk}) | window(7))" if sinks else f"causal & {near}").mask
    held = seen(Variant(mask=mask), heads=1)
    assert held is not None
    gone = range(held.first, max(held.first, at - held.latest))
    assert not any(evaluate_scalar(mask, {q: at, k: key}) for key in gone)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, True),
        ({"state": "decay((h + 1) / 8)"}, True),
        ({"mask": "causal & ~window(4)"}, False),
        ({"mask": "causal & sinks(4)"}, False),
        ({"mask": "causal & strided(1, 2)"}, False),
        ({"scale": "1 / (q + 1)"}, False),
        ({"scale": "1 / k_len"}, False),
    ],
    ids=str,
)
def test_a_state_alone_does_for_what_knows_no_places(changed: dict[str, object], expected: bool) -> None:
    variant = variant_of({"feature": "elu_one", "mask": "causal", "normalizer": "linear(none)", **changed})
    assert is_state(variant) is expected
