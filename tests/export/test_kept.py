"""What the cache of a file has to hold under a mask: nothing that is let go is ever missed, or found elsewhere."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_compiler.algebra.evaluate import evaluate_scalar
from attn_compiler.algebra.expr import Expr, k, q
from attn_compiler.algebra.variant import Variant
from attn_compiler.export.kept import kept
from attn_compiler.planning.kept import Kept
from attn_compiler.testing import variant_of

ALIBI = "score + alibi()"
NEAR, FAR = {"mask": "causal & window(3)"}, {"mask": "causal & window(6)", "feature": "elu_one"}


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ("causal", None),
        ("causal & window(6)", Kept(0, 5)),
        ("causal & window(6) & dilated(2)", Kept(0, 5)),
        ("causal & (window(6) | sinks(2))", Kept(2, 5)),
        ("causal & (window(6) | sinks(2)) & window(9)", None),
        ("causal & same(document) & window(6)", None),
        ("causal & valid(there) & window(6)", Kept(0, 5)),
        ("causal & valid(there) & (window(6) | sinks(2))", None),
        ("causal & window(6) & chunks(4)", None),
        ("causal & span(0, 0.5)", None),
        ({"mask": "causal & window(6)", "score": ALIBI}, Kept(0, 5)),
        ({"mask": "causal & (window(6) | sinks(2))", "score": ALIBI}, None),
        ({"mask": "causal & window(6)", "scale": "log(k_len)"}, None),
        ({"heads": {"0:2": {"mask": "causal & window(3)"}, "rest": {"mask": "causal & window(6)"}}}, Kept(0, 5)),
        (FAR, Kept(0, 5)),
        (FAR | {"state": "decay(0.5)"}, Kept(0, 5)),
        (FAR | {"state": "gate(scalar)"}, None),
        ({"mix": {"how": "sum", "branches": {"near": NEAR, "far": FAR}}}, Kept(0, 5)),
        ({"mix": {"how": "sum", "branches": {"near": NEAR, "far": FAR | {"score": "score * k"}}}}, None),
        ({"mix": {"how": "sum", "branches": {"near": NEAR, "far": FAR}, "weights": {"far": "1 / (q + 1)"}}}, None),
        ({"mix": {"how": "lse", "branches": {"near": NEAR, "far": {"mask": "causal & ~window(3)"}}}}, None),
        ({"heads": {"0:2": "exact", "rest": {"mask": "causal & window(6)"}}}, None),
    ],
    ids=str,
)
def test_what_is_held_follows_from_the_mask(variant: str | Mapping[str, object], expected: Kept | None) -> None:
    assert kept(variant_of(variant), heads=4) == expected


def holds(mask: Expr, at: int, key: int) -> bool:
    return bool(evaluate_scalar(mask, {q: at, k: key}))


@given(st.integers(1, 6), st.integers(0, 4), st.integers(1, 4), st.integers(0, 40))
@settings(max_examples=60)
def test_a_mask_says_the_same_of_each_key_in_its_new_place(window: int, sinks: int, step: int, at: int) -> None:
    shown = f"window({window})" + (f" & dilated({step})" if step > 1 else "")
    mask = variant_of(f"causal & ({shown} | sinks({sinks}))" if sinks else f"causal & {shown}").mask
    held = kept(Variant(mask=mask), heads=1)
    assert held is not None
    size = held.first + held.latest
    tokens = [*range(held.first), *range(at - held.latest, at)] if at > size else [*range(at)]
    for place, token in enumerate([*tokens, at]):
        assert holds(mask, at, token) == holds(mask, len(tokens), place)
    assert not any(holds(mask, at, token) for token in range(at) if token not in tokens)
