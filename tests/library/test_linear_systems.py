"""Published linear systems against the formulas of their papers, in float64; recurrences go token by token."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attn_compiler import attend, library
from attn_compiler.algebra import expr as e
from attn_compiler.algebra.variant import Variant
from attn_compiler.errors import AttnError
from attn_compiler.planning.parameters import parameters_of
from attn_compiler.planning.resolve import asked_of
from attn_compiler.planning.site import Frame, Kind, Phase, Site
from attn_compiler.runtime.reading import VariantLike, read_variant
from attn_compiler.testing import assert_all_within_budget, assert_within_budget, variant_of
from attn_compiler.testing.case import Case, assert_case, on, plain

HEADS, TOKENS, DIM = 4, 70, 6
SEES_ALL = Variant()
DISTANCE = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)
CAUSAL = DISTANCE >= 0


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


Q, K, V = (drawn(2, HEADS, TOKENS, DIM, seed=seed) for seed in range(3))
STEPS = drawn(2, HEADS, TOKENS, seed=3).sigmoid().log()


def assert_same(variant: VariantLike, expected: Tensor, tables: Mapping[str, Tensor], layer: int = 0) -> None:
    for target in ("torch", "reference"):
        found = attend(Q, K, V, variant, tables=tables, layer=layer, layers=8, target=target)  # type: ignore[arg-type]
        assert isinstance(found, Tensor)
        assert_within_budget(found, expected, expected)


def read(slots: VariantLike) -> Variant:
    return read_variant(
        slots, Variant(), heads=HEADS, kv_heads=HEADS, q_len=TOKENS, k_len=TOKENS, head_dim=DIM, values=None, layer=0, layers=1
    )


def ready(name: str, layer: int, tables: Mapping[str, Tensor], computes: Variant = SEES_ALL) -> Variant:
    """What a ready policy makes of an attention, once its parameters are given."""
    site = Site(
        "attn", Kind.SELF, Phase.PREFILL, layer, 8, 2, HEADS, HEADS, TOKENS, TOKENS, DIM, DIM, "float64", computes, Frame(),
        TOKENS, TOKENS, tables=dict.fromkeys(tables),
    )  # fmt: skip
    found = asked_of(library.load_policy(name), site).variant
    assert isinstance(found, Variant), found
    return found


def test_l2vit_divides_by_a_hundred_at_least_and_each_head_has_a_temperature() -> None:
    temperature = drawn(8, HEADS, seed=4)
    weights = Q.relu() @ K.relu().mT
    expected = temperature[3, :, None, None] * weights @ V / weights.sum(-1, keepdim=True).clamp(min=100.0)
    assert ((weights.sum(-1) < 100) & (weights.sum(-1) > 0)).any()
    assert_same(ready("l2vit", 3, {"temperature": temperature}), expected, {"temperature": temperature}, layer=3)


def test_scatterformer_sums_within_windows_of_any_number_of_voxels() -> None:
    windows = torch.tensor([5] * 3 + [0] * 40 + [9] + [2] * 26)
    weights = Q.relu() @ K.relu().mT * (windows[:, None] == windows)
    expected = weights @ V / (weights.sum(-1, keepdim=True) + 1e-6)
    assert_same(ready("scatterformer", 0, {}), expected, {"window": windows})


def infinitevl(q: Tensor, k: Tensor, v: Tensor, steps: Tensor, beta: Tensor, opened: Tensor) -> Tensor:
    """One of its linear layers, token by token."""
    k, q = F.normalize(k, dim=-1), F.normalize(q, dim=-1) / math.sqrt(DIM)
    state, rows = torch.zeros(2, HEADS, DIM, DIM, dtype=q.dtype), []
    for t in range(TOKENS):
        faded = steps[:, :, t].exp()[..., None, None] * state
        wrong = v[:, :, t] - (k[:, :, t, None] @ faded)[:, :, 0]
        state = faded + beta[:, :, t, None, None] * k[:, :, t, :, None] * wrong[:, :, None]
        rows.append((q[:, :, t, None] @ state)[:, :, 0])
    out = torch.stack(rows, dim=2)
    return out / (out.square().mean(-1, keepdim=True) + 1e-6).sqrt() * F.silu(opened)


def test_a_layer_of_infinitevl_is_a_gated_delta_rule_with_a_gated_norm() -> None:
    q, k, v, steps, beta, opened = (
        x.float() for x in (Q, K, V, STEPS, drawn(2, HEADS, TOKENS, seed=5).sigmoid(), drawn(2, HEADS, TOKENS, DIM, seed=6))
    )
    slots = {"mask": "causal", "feature": "cosine", "scale": "1 / sqrt(dim)", "state": "gated_delta"}
    tables = {"beta": beta, "gate": steps.double().cumsum(-1), "output_gate": opened}
    case = Case(read({**slots, "output": ["norm(rms)", "gate(silu)"]}), q, k, v, tables)
    exact = infinitevl(*(x.double() for x in (q, k, v, steps, beta, opened)))
    for target in ("torch", "auto"):
        assert_all_within_budget([on(target)(case)], [exact], lambda: [plain(case)])


def learned() -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """The maps of layer 1, and q and k mapped by them: two softmaxes of each."""
    maps = {name: drawn(2, HEADS, DIM, 5, seed=seed) for seed, name in enumerate(("hedgehog_q", "hedgehog_k"))}
    of_q, of_k = (
        torch.cat([(x @ w[1]).softmax(-1), (-x @ w[1]).softmax(-1)], -1) for x, w in zip((Q, K), maps.values(), strict=True)
    )
    return maps, of_q, of_k


def test_hedgehog_divides_products_of_learned_features_by_their_sum() -> None:
    maps, of_q, of_k = learned()
    weights = of_q @ of_k.mT * CAUSAL  # the first rows are values as they are: means of all would be too small for a budget
    variant = ready("hedgehog", 1, maps, Variant(mask=e.k <= e.q))
    assert_same(variant, weights @ V / (weights.sum(-1, keepdim=True) + 1e-6), maps, layer=1)


def test_lolcats_divides_a_softmax_in_its_window_and_learned_features_behind_by_one_sum() -> None:
    maps, of_q, of_k = learned()
    near = CAUSAL & (DISTANCE < 64)
    scores = (Q @ K.mT / math.sqrt(DIM)).masked_fill(~near, -math.inf)
    far = of_q @ of_k.mT * (CAUSAL & ~near)
    assert far.any()
    weights = (scores - scores.amax(-1, keepdim=True)).exp() + far
    assert_same(ready("lolcats", 1, maps), weights @ V / weights.sum(-1, keepdim=True), maps, layer=1)


def test_lizard_adds_a_gated_state_and_a_window_whose_denominator_has_more_terms() -> None:
    maps = {name: drawn(1, HEADS, DIM, DIM, seed=seed) / 3 for seed, name in enumerate(("hedgehog_q", "hedgehog_k"))}
    sinks, alpha = drawn(HEADS, 4, seed=7), 0.3
    of_q, of_k = (torch.cat([(x @ w).exp(), (-x @ w).exp()], -1) for x, w in ((Q, maps["hedgehog_q"]), (K, maps["hedgehog_k"])))
    running = STEPS.cumsum(-1)
    weights = of_q @ of_k.mT * (running[..., None] - running[..., None, :]).clamp(max=0).exp() * CAUSAL
    gated = weights @ V / (weights.sum(-1, keepdim=True) + 1e-6)
    scores = (Q @ K.mT / math.sqrt(DIM)).masked_fill(~CAUSAL | (DISTANCE >= 16), -math.inf).exp()
    anchor = scores @ V / (sinks.exp().sum(-1)[:, None, None] + scores.sum(-1, keepdim=True))
    variant = {
        "mix": {
            "how": "sum",
            "weights": {"anchor": alpha},
            "branches": {
                "gated": {"mask": "causal", "feature": "hedgehog(how=exp)", "state": "gate(scalar)"},
                "anchor": {"mask": "causal & window(16)", "normalizer": "softmax(sink=sinks)"},
            },
        }
    }
    assert_same(variant, gated + alpha * anchor, {**maps, "gate": running, "sinks": sinks.logsumexp(-1)})


def test_agent_attention_is_two_attentions_whose_agents_are_pooled_queries() -> None:
    agents = F.avg_pool1d(Q.flatten(0, 1).mT, 10).mT.unflatten(0, (2, HEADS))
    scale = DIM**-0.5
    expected = (Q @ agents.mT * scale).softmax(-1) @ ((agents @ K.mT * scale).softmax(-1) @ V)
    gathered = attend(agents, K, V, {"mask": "all"})
    assert isinstance(gathered, Tensor)
    found = attend(Q, agents, gathered, {"mask": "all"})
    assert isinstance(found, Tensor)
    assert_within_budget(found, expected, expected)


def test_rat_sees_itself_and_the_last_token_of_each_chunk_before() -> None:
    """Its recurrence within a chunk, which is the model's own, token by token; then what the policy makes of that."""
    gates = drawn(2, HEADS, TOKENS, DIM, seed=8).sigmoid()

    def recurred(x: Tensor) -> Tensor:
        rows: list[Tensor] = []
        for t in range(TOKENS):
            before = rows[-1] if t % 16 else torch.zeros_like(x[:, :, t])
            rows.append(gates[:, :, t] * before + (1 - gates[:, :, t]) * x[:, :, t])
        return torch.stack(rows, dim=2)

    k, v = recurred(K), recurred(V)
    rows = []
    for t in range(TOKENS):
        seen = [*range(15, t // 16 * 16, 16), t]
        rows.append((Q[:, :, t, None] @ k[:, :, seen].mT * DIM**-0.5).softmax(-1) @ v[:, :, seen])
    exact = torch.cat(rows, dim=2)
    narrow = [x.float() for x in (Q, k, v)]
    found = attend(*narrow, ready("rat", 0, {}))
    assert isinstance(found, Tensor)
    chunk, place = torch.arange(TOKENS) // 16, torch.arange(TOKENS) % 16
    shown = (DISTANCE == 0) | ((chunk[:, None] > chunk) & (place == 15))
    plain = (narrow[0] @ narrow[1].mT * DIM**-0.5).masked_fill(~shown, -math.inf).softmax(-1) @ narrow[2]
    assert_within_budget(found, exact, plain)


def by_agents(agents: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Both attentions of Agent Attention."""
    k, v = (x.repeat_interleave(HEADS // x.shape[1], dim=1) for x in (k, v))
    return (q @ agents.mT * DIM**-0.5).softmax(-1) @ ((agents @ k.mT * DIM**-0.5).softmax(-1) @ v)


def on_a_line(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return by_agents(F.adaptive_avg_pool1d(q.flatten(0, 1).mT, 49).mT.unflatten(0, (2, HEADS)), q, k, v)


def on_a_grid(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    pooled = F.adaptive_avg_pool2d(q.flatten(0, 1).mT.unflatten(-1, (7, 10)), (3, 4))
    return by_agents(pooled.flatten(2).mT.unflatten(0, (2, HEADS)), q, k, v)


@pytest.mark.parametrize(
    ("variant", "formula", "kv_heads"),
    [(None, on_a_line, HEADS), ({"geometry": [7, 10], "context": "agents([3, 4])"}, on_a_grid, 2)],
)
def test_the_policy_agent_is_both_of_its_attentions(
    variant: VariantLike | None, formula: Callable[..., Tensor], kv_heads: int
) -> None:
    """On a grid and with heads that share keys, too."""
    wide = Q, K[:, :kv_heads], V[:, :kv_heads]
    q, k, v = (x.float() for x in wide)
    found = attend(q, k, v, ready("agent", 0, {}) if variant is None else variant)
    assert isinstance(found, Tensor)
    assert_within_budget(found, formula(*wide), formula(q, k, v))


def convolved(kernel: Tensor) -> Tensor:
    """v of a grid of 7 by 10, each channel of each row by a kernel of its own [rows, heads, dim, 9]."""
    laid_out = V.mT.reshape(1, -1, 7, 10)
    taps = kernel.expand(2, -1, -1, -1).reshape(-1, 1, 3, 3)
    return F.conv2d(laid_out, taps, groups=len(taps), padding=1).reshape(2, HEADS, DIM, TOKENS).mT


def test_inline_adds_a_local_residual_whose_taps_each_row_makes_for_itself() -> None:
    taps, scale = drawn(2, HEADS, DIM, 9, seed=9), DIM**-0.5
    mean_k, mean_v = K.mean(-2, keepdim=True), V.mean(-2, keepdim=True)
    shifted = scale / TOKENS * Q @ (K.mT @ V) + (1 - scale * Q @ mean_k.mT) * mean_v
    slots = {"feature": "identity", "scale": "1 / sqrt(dim)", "normalizer": "linear(subtract)", "geometry": [7, 10]}
    variant = {**slots, "output": "local_conv(3, taps, per_row=True)"}
    assert_same(variant, shifted + convolved(taps), {"taps": taps})


def test_agent_attention_on_a_grid_with_its_convolution_of_v() -> None:
    taps, shift = drawn(1, HEADS, DIM, 9, seed=9), drawn(1, HEADS, DIM, seed=10)
    slots = {"geometry": [7, 10], "context": "agents([3, 4])", "output": "local_conv(3, taps, bias=shift)"}
    assert_same(slots, on_a_grid(Q, K, V) + convolved(taps) + shift[..., None, :], {"taps": taps, "shift": shift})


def agent_biases() -> dict[str, Tensor]:
    """Both tables of 3 by 4 agents, each a small picture that is enlarged, a column and a row, as the model makes them."""
    small = [F.interpolate(drawn(HEADS, 12, 3, 3, seed=seed), size=(7, 10), mode="bilinear") for seed in (11, 12)]
    columns, rows = (
        [drawn(HEADS, 12, *sides, seed=seed) for seed in seeds] for sides, seeds in (((7, 1), (13, 14)), ((1, 10), (15, 16)))
    )
    first, second = (sum(parts).flatten(2) for parts in zip(small, columns, rows, strict=True))
    return {"first": first[None], "second": second.mT[None].contiguous()}


def with_biases(q: Tensor, k: Tensor, v: Tensor, first: Tensor, second: Tensor) -> Tensor:
    agents = F.adaptive_avg_pool2d(q.flatten(0, 1).mT.unflatten(-1, (7, 10)), (3, 4)).flatten(2).mT.unflatten(0, (2, HEADS))
    gathered = (agents @ k.mT * DIM**-0.5 + first[0]).softmax(-1) @ v
    return (q @ agents.mT * DIM**-0.5 + second[0]).softmax(-1) @ gathered


BIASED = {"geometry": [7, 10], "context": "agents([3, 4], first, second)"}


def test_agent_attention_whole_with_both_of_its_biases() -> None:
    taps, shift, biases = drawn(1, HEADS, DIM, 9, seed=9), drawn(1, HEADS, DIM, seed=10), agent_biases()
    expected = with_biases(Q, K, V, **biases) + convolved(taps) + shift[..., None, :]
    slots = {**BIASED, "output": "local_conv(3, taps, bias=shift)"}
    assert_same(slots, expected, {"taps": taps, "shift": shift, **biases})
    assert not torch.allclose(expected, on_a_grid(Q, K, V) + convolved(taps) + shift[..., None, :], atol=0.1)


@pytest.mark.parametrize(("target", "dtype"), [("torch", torch.bfloat16), ("cpp", torch.float32), ("triton", torch.float32)])
def test_the_biases_of_agents_have_gradients_on_every_target(target: str, dtype: torch.dtype) -> None:
    assert_case(Case(read(BIASED), Q, K, V, agent_biases()), dtype, target)


AGENTS_OF_HEADS: Mapping[str, Mapping[str, object]] = {
    "scales": {"heads": {"1": {"context": "agents(12)", "scale": 0.9}, "rest": {"context": "agents(12)", "scale": 0.2}}},
    "biases": {"heads": {"1": {"context": "agents(12, first, second)"}, "rest": {"context": "agents(12, first, second)"}}},
    "agents of agents": {"context": ["agents(20)", "agents(12)"], "heads": {"1": {"scale": 0.9}, "rest": {"scale": 0.2}}},
}


def by_agents_of_heads(name: str, k: Tensor, v: Tensor) -> Tensor:
    scale = torch.full((HEADS, 1, 1), DIM**-0.5 if name == "biases" else 0.2, dtype=torch.float64)
    if name != "biases":
        scale[1] = 0.9
    biases = {name: x[0] for name, x in agent_biases().items()} if name == "biases" else {"first": 0.0, "second": 0.0}
    for count in (20, 12) if name == "agents of agents" else (12,):
        agents = F.adaptive_avg_pool1d(Q.flatten(0, 1).mT, count).mT.unflatten(0, (2, HEADS))
        k, v = agents, (agents @ k.mT * scale + biases["first"]).softmax(-1) @ v
    return (Q @ k.mT * scale + biases["second"]).softmax(-1) @ v


@pytest.mark.parametrize("name", AGENTS_OF_HEADS)
@pytest.mark.parametrize("target", ["reference", "torch", "cpp", "triton", "flex"])
def test_agents_gather_for_each_head_as_it_scales_and_biases(name: str, target: str) -> None:
    k, v = K[:, :2], V[:, :2]
    expected = by_agents_of_heads(name, *(x.repeat_interleave(2, dim=1) for x in (k, v)))
    variant = variant_of(AGENTS_OF_HEADS[name], heads=HEADS, kv_heads=2, length=TOKENS, dim=DIM)
    q, k, v, tables = Q.float(), k.float(), v.float(), {n: agent_biases()[n].float() for n in variant.tables()}
    found = attend(q, k, v, variant, tables=tables, target=target)  # type: ignore[arg-type]
    assert isinstance(found, Tensor)
    with torch.no_grad():
        single = plain(Case(variant, q, k, v, tables))
    assert_within_budget(found, expected, single)


@pytest.mark.parametrize("target", ["cpp", "triton"])
def test_behind_agents_the_heads_of_keys_are_those_of_the_model(target: str) -> None:
    slots = {"context": "agents(12)", "scale": "1.0 + t[kv]"}
    variant = variant_of(slots, heads=HEADS, kv_heads=2, length=TOKENS, dim=DIM)
    assert_case(Case(variant, Q, K[:, :2], V[:, :2], {"t": drawn(2)}), torch.float32, target)


@pytest.mark.parametrize("target", ["cpp", "triton"])
def test_agents_of_groups_of_heads_have_gradients(target: str) -> None:
    slots = {
        "heads": {"1": {"context": "agents(12, first, second)", "scale": 0.9}, "rest": {"context": "agents(12, first, second)"}}
    }
    variant = variant_of(slots, heads=HEADS, kv_heads=2, length=TOKENS, dim=DIM)
    assert_case(Case(variant, Q, K[:, :2], V[:, :2], agent_biases()), torch.float32, target)


@pytest.mark.parametrize(("name", "count"), [("first", "12 agents"), ("second", "70 tokens")])
def test_the_biases_of_agents_have_their_sizes(name: str, count: str) -> None:
    biases = agent_biases()
    with pytest.raises(AttnError, match=f"read for {count} at its axis 2"):
        attend(Q, K, V, BIASED, tables={**biases, name: biases[name].repeat(1, 1, 2, 1)})


def test_the_biases_of_agents_on_a_grid_are_parameters_of_the_model() -> None:
    site = Site(
        "attn", Kind.SELF, Phase.PREFILL, 0, 8, 2, HEADS, HEADS, TOKENS, TOKENS, DIM, DIM, "float64", SEES_ALL, Frame(), TOKENS,
        TOKENS,
    )  # fmt: skip
    found = {one.name: (one.shape, one.number) for one in parameters_of(read(BIASED), site, ("first", "second"))}
    assert found == {"first": ((8, HEADS, 12, TOKENS), 0.0), "second": ((8, HEADS, TOKENS, 12), 0.0)}


def test_pooled_keys_are_means_of_as_many_tokens_as_there_are() -> None:
    k, v = (torch.stack([part.mean(2) for part in x.split(16, dim=2)], dim=2) for x in (K, V))
    assert_same({"context": ["pool(16)"]}, (Q @ k.mT * DIM**-0.5).softmax(-1) @ v, {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slots", [{"context": "agents(5)"}, {"context": ["pool(4)", "pool(2)"], "feature": "elu_one"}])
def test_contexts_have_gradients(slots: Mapping[str, object], dtype: torch.dtype) -> None:
    assert_case(Case(read(slots), Q, K[:, :2], V[:, :2], {}), dtype)


@pytest.mark.parametrize(
    ("slots", "said"),
    [
        ({"mask": "causal", "context": "pool(4)"}, "asks where keys stand"),
        ({"score": "score + alibi()", "context": "agents(4)"}, "asks where keys stand"),
        ({"context": "agents([3, 4])"}, "needs a `geometry` of two sizes"),
    ],
)
def test_a_context_that_makes_no_sense_is_refused(slots: Mapping[str, object], said: str) -> None:
    with pytest.raises(AttnError, match=said):
        attend(Q, K, V, slots)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("output", ["norm(rms)", "gate(sigmoid)", "head_scale", ["norm(rms)", "head_scale", "gate(silu)"]])
def test_what_is_done_with_a_result_has_gradients(output: str | list[str], dtype: torch.dtype) -> None:
    variant = read({"mask": "causal", "feature": "elu_one", "output": output})
    tables = {"output_gate": drawn(2, HEADS, TOKENS, DIM, seed=6), "head_scale": drawn(1, HEADS, seed=4)}
    assert_case(Case(variant, Q, K, V, {name: x for name, x in tables.items() if name in variant.tables()}), dtype)
