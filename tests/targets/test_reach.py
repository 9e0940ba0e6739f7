"""What is known of a mask before any tensor is seen."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from attn_compiler.algebra import expr as e
from attn_compiler.algebra.evaluate import evaluate_scalar
from attn_compiler.targets.reach import Reach, is_causal, reach, shows_itself
from attn_compiler.testing import random_case

CAUSAL = e.k <= e.q


def test_sinks_become_a_prefix_before_a_window() -> None:
    assert reach(CAUSAL & ((e.q - e.k < 8) | (e.k < 4))) == Reach(nearest=0, farthest=7, prefix=4)


def test_a_causal_mask_alone_has_no_reach() -> None:
    assert reach(CAUSAL) is None


def test_only_k_up_to_q_is_causal() -> None:
    assert is_causal(CAUSAL)
    assert is_causal(e.k < e.q + 1)
    assert not any(map(is_causal, (e.k < e.q, e.true, CAUSAL & (e.q - e.k < 5))))


@given(st.integers(0, 5000), st.integers(0, 40), st.integers(0, 40))
def test_nothing_is_visible_beyond_the_reach_of_a_mask(seed: int, q: int, k: int) -> None:
    mask = random_case(seed).variant.mask
    within = reach(mask)
    if mask.tables() or evaluate_scalar(mask, {e.q: q, e.k: k, e.kv: 0}) is False:
        return
    assert within is None or k < within.prefix or within.nearest <= q - k <= within.farthest
    assert q != k or evaluate_scalar(mask, {e.q: q, e.k: k, e.kv: 0}) or not shows_itself(mask)
