"""`extra` and `drop`: keys that a variant brings along, and tokens that nobody sees, against dense formulas, on every target."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attn_compiler as attn
from adaptation.small import VOCABULARY, Model
from attn_compiler import attend, step
from attn_compiler.algebra import wire
from attn_compiler.algebra.variant import Variant
from attn_compiler.errors import AttnError, ShapeError
from attn_compiler.library import load_policy
from attn_compiler.planning.parameter_file import write_parameters
from attn_compiler.planning.resolve import asked_of
from attn_compiler.planning.site import Frame, Kind, Phase, Site
from attn_compiler.testing import Case, assert_case, assert_within_budget, variant_of

HEADS, KV_HEADS, TOKENS, DIM, COUNT = 4, 2, 21, 8, 3
DISTANCE = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)
CAUSAL = DISTANCE >= 0


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


Q, K, V = (drawn(2, heads, TOKENS, DIM, seed=seed) for seed, heads in enumerate((HEADS, KV_HEADS, KV_HEADS)))
TABLES = {
    "memory_k": drawn(2, KV_HEADS, COUNT, DIM, seed=3),
    "memory_v": drawn(2, KV_HEADS, COUNT, DIM, seed=4),
    "gone": torch.arange(TOKENS) % 3 == torch.tensor([[1], [2]]),
    "bias": drawn(HEADS, TOKENS, TOKENS, seed=5),
}


def by_hand(seen: Tensor, bias: Tensor | float = 0.0, of_row: bool = False, last: int = TOKENS) -> Tensor:
    """Softmax over the keys that a variant brings along and those of the tokens that are seen."""
    pick = slice(None) if of_row else slice(1, 2)
    k, v = (torch.cat([TABLES[name][pick].expand(2, -1, -1, -1), x], dim=2) for name, x in (("memory_k", K), ("memory_v", V)))
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (k, v))
    scores = Q[:, :, -last:] @ k.mT * DIM**-0.5
    scores = scores + F.pad(bias[..., -last:, :], (COUNT, 0)) if isinstance(bias, Tensor) else scores
    seen = F.pad(seen.expand(2, 1, TOKENS, TOKENS)[:, :, -last:], (COUNT, 0), value=True)
    return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v


KEPT = ~TABLES["gone"][:, None, None]
FAR = DISTANCE.abs()[None].double() * -(2.0 ** (-8 * torch.arange(1, HEADS + 1, dtype=torch.float64) / HEADS))[:, None, None]
CASES: Mapping[str, tuple[Mapping[str, object], Tensor]] = {
    "all tokens": ({"context": "extra(memory, 3)"}, by_hand(CAUSAL | True)),
    "a window": ({"mask": "causal & window(4)", "context": "extra(memory, 3)"}, by_hand(CAUSAL & (DISTANCE < 4))),
    "a bias": (
        {"mask": "causal", "score": "score + bias[h, q, k]", "context": "extra(memory, 3)"},
        by_hand(CAUSAL, TABLES["bias"]),
    ),
    "distances": ({"mask": "causal", "score": "score + alibi()", "context": "extra(memory, 3)"}, by_hand(CAUSAL, FAR)),
    "rows of a call": ({"mask": "causal", "context": "extra(memory, 3, per_row=True)"}, by_hand(CAUSAL, of_row=True)),
    "fewer tokens": ({"mask": "causal", "context": ["drop(gone)", "extra(memory, 3)"]}, by_hand(CAUSAL & KEPT)),
}


def read(slots: Mapping[str, object]) -> Case:
    variant = variant_of(slots, heads=HEADS, kv_heads=KV_HEADS, length=TOKENS, dim=DIM)
    return Case(variant, Q, K, V, {name: TABLES[name] for name in variant.tables()})


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("target", ["reference", "torch"])
def test_every_query_sees_the_keys_that_a_variant_brings_along(name: str, target: str) -> None:
    slots, expected = CASES[name]
    case = read(slots)
    found = attend(Q, K, V, case.variant, tables=case.tables, layer=1, layers=2, target=target)  # type: ignore[arg-type]
    assert isinstance(found, Tensor)
    assert_within_budget(found, expected, expected * (1 + 1e-14))
    assert wire.read(wire.write(case.variant)) == case.variant


@pytest.mark.parametrize("positions", [None, TOKENS - 5])
def test_the_last_queries_see_them_too(positions: int | None) -> None:
    case = read(CASES["a window"][0])
    found = attend(Q[:, :, -5:], K, V, case.variant, tables=case.tables, layer=1, layers=2, q_positions=positions)
    assert isinstance(found, Tensor)
    expected = by_hand(CAUSAL & (DISTANCE < 4), last=5)
    assert_within_budget(found, expected, expected * (1 + 1e-14))


@pytest.mark.parametrize(("target", "dtype"), [("torch", torch.bfloat16), ("cpp", torch.float32)])
@pytest.mark.parametrize("name", CASES)
def test_targets_carry_them_with_their_gradients(name: str, target: str, dtype: torch.dtype) -> None:
    assert_case(read(CASES[name][0]), dtype, target)


@pytest.mark.parametrize(
    "slots",
    [
        {"mask": "causal", "feature": "elu_one", "context": "extra(memory, 3)"},
        {"context": ["pool(4)", "extra(memory, 3)"]},
        {"mask": "causal", "context": "extra(memory, 3)", "heads": {"0:2": {"mask": "causal & window(4)"}, "rest": {}}},
    ],
)
def test_linear_attention_pools_and_groups_of_heads_see_them(slots: Mapping[str, object]) -> None:
    assert_case(read(slots), torch.float32, "torch" if "feature" in slots else "cpp")


@pytest.mark.parametrize("target", ["torch", "cpp"])
def test_agents_stand_behind_them(target: str) -> None:
    """Agents bring a key for each query head, and those in front are of the key head that it shares."""
    agents = F.adaptive_avg_pool1d(Q.flatten(0, 1).mT, 6).mT.unflatten(0, (2, HEADS))
    k, v, of_k, of_v = (
        x.repeat_interleave(2, dim=1)
        for x in (K, V, *(TABLES[name][1:].expand(2, -1, -1, -1) for name in ("memory_k", "memory_v")))
    )
    gathered = (agents @ k.mT * DIM**-0.5).softmax(-1) @ v
    keys, values = torch.cat([of_k, agents], dim=2), torch.cat([of_v, gathered], dim=2)
    expected = (Q @ keys.mT * DIM**-0.5).softmax(-1) @ values
    case = read({"context": ["agents(6)", "extra(memory, 3)"]})
    found = attend(Q, K, V, case.variant, tables=case.tables, layer=1, layers=2, target="reference")
    assert isinstance(found, Tensor)
    assert_within_budget(found, expected, expected * (1 + 1e-14))
    assert_case(case, torch.float32, target)


def test_a_dropped_token_is_seen_by_nobody_and_a_query_that_sees_nothing_gets_zero() -> None:
    k, v = (x.repeat_interleave(2, dim=1) for x in (K, V))
    gone = {"gone": TABLES["gone"] | (torch.arange(TOKENS) == 0)}
    nothing = CAUSAL & ~gone["gone"][:, None, None]
    expected = (Q @ k.mT * DIM**-0.5).masked_fill(~nothing, -torch.inf).softmax(-1).nan_to_num() @ v
    found = attend(Q, K, V, {"mask": "causal", "context": "drop(gone)"}, tables=gone)
    assert isinstance(found, Tensor)
    assert (found[:, :, 0] == 0).all()
    assert_within_budget(found, expected, expected * (1 + 1e-14))


def test_tokens_that_are_dropped_beside_heads_are_dropped_for_a_named_variant_too() -> None:
    site = Site(
        "attn", Kind.SELF, Phase.PREFILL, 0, 1, 2, HEADS, HEADS, TOKENS, TOKENS, DIM, DIM, "float64", Variant(), Frame(), TOKENS,
        TOKENS,
    )  # fmt: skip
    rule = {"attn": {"context": "drop(gone)", "heads": {"0:2": "near", "rest": {"mask": "causal"}}}}
    roles, near = {"gone": {"given": "gone"}}, {"mask": "causal & window(4)"}
    asked = asked_of(load_policy({"version": 1, "roles": roles, "variants": {"near": near}, "rules": [rule]}), site)
    assert isinstance(asked.variant, Variant), asked.variant
    assert [group.tables() for _, group in asked.variant.groups] == [{"gone"}, {"gone"}]


@pytest.mark.parametrize(
    ("slots", "said"),
    [
        ({"mask": "causal", "feature": "cosine", "state": "delta", "context": "extra(memory)"}, "are no tokens"),
        ({"mask": "causal", "storage": {"kv_cache": "int8"}, "context": "extra(memory)"}, "are no tokens"),
        ({"context": ["extra(memory)", "pool(2)"]}, "comes last"),
        ({"context": ["drop(gone)", "pool(2)"]}, "asks where keys stand"),
    ],
)
def test_what_makes_no_sense_is_refused(slots: Mapping[str, object], said: str) -> None:
    with pytest.raises(AttnError, match=said):
        attend(Q, K, V, slots, tables=TABLES)


def test_no_state_holds_them() -> None:
    with pytest.raises(ShapeError, match="the past of this variant is no state"):
        step(Q, K, V, {"mask": "causal", "feature": "elu_one", "context": "extra(memory, 3)"}, tables=TABLES)


def test_a_model_owns_them(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(
        "version: 1\nparameters: memory.safetensors\nrules:\n  - {match: {kind: self}, untrained: allow, attn: "
        "{context: 'extra(memory, 3)'}}\n"
    )
    tokens = torch.randint(0, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))
    adapted = attn.adapt(Model(), path, (tokens,))
    shapes = {name: list(x.shape) for name, x in adapted.learned.items()}
    assert shapes == {"memory_k": [2, 2, 3, 8], "memory_v": [2, 2, 3, 8]}
    adapted(tokens).sum().backward()
    assert all(x.grad is not None for x in adapted.learned.values())


class Attention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, is_causal=True)


def test_they_are_part_of_an_exported_model(tmp_path: Path) -> None:
    values = {name: TABLES[name][:1].repeat_interleave(2, dim=1).float().numpy() for name in ("memory_k", "memory_v")}
    write_parameters(tmp_path / "memory.safetensors", values, 1)
    rule = {"match": {}, "attn": {"mask": "causal & window(4)", "context": "extra(memory, 3)"}, "fallback": "error"}
    policy = {"version": 1, "parameters": str(tmp_path / "memory.safetensors"), "rules": [rule]}
    report = attn.export_onnx(Attention().eval(), (Q.float(),), tmp_path / "one.onnx", policy)
    assert "checked in onnxruntime" in str(report)
