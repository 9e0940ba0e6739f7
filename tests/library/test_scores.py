"""Every word for scores and normalizers against what is published about it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.t5.modeling_t5 import T5Attention

from attn_compiler import library
from attn_compiler.algebra.evaluate import evaluate_scalar
from attn_compiler.algebra.expr import (
    Expr,
    acc,
    const,
    dot,
    h,
    heads,
    k,
    k_len,
    k_norm,
    layer,
    mass,
    peak,
    q,
    q_norm,
    score,
)  # fmt: skip
from attn_compiler.algebra.variant import Normalizer
from attn_compiler.planning.language import Scope, parse_call, parse_expression

OPEN = Scope(strict=False)


def _parsed(text: str) -> Expr:
    return parse_expression(text, library.words(), OPEN)


@pytest.mark.parametrize("count", [1, 2, 6, 8, 12, 71])
def test_the_slopes_of_alibi_are_those_of_the_paper(count: int) -> None:
    published = build_alibi_tensor(torch.ones(1, 2), count, torch.float64).view(count, 2)[:, 1]
    bias = _parsed("alibi()")
    for head in range(count):
        found = evaluate_scalar(bias, {q: 5, k: 4, h: head, heads: count})
        assert math.isclose(-found, float(published[head]), rel_tol=1e-6)  # theirs are computed in float32


@pytest.mark.parametrize("causal", [False, True])
def test_buckets_are_those_of_t5(causal: bool) -> None:
    bias = _parsed(f"buckets(t, 128, count=32, causal={causal})")
    distances = range(-200, 201)
    published = T5Attention._relative_position_bucket(torch.tensor(distances), not causal, 32, 128).tolist()
    found = [evaluate_scalar(bias, {q: 300, k: 300 + n, h: 0}, {"t": lambda _, bucket: bucket}) for n in distances]
    assert found == published


PLACE = {q: 7, k: 3, h: 1, score: -1.5, dot: 6.0, q_norm: 2.0, k_norm: 4.0, k_len: 10}
TABLES = {"bias": lambda head, at: 100.0 * head + at}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("softcap(score, 2)", 2 * math.tanh(-0.75)),
        ("decay(0.5)", -2.0),
        ("alibi(0.5)", -2.0),
        ("relative(bias)", 100.0 + 4 + 9),
        ("relative(bias, 5)", 100.0 + 4 + 4),
        ('add_keys("0:4", 2.5)', 2.5),
        ('add_keys("4:", 2.5)', 0.0),
        ('scale_keys("0:4", 1.5)', 0.75),
        ("gaussian(2)", -2.0),
        ("cosine(0.5)", 1.5),
    ],
)
def test_a_score_is_what_its_definition_says(text: str, expected: float) -> None:
    assert math.isclose(evaluate_scalar(_parsed(text), PLACE, TABLES), expected, rel_tol=1e-12)


NORMALIZERS = ["softmax", "softmax(sink=s)", "softmax_one", "sigmoid", "sigmoid(bias=-1.5)", "relu", 'relu(divide="k_len")']


def _row(normalizer: Normalizer, scores: list[float], values: list[float], top: float) -> float:
    env = {h: 0, layer: 0, k_len: len(scores), peak: top}
    weights = [float(evaluate_scalar(normalizer.weight, {**env, score: x})) for x in scores]
    env |= {mass: sum(weights), acc: sum(w * v for w, v in zip(weights, values, strict=True))}
    return float(evaluate_scalar(normalizer.output, env, {"s": [0.7]}))


def _plain(text: str, scores: list[float], values: list[float]) -> float:
    name = text.partition("(")[0]
    if name == "sigmoid":
        weights, total = [1 / (1 + math.exp(-(x - (1.5 if "bias" in text else 0)))) for x in scores], 1.0
    elif name == "relu":
        weights, total = [max(x, 0.0) for x in scores], float(len(scores))
    else:
        weights = [math.exp(x) for x in scores]
        total = sum(weights) + {"softmax": 0.0, "softmax_one": 1.0}[name] + (math.exp(0.7) if "sink" in text else 0.0)
    return sum(w * v for w, v in zip(weights, values, strict=True)) / total


@pytest.mark.parametrize("text", NORMALIZERS)
@given(scores=st.lists(st.floats(-4, 4), min_size=1, max_size=5), shift=st.floats(-3, 3))
def test_a_normalizer_is_its_formula_whatever_the_peak(text: str, scores: list[float], shift: float) -> None:
    normalizer = parse_call(text, "normalizers", library.words(), OPEN)
    assert isinstance(normalizer, Normalizer)
    values = [math.cos(3 * n) + 2 for n in range(len(scores))]
    expected = _plain(text, scores, values)
    for top in (max(scores), max(scores) + shift):
        assert math.isclose(_row(normalizer, scores, values, top), expected, rel_tol=1e-9, abs_tol=1e-12)


def test_every_word_for_scores_is_tested_here() -> None:
    tested = {"alibi", "buckets", "softcap", "decay", "relative", "add_keys", "scale_keys", "gaussian", "cosine"}
    assert set(library.words()["scores"]) == tested
    assert set(library.words()["normalizers"]) == {text.partition("(")[0] for text in NORMALIZERS} | {"linear", "local_linear"}


def test_alibi_adds_to_a_capped_score() -> None:
    assert _parsed("softcap(score, 50) + alibi(2)") == _parsed("softcap(score, 50)") + _parsed("alibi(2)")
    assert _parsed("decay(2)").mentions(const(2))
