"""Delta rules: the reference is the recurrence, and chunks and kernels compute what it does, gradients included."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import attn_compiler as attn
from attn_compiler.algebra import wire
from attn_compiler.errors import ShapeError
from attn_compiler.testing import Case, assert_case, assert_within_budget, drawn_case, variant_of

TOKENS = 150
GENERATOR = torch.Generator().manual_seed(4)
TABLES = {
    "beta": torch.rand(2, 4, TOKENS, generator=GENERATOR, dtype=torch.float64),
    "gate": torch.rand(2, 4, TOKENS, generator=GENERATOR, dtype=torch.float64).sigmoid().log().cumsum(-1),
    "padding": torch.arange(TOKENS) >= torch.tensor([[0], [37]]),
}
VARIANTS: Mapping[str, Mapping[str, object]] = {
    "delta": {"feature": "cosine", "state": "delta", "mask": "causal"},
    "gated": {"feature": "cosine", "state": "gated_delta", "mask": "causal", "scale": "1 / sqrt(dim)"},
    "gated, padded": {"feature": "cosine", "state": "gated_delta", "mask": "causal & valid(padding)"},
}


def case_of(name: str, q_len: int, k_len: int, kv_heads: int) -> Case:
    tables = {table: values[..., :k_len] for table, values in TABLES.items()}
    return drawn_case(VARIANTS[name], tables, q_len, k_len, kv_heads=kv_heads)


def recurrent(case: Case, *, gated: bool, scale: float) -> Tensor:
    """S = α S (1 - β k kᵀ) + β v kᵀ, token by token, as Gated DeltaNet writes it."""
    ratio = case.q.shape[1] // case.k.shape[1]
    q, k = (F.normalize(x, dim=-1) for x in (case.q, case.k))
    k, v = (x.repeat_interleave(ratio, dim=1) for x in (k, case.v))
    state, out, first = q.new_zeros(2, 4, 8, 8), [], k.shape[2] - q.shape[2]
    for t in range(k.shape[2]):
        valid = case.tables["padding"][:, t, None, None] if "padding" in case.tables else torch.ones((), dtype=torch.bool)
        key, beta = k[:, :, t] * valid.reshape(-1, 1, 1), case.tables["beta"][:, :, t, None]
        if gated and t:
            state = state * (case.tables["gate"][:, :, t] - case.tables["gate"][:, :, t - 1]).exp()[..., None, None]
        differs = v[:, :, t] - (key[..., None] * state).sum(-2)
        state = state + key[..., None] * (beta * differs)[..., None, :]
        if t >= first:
            out.append((q[:, :, t - first, :, None] * state).sum(-2) * scale)
    return torch.stack(out, dim=2)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(("q_len", "k_len", "kv_heads"), [(70, 70, 2), (3, 20, 4), (1, 1, 1)])
def test_the_meaning_is_the_recurrence(name: str, q_len: int, k_len: int, kv_heads: int) -> None:
    case = case_of(name, q_len, k_len, kv_heads)
    found = attn.reference(case.q, case.k, case.v, case.variant, tables=case.tables)
    exact = recurrent(case, gated=name != "delta", scale=8**-0.5 if name == "gated" else 1.0)
    assert isinstance(found, Tensor)
    assert_within_budget(found, exact, exact, name)


@pytest.mark.parametrize("target", ["torch", "cpp"])
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(("q_len", "k_len", "kv_heads"), [(TOKENS, TOKENS, 2), (67, 97, 4), (64, 128, 1)])
def test_chunks_and_their_gradients_are_those_of_the_meaning(
    name: str, target: str, q_len: int, k_len: int, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("attn_compiler.targets.gathered.pays", "attn_compiler.runtime.linear.pays"):
        monkeypatch.setattr(module, lambda *_: True)
    assert_case(case_of(name, q_len, k_len, kv_heads), torch.float32, target)


def test_a_delta_rule_travels_as_text() -> None:
    variant = variant_of(VARIANTS["gated"])
    assert wire.read(wire.write(variant)) == variant
    assert variant.delta is not None
    assert variant.normalizer.output == variant_of(VARIANTS["delta"]).normalizer.output


@pytest.mark.parametrize(
    ("slots", "target", "said"),
    [
        (VARIANTS["delta"], "flex", "carry"),
        ({"state": "delta"}, "torch", "a delta rule goes from key to key"),
        ({"state": "delta", "mask": "causal", "normalizer": "linear(mean)"}, "torch", "its denominator counts keys"),
    ],
)
def test_who_cannot_carry_a_delta_rule_says_so(slots: Mapping[str, object], target: str, said: str) -> None:
    case = case_of("delta", 20, 20, 2)
    with pytest.raises(ShapeError, match=f"the target {target}: .*{said}"):
        attn.attend(case.q.float(), case.k.float(), case.v.float(), slots, tables=case.tables, target=target)  # type: ignore[arg-type]
