"""Branches that work on q and k before the rotary embedding, and on the input of the block: against dense formulas."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attn_compiler as attn
from attn_compiler.backend import attn_eagerly
from attn_compiler.errors import RefusedError
from attn_compiler.library import folder
from attn_compiler.runtime import gather, linear
from attn_compiler.targets import gathered
from attn_compiler.testing import assert_all_within_budget, assert_within_budget

HEADS, KV_HEADS, DIM, WIDTH, TOKENS = 4, 2, 8, 24, 140
DISTANCE = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)


def turned(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat([-x[..., half:], x[..., :half]], dim=-1)


class Attention(nn.Module):
    """As Llama's, with rotary embeddings and heads that share keys."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, n * DIM, bias=False) for n in (HEADS, KV_HEADS, KV_HEADS))
        self.norm = nn.LayerNorm(WIDTH)

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (f(x).unflatten(-1, (-1, DIM)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return q, k, v

    def rotated(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[2], dtype=x.dtype)[:, None] * 100.0 ** -torch.arange(0, 1, 2 / DIM, dtype=x.dtype)
        angles = torch.cat([angles, angles], dim=-1)
        return x * angles.cos() + turned(x) * angles.sin()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.operands(self.norm(x))
        return F.scaled_dot_product_attention(self.rotated(q), self.rotated(k), v, is_causal=True, enable_gqa=True)


class Crossed(Attention):
    def forward(self, x: Tensor) -> Tensor:
        q, _, _ = self.operands(x)
        _, k, v = self.operands(self.norm(x))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def model(kind: type[Attention] = Attention) -> tuple[Attention, Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = kind().eval()
    for parameter in made.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 3
    return made, torch.randn(2, TOKENS, WIDTH, generator=generator)


def with_parameters(of: nn.Module, x: Tensor, slots: Mapping[str, object]) -> tuple[nn.Module, dict[str, Tensor]]:
    """The adapted model with random parameters, and these in float64."""
    rule = {"match": {}, "attn": slots, "untrained": "allow"}
    adapted = attn.adapt(of, {"version": 1, "parameters": "to_be_trained.safetensors", "rules": [rule]}, (x,))
    generator = torch.Generator().manual_seed(1)
    for _, parameter in sorted(adapted.learned.items()):
        parameter.data = torch.randn(parameter.shape, generator=generator) / 3
    return adapted, {name: value.detach().double()[0] for name, value in adapted.learned.items()}


def running(x: Tensor, p: Mapping[str, Tensor]) -> Tensor:
    """The running logs of gates, [batch, heads, tokens]."""
    opened = (x @ p["gate_x"].T).mT + (p["gate_bias"] - 4)[:, None]
    return (-p["gate_rate"].exp()[:, None] * F.softplus(opened)).cumsum(-1)


def lizard(of: Attention, x: Tensor, p: Mapping[str, Tensor], *, unrotated: bool = True) -> Tensor:
    """The quadratic form of the paper, its window shortened."""
    x = of.norm(x)
    q, k, v = of.operands(x)
    k, v = (y.repeat_interleave(HEADS // KV_HEADS, dim=1) for y in (k, v))
    soft = (of.rotated(q) @ of.rotated(k).mT / math.sqrt(DIM)).exp() * ((DISTANCE >= 0) & (DISTANCE < 16))
    anchor = soft @ v / (soft.sum(-1, keepdim=True) + p["meta"].exp()[:, None, None])
    of_q, of_k = (y @ p[f"hedgehog_{n}"] for n, y in (("q", q), ("k", k)))
    of_q, of_k = (torch.cat([y.exp(), (-y).exp()], dim=-1) for y in (of_q, of_k))
    log = running(x, p)
    weights = of_q @ of_k.mT * (log[..., None] - log[..., None, :]).clamp(max=0).exp() * (DISTANCE >= 0)
    return p["alpha"][:, None, None] * anchor + weights @ v / (weights.sum(-1, keepdim=True) + 1e-6)


def infinitevl(of: Attention, x: Tensor, p: Mapping[str, Tensor]) -> Tensor:
    """One of its linear layers, token by token."""
    x = of.norm(x)
    q, k, v = of.operands(x)
    q, k = (F.normalize(of.rotated(y), dim=-1) for y in (q, k))
    k, v = (y.repeat_interleave(HEADS // KV_HEADS, dim=1) for y in (k, v))
    log, beta = running(x, p), (x @ p["beta_x"].T).mT.sigmoid()
    state, rows = x.new_zeros(2, HEADS, DIM, DIM), []
    for t in range(TOKENS):
        gate = (log[..., t] - (log[..., t - 1] if t else 0)).exp()
        state = state * gate[..., None, None]
        new = beta[..., t, None] * (v[:, :, t] - (k[:, :, t, None] @ state)[:, :, 0])
        state = state + k[:, :, t, :, None] * new[:, :, None]
        rows.append((q[:, :, t, None] @ state)[:, :, 0] / math.sqrt(DIM))
    out = torch.stack(rows, dim=2)
    out = out / (out.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return out * F.silu(torch.einsum("btc,hcd->bhtd", x, p["output_gate_x"]))


def gla(of: Attention, x: Tensor, p: Mapping[str, Tensor]) -> Tensor:
    """One of its layers, token by token."""
    x = of.norm(x)
    q, k, v = of.operands(x)
    q, k = of.rotated(q), of.rotated(k)
    k, v = (y.repeat_interleave(HEADS // KV_HEADS, dim=1) for y in (k, v))
    opened = torch.einsum("btc,hcd->bhtd", x, p["gate_x"]) + p["gate_bias"][:, None]
    state, rows = x.new_zeros(2, HEADS, DIM, DIM), []
    for t in range(TOKENS):
        state = opened[:, :, t].sigmoid().pow(1 / 16)[..., None] * state + k[:, :, t, :, None] * v[:, :, t, None]
        rows.append((q[:, :, t, None] @ state)[:, :, 0] / math.sqrt(DIM))
    out = torch.stack(rows, dim=2)
    out = out / (out.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return out * F.silu(torch.einsum("btc,hcd->bhtd", x, p["output_gate_x"]))


def slots_of(name: str) -> dict[str, object]:
    """What a ready policy asks of a linear layer, its window shortened."""
    from yaml import safe_load

    text = (folder("patterns") / "policies" / f"{name}.yaml").read_text().replace("window(128)", "window(16)")
    return safe_load(text)["rules"][-1]["attn"]  # type: ignore[no-any-return]


@pytest.mark.parametrize(("name", "formula"), [("lizard", lizard), ("infinitevl", infinitevl), ("gla", gla)])
def test_a_ready_policy_reads_the_input_of_the_block(name: str, formula: object) -> None:
    of, x = model()
    adapted, parameters = with_parameters(of, x, slots_of(name))
    with torch.no_grad():
        found = adapted(x)
        plain = formula(of, x, {name: value.float() for name, value in parameters.items()})  # type: ignore[operator]
        exact = formula(of.double(), x.double(), parameters)  # type: ignore[operator]
    assert_within_budget(found, exact, plain)


def test_linear_attention_by_itself_may_work_before_the_rotary_embedding() -> None:
    of, x = model()
    slots = {"mask": "causal", "feature": "elu_one", "operands": {"q": "q_unrotated", "k": "k_unrotated"}}
    policy = {"version": 1, "rules": [{"match": {}, "attn": slots, "fallback": "error"}]}

    def formula(by: Attention, given: Tensor) -> Tensor:
        q, k, v = by.operands(by.norm(given))
        k, v = (y.repeat_interleave(HEADS // KV_HEADS, dim=1) for y in (k, v))
        weights = (F.elu(q) + 1) @ (F.elu(k) + 1).mT * (DISTANCE >= 0)
        return weights @ v / (weights.sum(-1, keepdim=True) + 1e-6)

    with torch.no_grad():
        found = torch.compile(of, backend=attn_eagerly, options={"policy": policy})(x)
        plain = formula(of, x)
        assert_within_budget(found, formula(of.double(), x.double()), plain)


@pytest.mark.parametrize("name", ["infinitevl", "gla"])
def test_gates_are_trained_through_the_input_of_the_block(name: str) -> None:
    of, x = model()
    adapted, _ = with_parameters(of, x, slots_of(name))
    adapted(x).square().sum().backward()
    assert all(value.grad is not None and value.grad.abs().max() > 0 for value in adapted.learned.values())


def test_a_gate_for_each_feature_runs_and_trains_by_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (gathered, linear):
        monkeypatch.setattr(module, "pays", lambda *_: True)
    monkeypatch.setattr(linear, "gain", lambda **_: 2.0)
    run, runs = gather.run, []
    monkeypatch.setattr(gather, "run", lambda call: runs.append(call.reverse) or run(call))
    of, x = model()
    adapted, parameters = with_parameters(of, x, slots_of("gla"))

    def trained(found: Tensor, of_these: Iterable[Tensor]) -> list[Tensor]:
        return [found, *torch.autograd.grad((found * found.detach().sin()).sum(), list(of_these))]

    def by_formula(dtype: torch.dtype) -> list[Tensor]:
        p = {name: value.to(dtype).requires_grad_() for name, value in parameters.items()}
        return trained(gla(copy.deepcopy(of).to(dtype), x.to(dtype), p), p.values())

    found = trained(adapted(x), (adapted.learned[name] for name in parameters))
    assert runs == [False, False, True, True]  # forward, and the gradients of q, of k and of v
    joined = [found[0], *(gradient[0] for gradient in found[1:])]
    assert_all_within_budget(joined, by_formula(torch.float64), lambda: by_formula(torch.float32), ["output", *parameters])


@pytest.mark.parametrize(
    ("operands", "said"),
    [({"gate": "x"}, "nobody knows the input of the block"), ({"k": "k_unrotated"}, "nobody knows k before a rotary embedding")],
)
def test_what_no_graph_proves_is_refused(operands: Mapping[str, str], said: str) -> None:
    of, x = model(Crossed)
    slots = {"mask": "causal", "feature": "elu_one", "operands": operands}
    with pytest.raises(RefusedError, match=said):
        with_parameters(of, x, slots)


def test_gates_of_more_features_than_a_head_has_numbers_follow_from_no_input() -> None:
    of, x = model()
    slots = {"mask": "causal", "feature": "hedgehog", "state": "gate(vector)", "operands": {"gate": "x"}}
    with pytest.raises(RefusedError, match="number by number of a head, and its features are more or fewer"):
        with_parameters(of, x, slots)


def test_a_gate_for_each_feature_is_a_table_of_the_policy() -> None:
    of, x = model()
    log = torch.rand(2, HEADS, TOKENS, DIM, generator=torch.Generator().manual_seed(3), dtype=torch.float64).log().cumsum(2)
    rule = {"match": {}, "attn": {"mask": "causal", "feature": "elu_one", "state": "gate(vector)"}, "fallback": "error"}
    policy = {"version": 1, "labels": {"gate": {"given": "gate"}}, "rules": [rule]}

    def formula(by: Attention, given: Tensor) -> Tensor:
        q, k, v = by.operands(by.norm(given))
        k, v = (y.repeat_interleave(HEADS // KV_HEADS, dim=1) for y in (by.rotated(k), v))
        of_q, of_k = (F.elu(y) + 1 for y in (by.rotated(q), k))
        left = (log[..., :, None, :] - log[..., None, :, :]).clamp(max=0).exp().to(given.dtype)
        weights = torch.einsum("bhid,bhjd,bhijd->bhij", of_q, of_k, left) * (DISTANCE >= 0)
        return weights @ v / (weights.sum(-1, keepdim=True) + 1e-6)

    with torch.no_grad():
        found = torch.compile(of, backend=attn_eagerly, options={"policy": policy, "tables": {"gate": log}})(x)
        plain = formula(of, x)
        assert_within_budget(found, formula(of.double(), x.double()), plain)


def llama() -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    of = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1)).eval()
    return of, {"input_ids": torch.zeros(1, 24, dtype=torch.int64)}


def gpt2() -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import GPT2Config, GPT2LMHeadModel

    of = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4)).eval()
    return of, {"input_ids": torch.zeros(1, 24, dtype=torch.int64)}


def whisper() -> tuple[nn.Module, dict[str, Tensor]]:
    """Queries and keys of its decoder's second attention have nothing in common."""
    from transformers.models.whisper.modeling_whisper import WhisperAttention, WhisperConfig

    of = WhisperAttention(32, 4, is_decoder=True, layer_idx=0, config=WhisperConfig(d_model=32)).eval()
    return of, {"hidden_states": torch.randn(1, 24, 32), "key_value_states": torch.randn(1, 24, 32)}


@pytest.mark.parametrize(("made", "width", "rotated"), [(llama, 32, True), (gpt2, 32, False), (whisper, 0, False)])
def test_the_input_of_a_block_is_found_in_models(made: object, width: int, rotated: bool) -> None:
    of, inputs = made()  # type: ignore[operator]
    (site,) = attn.explain(of, (), {**inputs, **({"use_cache": False} if made is not whisper else {})}).sites
    assert (site.input_width, site.rotated) == (width, rotated)


def test_gates_of_tokens_whose_input_is_gone_are_refused() -> None:
    of, inputs = llama()
    past = of(**inputs).past_key_values
    slots = {"mask": "causal", "feature": "elu_one", "state": "gate(scalar)", "operands": {"gate": "x"}}
    policy = {"version": 1, "rules": [{"match": {}, "attn": slots, "untrained": "allow"}]}
    report = attn.explain(of, (), {"input_ids": torch.zeros(1, 1, dtype=torch.int64), "past_key_values": past}, policy)
    assert [refusal.reason for _, refusal in report.refusals] == [
        "nobody knows the input of the block that this site's q, k and v are projected from, token by token"
    ]
