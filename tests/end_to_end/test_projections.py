"""Which layers count as the projections of an attention, and where rounding them is refused."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn.functional import scaled_dot_product_attention as sdpa
from torch.utils.checkpoint import checkpoint

import attn_compiler as attn
from attn_compiler.errors import LanguageError, PolicyError
from attn_compiler.export.program import rewritten
from attn_compiler.runtime.targets import TARGETS
from end_to_end.integers import Rounded, product, rounded
from end_to_end.projected import CLOSE, HELD, POLICY, SLOTS, Attention, by_hand, inputs, made, off, refusal

pytestmark = pytest.mark.usefixtures("quick")


@torch.no_grad()
def assert_rounds(model: nn.Module, *names: str, policy: object = POLICY) -> None:
    found = torch.compile(model, backend="attn", options={"policy": policy})(inputs())
    assert all(d.outcome == "approximate" for d in attn.reports()[-1].decisions), attn.reports()[-1]
    exact = model(inputs())
    wanted = by_hand(model, *names)(inputs())
    assert off(exact, wanted) > 1e-4
    assert off(found, wanted) < CLOSE


def test_four_layers() -> None:
    assert_rounds(made(Attention), "q", "k", "v", "o")


def test_one_layer_that_makes_all_three() -> None:
    class Fused(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(32, 96, bias=False)

        def operands(self, x: Tensor) -> tuple[Tensor, ...]:
            return self.qkv(x).chunk(3, dim=-1)

    assert_rounds(made(Fused), "qkv", "o")


def test_a_factor_and_a_norm_on_the_way_are_no_projections() -> None:
    class Gated(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.last, self.gate = nn.RMSNorm(32), nn.RMSNorm(32), nn.Linear(32, 32)

        def operands(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            k = self.k(x)
            return self.norm(self.q(x)), k * torch.rsqrt(k.square().mean(-1, keepdim=True) + 1e-6), self.v(x)

        def behind(self, out: Tensor, x: Tensor) -> Tensor:
            return self.o(self.last(out) * self.gate(x).sigmoid())

    assert_rounds(made(Gated), "q", "k", "v", "o")


@torch.no_grad()
def test_weights_of_any_layout() -> None:
    class Einsum(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 3, 8, 32))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = torch.einsum("btd,hsed->sbhte", x, self.w)
            return self.o(sdpa(q, k, v).transpose(1, 2).flatten(2))

    model, x = made(Einsum), inputs()
    found = torch.compile(model, backend="attn", options={"policy": POLICY})(x)
    matrix = model.get_parameter("w").reshape(96, 32)
    flat = torch.from_numpy(product(x.reshape(24, 32).numpy(), matrix.numpy(), 2.0))
    q, k, v = flat.reshape(2, 12, 4, 3, 8).permute(3, 0, 2, 1, 4)
    out = sdpa(q, k, v).transpose(1, 2).flatten(2)
    wanted = Rounded(model.get_submodule("o"), 2.0)(out)
    assert off(found, wanted) < CLOSE


def test_an_adapted_layer_is_refused() -> None:
    class Adapted(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(32, 4, bias=False), nn.Linear(4, 32, bias=False)

        def operands(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return self.q(x) + self.b(self.a(x)), self.k(x), self.v(x)

    assert "its q is made of several products with weights (b, q): merge" in refusal(made(Adapted))


def test_a_layer_that_makes_more_than_an_attention_reads_is_refused() -> None:
    class Parallel(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.down = nn.Linear(32, 128), nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            *qkv, inner = self.wide(x).chunk(4, dim=-1)
            q, k, v = (one.unflatten(-1, (4, 8)).transpose(1, 2) for one in qkv)
            return self.o(sdpa(q, k, v).transpose(1, 2).flatten(2)) + self.down(inner.relu())

    assert "its q, k and v is also read by `item`" in refusal(made(Parallel))


def test_operands_that_others_read_as_attention_is_given_them_are_no_projections_of_its_own() -> None:
    class Reading(Attention):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (one.unflatten(-1, (4, 8)).transpose(1, 2) for one in self.operands(x))
            return self.o(sdpa(q, k, v).transpose(1, 2).flatten(2)) + q.square().mean()

    assert "its q, k and v is also read by `square`" in refusal(made(Reading))


def test_an_output_that_no_layer_takes_alone_is_refused() -> None:
    class Joined(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.o = nn.Linear(64, 32)

        def behind(self, out: Tensor, x: Tensor) -> Tensor:
            return self.o(torch.cat([out, x], dim=-1))

    class Added(Attention):
        def behind(self, out: Tensor, x: Tensor) -> Tensor:
            return self.o(out + x)

    class Bare(Attention):
        def behind(self, out: Tensor, x: Tensor) -> Tensor:
            return out

    assert "goes into `cat` before" in refusal(made(Joined))
    assert "goes into `add` before" in refusal(made(Added))
    assert "its output leaves the graph" in refusal(made(Bare))


def test_queries_that_no_layer_makes_are_refused() -> None:
    class Direct(Attention):
        def operands(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return x, self.k(x), self.v(x)

    class Convolved(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(32, 32, 3, padding=1)

        def operands(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return self.conv(self.q(x).mT).mT, self.k(x), self.v(x)

    assert "its q comes from no product with a weight" in refusal(made(Direct))
    assert "its q comes from `conv1d`" in refusal(made(Convolved))


class Sharing(nn.Module):
    """Two attentions with one layer for their keys."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Attention(), Attention()

    def forward(self, x: Tensor) -> Tensor:
        k = self.first.k(x)
        for one in (self.first, self.second):
            q, v = one.q(x), one.v(x)
            x = one.o(sdpa(*(y.unflatten(-1, (4, 8)).transpose(1, 2) for y in (q, k, v))).transpose(1, 2).flatten(2))
        return x


def test_attentions_that_share_a_layer_have_to_agree() -> None:
    names = ("first.q", "first.k", "first.v", "first.o", "second.q", "second.v", "second.o")
    assert_rounds(made(Sharing), *names)
    lone = {"version": 1, "rules": [{"match": {"module": "*irst*"}, "attn": SLOTS}, {"match": {}, "attn": "exact"}]}

    class Outer(nn.Module):
        """Names its attentions: the calls stand in modules of their own."""

        def __init__(self) -> None:
            super().__init__()
            self.key, self.first, self.second = nn.Linear(32, 32), Beside(), Beside()

        def forward(self, x: Tensor) -> Tensor:
            k = self.key(x)
            return self.second(self.first(x, k), k)

    class Beside(Attention):
        def forward(self, x: Tensor, k: Tensor) -> Tensor:
            q, k, v = (one.unflatten(-1, (4, 8)).transpose(1, 2) for one in (self.q(x), k, self.v(x)))
            return self.o(sdpa(q, k, v).transpose(1, 2).flatten(2))

    model = made(Outer)
    with torch.no_grad():
        found, exact = torch.compile(model, backend="attn", options={"policy": lone})(inputs()), model(inputs())
    first, second = attn.reports()[-1].decisions
    assert "shares projections with second" in first.refusals[-1].reason
    assert (first.outcome, second.outcome) == ("refused", "kept")
    assert off(found, exact) < 1e-12
    assert_rounds(model, "key", "first.q", "first.v", "first.o", "second.q", "second.v", "second.o")


def test_heads_have_one_set_of_projections() -> None:
    mixed = {"version": 1, "rules": [{"attn": {"heads": {"0:2": SLOTS, "rest": "exact"}}}]}
    assert "its projections serve all heads and branches" in refusal(made(Attention), mixed)
    agreeing = {"version": 1, "rules": [{"attn": {"heads": {"0:2": SLOTS, "rest": SLOTS | {"mask": "window(3)"}}}}]}
    with torch.no_grad():
        torch.compile(made(Attention), backend="attn", options={"policy": agreeing})(inputs())
    [decision] = attn.reports()[-1].decisions
    assert str(decision.projections) == "int8, per token, channels from 2 on apart"
    assert decision.variant.storage.projections is None


def test_other_slots_of_the_same_rule_hold_too() -> None:
    model, slots = made(Attention), SLOTS | {"mask": "window(3)"}
    masked = {"version": 1, "rules": [{"attn": slots}]}
    x = inputs()
    with torch.no_grad():
        found = torch.compile(model, backend="attn", options={"policy": masked})(x)
        hand = by_hand(model, "q", "k", "v", "o")
        q, k, v = (one.unflatten(-1, (4, 8)).transpose(1, 2) for one in hand.operands(x))  # type: ignore[operator]
        at = torch.arange(12)
        out = sdpa(q, k, v, attn_mask=(at[:, None] - at).abs() < 3)
        wanted = hand.behind(out.transpose(1, 2).flatten(2), x)  # type: ignore[operator]
    assert off(found, wanted) < CLOSE


def test_a_rule_may_insist_and_a_call_without_layers_cannot() -> None:
    insisting = {"version": 1, "rules": [{"attn": SLOTS, "fallback": "error"}]}

    class Bare(Attention):
        def behind(self, out: Tensor, x: Tensor) -> Tensor:
            return out

    with pytest.raises(BackendCompilerFailed, match="its output leaves the graph"):
        torch.compile(made(Bare), backend="attn", options={"policy": insisting})(inputs())
    q = torch.randn(1, 2, 5, 8)
    with pytest.raises(LanguageError, match="layers of a model, of which this call knows nothing"):
        attn.attend(q, q, q, SLOTS)


@pytest.mark.parametrize("more", [{"per": "tensor"}, {"smooth": True}, {"largest": 3}])
def test_scales_of_projections_are_not_chosen(more: dict[str, object]) -> None:
    with pytest.raises(PolicyError, match=f"a scale for each token and each row of weights.*leave `{min(more)}` out"):
        attn.load_policy({"version": 1, "rules": [{"attn": {"storage": {"projections": HELD | more}}}]})


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        num_hidden_layers=2, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64, vocab_size=97
    )
    return transformers.LlamaForCausalLM(config).eval().double()


def rounded_llama(model: nn.Module) -> Any:
    hand = copy.deepcopy(model)
    assert len(rounded(hand, ("q_proj", "k_proj", "v_proj", "o_proj"), HELD["outliers"])) == 8
    return hand


@torch.no_grad()
@pytest.mark.parametrize("ours", [False, True])
def test_tokens_are_decoded_one_by_one(ours: bool) -> None:
    model = llama()
    hand, compiled = rounded_llama(model), torch.compile(model, backend="attn", options={"policy": POLICY})
    tokens = torch.arange(24)[None]
    own = [transformers.DynamicCache(config=model.config) for _ in range(2)]
    caches = [attn.cache(model, POLICY) if ours else own[0], own[1]]
    for start, stop in ((0, 20), (20, 21), (21, 22), (22, 24)):
        found, wanted = (
            run(tokens[:, start:stop], past_key_values=cache, use_cache=True).logits
            for run, cache in zip((compiled, hand), caches, strict=True)
        )
        assert {d.outcome for d in attn.reports()[-1].decisions} == {"approximate"}
        assert off(found, wanted) < CLOSE


def test_a_model_learns_through_rounded_projections() -> None:
    model, x = made(Attention), inputs()
    compiled = torch.compile(model, backend="attn", options={"policy": POLICY})
    weights = tuple(model.parameters())
    found = torch.autograd.grad(compiled(x).square().sum(), weights)

    def straight(layer: nn.Module, x: Tensor) -> Tensor:
        weight, bias = layer.get_parameter("weight"), layer.get_parameter("bias")
        flat = x.reshape(-1, 32)
        unit = torch.eye(32, dtype=torch.float64).numpy()
        apart = (flat.detach().abs() >= 2).any(dim=0)
        of_x = torch.where(apart, flat.detach(), torch.from_numpy(product(flat.detach().numpy(), unit, 2.0)))
        of_weight = torch.from_numpy(product(unit, weight.detach().numpy(), torch.inf)).mT
        of_weight = torch.where(apart, weight.detach(), of_weight)
        out = (flat + (of_x - flat).detach()) @ (weight + (of_weight - weight).detach()).mT + bias
        return out.reshape(*x.shape[:-1], -1)

    hand = copy.deepcopy(model)
    for name in ("q", "k", "v", "o"):
        layer = hand.get_submodule(name)
        layer.forward = lambda x, layer=layer: straight(layer, x)  # type: ignore[method-assign]
    wanted = torch.autograd.grad(hand(x).square().sum(), tuple(hand.parameters()))
    for (name, _), mine, its in zip(model.named_parameters(), found, wanted, strict=True):
        if name != "k.bias":  # which moves all scores of a query alike, so that its gradient is none
            assert off(mine, its) < CLOSE


@torch.no_grad()
def test_an_exported_program_is_rounded_once() -> None:
    model, x = made(Attention), inputs()
    program = torch.export.export(model, (x,))
    policy = attn.load_policy(POLICY)
    refused = rewritten(torch.export.export(model, (x,)), policy, {}, lambda _: TARGETS["torch"])
    assert "a file of this kind holds the layers of a model as they come" in refused.plan.decisions[0].refusals[0].reason
    once = rewritten(program, policy, {}, lambda _: TARGETS["torch"], rounds=True)
    wanted = by_hand(model, "q", "k", "v", "o")(x)
    assert off(once.module(x), wanted) < CLOSE
    again = rewritten(program, policy, {}, lambda _: TARGETS["torch"], rounds=True)
    assert all(d.outcome == "refused" for d in again.plan.decisions)
    assert off(again.module(x), wanted) < CLOSE


@torch.no_grad()
def test_a_length_may_change_from_call_to_call() -> None:
    model, x = made(Attention), inputs()
    compiled, hand = torch.compile(model, backend="attn", options={"policy": POLICY}, dynamic=True), by_hand(model, *"qkvo")
    for length in (12, 5, 9):
        assert off(compiled(x[:, :length]), hand(x[:, :length])) < CLOSE


@torch.no_grad()
def test_the_report_names_the_layers() -> None:
    report = attn.explain(made(Attention), (inputs(),), policy=POLICY)
    assert "rounds    q, k, v, o: weights and what they meet held in int8, per token, channels from 2" in str(report)
    [site] = json.loads(report.to_json())["sites"]
    assert site["projections"] == {"names": ["q", "k", "v", "o"], "held": "int8, per token, channels from 2 on apart"}
    assert site["outcome"] == "approximate"


def test_pairs_that_are_turned_and_parts_that_are_picked_are_no_projections() -> None:
    class Turned(Attention):
        def operands(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            q, k = (y * 0.6 + torch.stack([-y[..., 1::2], y[..., ::2]], dim=-1).flatten(-2) * 0.8 for y in (self.q(x), self.k(x)))
            return q, k, self.v(x)[..., [*range(16, 32), *range(16)]]

    assert_rounds(made(Turned), "q", "k", "v", "o")


def test_checkpointed_blocks_are_rounded_each_by_its_rule() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Attention() for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = checkpoint(layer, x, use_reentrant=False)
            return x

    model, x = made(Checkpointed), inputs()
    policy = {"version": 1, "rules": [{"match": {"layers": "0"}, "attn": SLOTS}]}
    found = torch.compile(model, backend="attn", options={"policy": policy})(x).detach()
    assert [d.outcome for d in attn.reports()[-1].decisions] == ["approximate", "kept"]
    with torch.no_grad():
        wanted = by_hand(model, "layers.0.q", "layers.0.k", "layers.0.v", "layers.0.o")(x)
    assert off(found, wanted) < CLOSE
