"""`merge`: tokens that attend as one (ToMe for Stable Diffusion, AgentSD), against a formula that goes token by token."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attn_compiler as attn
from attn_compiler import attend
from attn_compiler.algebra import wire
from attn_compiler.algebra.expr import const
from attn_compiler.algebra.integers import IntegerSet
from attn_compiler.algebra.variant import Variant
from attn_compiler.errors import AttnError, ShapeError
from attn_compiler.testing import Case, assert_case, assert_within_budget, variant_of

HEADS, KV_HEADS, ROWS, COLUMNS, DIM = 4, 2, 8, 9, 6
TOKENS = ROWS * COLUMNS


class Asked(NamedTuple):
    """What a policy asks for, in numbers."""

    cell: tuple[int, int]
    share: float
    agents: float | None = None
    power: float = 1.0
    shortcut: float = 0.0


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


Q, K, V = (drawn(2, heads, TOKENS, DIM, seed=seed) for seed, heads in enumerate((HEADS, KV_HEADS, KV_HEADS)))
METRIC = drawn(2, TOKENS, 24, seed=3)


def groups_of(metric: Tensor, sizes: tuple[int, int], cell: tuple[int, int], shares: Sequence[float]) -> list[list[list[int]]]:
    """Who is averaged with whom, once for each share: a source joins its likest destination, the likest sources first."""
    rows, columns = sizes
    corners = [
        row * columns + column
        for row in range(0, rows // cell[0] * cell[0], cell[0])
        for column in range(0, columns // cell[1] * cell[1], cell[1])
    ]
    sources = [token for token in range(rows * columns) if token not in set(corners)]
    likeness = F.cosine_similarity(metric[sources, None], metric[corners], dim=-1)
    best = {token: corners[int(row.argmax())] for token, row in zip(sources, likeness, strict=True)}
    order = [sources[int(place)] for place in likeness.amax(dim=1).argsort(descending=True)]
    found = []
    for share in shares:
        merged = order[: int(rows * columns * share)]
        joined = {corner: [corner] for corner in corners}
        for token in merged:
            joined[best[token]].append(token)
        found.append([[token] for token in order[len(merged) :]] + list(joined.values()))
    return found


def by_hand(q: Tensor, k: Tensor, v: Tensor, metric: Tensor, sizes: tuple[int, int], asked: Asked) -> Tensor:
    """Row by row and head by head, group by group."""
    out = torch.empty_like(q)
    for row in range(q.shape[0]):
        shares = [asked.share] if asked.agents is None else [asked.share, asked.agents]
        groups, *gathering = groups_of(metric[row].double(), sizes, asked.cell, shares)
        for head in range(q.shape[1]):
            kv = head * k.shape[1] // q.shape[1]
            queries, keys, values = (
                torch.stack([x[one].mean(0) for one in groups]) for x in (q[row, head], k[row, kv], v[row, kv])
            )
            scale = q.shape[3] ** -0.5
            if asked.agents is None:
                result = (queries @ keys.mT * scale).softmax(-1) @ values
            else:
                agents = torch.stack([q[row, head, one].mean(0) for one in gathering[0]])
                gathered = (agents @ keys.mT * scale).softmax(-1) @ values
                result = (queries @ agents.mT * scale**asked.power).softmax(-1) @ gathered
            for members, x in zip(groups, result + asked.shortcut * values, strict=True):
                out[row, head, members] = x
    return out


AGENTS = Asked((4, 4), 0.4, 0.95, 0.3, 0.075)
CASES: Mapping[str, tuple[str, Asked]] = {
    "tokens": ("merge(0.4)", Asked((2, 2), 0.4)),
    "all that may be": ("merge(0.9, cell=[3, 4])", Asked((3, 4), 0.9)),
    "agents": ("merge(0.4, cell=4, agents=0.95, power=0.3, shortcut=0.075)", AGENTS),
    "some agents": ("merge(0.2, [2, 3], agents=0.75)", Asked((2, 3), 0.2, 0.75)),
    "a shortcut alone": ("merge(0.5, shortcut=0.5)", Asked((2, 2), 0.5, shortcut=0.5)),
}  # fmt: skip


def read(name: str, *, metric: bool = False) -> Case:
    text = CASES[name][0].replace(")", ", by=alike)") if metric else CASES[name][0]
    slots = {"geometry": [ROWS, COLUMNS], "context": text}
    variant = variant_of(slots, heads=HEADS, kv_heads=KV_HEADS, length=TOKENS, dim=DIM)
    return Case(variant, Q, K, V, {"alike": METRIC} if metric else {})


@pytest.mark.parametrize("metric", [False, True])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("target", ["reference", "torch"])
def test_tokens_that_are_alike_attend_as_one(name: str, target: str, *, metric: bool) -> None:
    case = read(name, metric=metric)
    found = attend(Q, K, V, case.variant, tables=case.tables, target=target)  # type: ignore[arg-type]
    assert isinstance(found, Tensor)
    expected = by_hand(Q, K, V, METRIC if metric else K.mean(dim=1), (ROWS, COLUMNS), CASES[name][1])
    assert_within_budget(found, expected, expected * (1 + 1e-14))
    assert wire.read(wire.write(case.variant)) == case.variant


@pytest.mark.parametrize(("target", "dtype"), [("torch", torch.bfloat16), ("cpp", torch.float32), ("triton", torch.float32)])
@pytest.mark.parametrize("name", ["tokens", "agents"])
def test_targets_carry_it_with_its_gradients(name: str, target: str, dtype: torch.dtype) -> None:
    assert_case(read(name, metric=name == "agents"), dtype, target)


def test_linear_attention_and_keys_of_its_own_stand_behind_it() -> None:
    memory = {"memory_k": drawn(1, KV_HEADS, 3, DIM, seed=4), "memory_v": drawn(1, KV_HEADS, 3, DIM, seed=5)}
    for more in ({"feature": "elu_one"}, {"context": ["merge(0.4)", "extra(memory, 3)"]}):
        slots = {"geometry": [ROWS, COLUMNS], "context": "merge(0.4)", **more}
        variant = variant_of(slots, heads=HEADS, kv_heads=KV_HEADS, length=TOKENS, dim=DIM)
        assert_case(Case(variant, Q, K, V, {name: memory[name] for name in variant.tables()}), torch.float32, "torch")


def test_flex_attention_meets_fewer_tokens() -> None:
    case = read("agents")
    narrow = [x.float() for x in (Q, K, V)]
    expected = by_hand(*(x.double() for x in narrow), narrow[1].double().mean(dim=1), (ROWS, COLUMNS), AGENTS)
    found, plain = (attend(*narrow, case.variant, target=target) for target in ("flex", "torch"))  # type: ignore[arg-type]
    assert isinstance(found, Tensor)
    assert isinstance(plain, Tensor)
    assert_within_budget(found, expected, plain)


@pytest.mark.parametrize(
    ("slots", "said"),
    [
        ({"mask": "causal", "geometry": [8, 9], "context": "merge(0.4)"}, "asks where keys stand"),
        ({"score": "score + alibi()", "geometry": [8, 9], "context": "merge(0.4)"}, "asks where keys stand"),
        ({"context": "merge(0.4)"}, "needs a `geometry` of two axes"),
        ({"geometry": [72], "context": "merge(0.4)"}, "needs a `geometry` of two axes"),
        ({"geometry": [8, 10], "context": "merge(0.4)"}, "80 tokens, and this attention has 72 keys"),
        ({"geometry": "square", "context": "merge(0.4)"}, "64 tokens, and this attention has 72 keys"),
        ({"geometry": [8, 9], "context": "merge(1.0)"}, "between 0 and 1"),
        ({"geometry": [8, 9], "context": "merge(0.4, power=0.3)"}, "there are none"),
        ({"geometry": [8, 9], "context": "merge(0.4, cell=1)"}, "no token to merge"),
        ({"geometry": [6, 12], "context": "merge(0.5, agents=0.8)"}, "merge alone costs less"),
        ({"geometry": [8, 9], "context": ["merge(0.4)", "pool(2)"]}, "no other one but `extra`"),
        ({"geometry": [8, 9], "context": ["pool(2)", "agents([2, 2], near)"]}, "biases count all tokens"),
        (
            {"geometry": [8, 9], "context": "merge(0.4)", "heads": {"0": {"scale": 0.3}}},
            "no place where there is `heads` or `mix`",
        ),
        ({"geometry": [8, 9], "heads": {"0": {"context": "merge(0.4)"}}}, "no place where there is `heads` or `mix`"),
        (
            {"geometry": [8, 9], "mix": {"how": "sum", "branches": {"a": {"context": "merge(0.4)"}, "b": {}}}},
            "no place where there is `heads` or `mix`",
        ),
    ],
)
def test_a_merge_that_makes_no_sense_is_refused(slots: Mapping[str, object], said: str) -> None:
    with pytest.raises(AttnError, match=said):
        attend(Q, K, V, slots)


@pytest.mark.parametrize("target", ["torch", "cpp"])
def test_groups_that_no_policy_made_merge_nothing(target: str) -> None:
    merging = read("agents").variant
    groups = (IntegerSet((0,)), merging), (IntegerSet((1, 2, 3)), replace(merging, scale=const(0.3)))
    with pytest.raises(ShapeError, match="merged for all heads alike"):
        attend(Q.float(), K.float(), V.float(), Variant(groups=groups), target=target)  # type: ignore[arg-type]


def test_queries_of_other_tokens_are_not_merged() -> None:
    with pytest.raises(AttnError, match="not the same tokens"):
        attend(Q[:, :, :64], K, V, {"geometry": [8, 9], "context": "merge(0.4)"})
    with pytest.raises(AttnError, match="merges the tokens of a grid of 8 by 9"):
        attend(Q[:, :, :64], K, V, read("tokens").variant)
    with pytest.raises(AttnError, match="no log-sum-exp"):
        attend(Q, K, V, read("tokens").variant, return_lse=True)


class Image(nn.Module):
    """Nothing but an attention between the tokens of a grid."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


@pytest.mark.parametrize("name", ["tokens", "agents"])
def test_an_exported_one_merges_the_same_tokens(name: str, tmp_path: Path) -> None:
    slots = {"geometry": [ROWS, COLUMNS], "context": CASES[name][0]}
    policy = {"version": 1, "rules": [{"match": {}, "attn": slots, "fallback": "error"}]}
    report = attn.export_onnx(Image().eval(), (Q.float(), K.float(), V.float()), tmp_path / "image.onnx", policy)
    assert "checked in onnxruntime" in str(report)


def test_a_report_counts_what_it_costs_to_compare_tokens() -> None:
    """256 queries and keys: 154 of each are left, and each token is compared with 64 corners by its 8 numbers."""
    one = {"geometry": "square", "context": "merge(0.4)"}
    operands = drawn(3, 1, 1, 256, 8).float()
    report = attn.explain(Image().eval(), tuple(operands), policy={"version": 1, "rules": [{"attn": one}]})
    (cost,) = (entry["costs"] for entry in json.loads(report.to_json())["sites"])
    assert cost["before"]["flops"] == 2 * 256 * 256 * 16
    assert cost["after"]["flops"] == 2 * 154 * 154 * 16 + 2 * 256 * 64 * 8
    assert cost["density_after"] == 154**2 / 256**2


Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def plainly(q: Tensor, k: Tensor, v: Tensor, residual: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """Of tokens among others, as diffusers writes it."""

    def __init__(self, dim: int, heads: int, others: int) -> None:
        super().__init__()
        self.heads, self.attend = heads, plainly
        self.to_q, self.to_k, self.to_v = (nn.Linear(size, dim, bias=False) for size in (dim, others, others))
        self.to_out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, others: Tensor, residual: Tensor) -> Tensor:
        rows = self.to_q(x), self.to_k(others), self.to_v(others)
        q, k, v = (each.unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in rows)
        out: Tensor = self.to_out(self.attend(q, k, v, residual).transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    """Self attention, then attention to a prompt."""

    def __init__(self, dim: int, heads: int, prompt: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn1, self.attn2 = Attention(dim, heads, dim), Attention(dim, heads, prompt)

    def forward(self, x: Tensor, prompt: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attn1(y, y, x)
        return x + self.attn2(self.norm2(x), prompt, x)


class UNet(nn.Module):
    """A block at full resolution, and one at half of it between that and the result."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.down, self.last = (
            nn.Conv2d(4, 16, 3, padding=1),
            nn.Conv2d(16, 16, 3, 2, 1),
            nn.Conv2d(16, 4, 3, padding=1),
        )
        self.outer, self.inner = Block(16, 2, 12), Block(16, 2, 12)

    def forward(self, x: Tensor, prompt: Tensor) -> Tensor:
        x = self.first(x)
        size = x.shape[2:]
        x = self.outer(x.flatten(2).mT, prompt).mT.unflatten(2, size)
        y = self.down(x)
        y = self.inner(y.flatten(2).mT, prompt).mT.unflatten(2, y.shape[2:])
        found: Tensor = self.last(x + F.interpolate(y, size=size))
        return found


@pytest.mark.parametrize(("policy", "asked"), [("agentsd", AGENTS), ("tome", Asked((2, 2), 0.4))])
def test_a_ready_policy_is_dropped_onto_a_model(policy: str, asked: Asked) -> None:
    """Tokens are compared by what stands before the norm; the inner block, and the prompt, stay as they are."""
    image, prompt = drawn(1, 4, 64, 64, seed=6), drawn(1, 7, 12, seed=7)
    models = UNet().double().eval(), UNet().eval()
    found = torch.compile(models[1], backend="attn", options={"policy": policy})
    with torch.no_grad():
        ours = found(image.float(), prompt.float())
        exact = models[0](image, prompt)
        for model in models:
            model.outer.attn1.attend = lambda q, k, v, residual: by_hand(q, k, v, residual, (64, 64), asked)
        expected, plain = models[0](image, prompt), models[1](image.float(), prompt.float())
    assert not torch.allclose(exact, expected, atol=1e-2)
    assert_within_budget(ours, expected, plain)
    decided = {one.site.name: one.exact for one in attn.reports()[-1].decisions}
    assert [name for name, stays in decided.items() if not stays] == ["outer.attn1"]
    assert len(decided) == 4


class Bare(UNet):
    """Without the norm that tokens are compared in front of, or with tokens that are written to behind it."""

    def __init__(self, *, written: bool) -> None:
        super().__init__()
        self.written = written

    def forward(self, x: Tensor, prompt: Tensor) -> Tensor:
        x = self.first(x).flatten(2).mT.contiguous()
        y = self.outer.norm1(x) if self.written else x.sin()
        if self.written:
            x.mul_(2)
        found: Tensor = self.outer.attn1(y, y, x) + x
        return found


@pytest.mark.parametrize(
    ("metric", "written", "said"),
    [("residual", False, "what a norm made the input"), ("residual", True, "what a norm made the input"), ("x", True, "")],
)
def test_what_compares_tokens_is_proved_or_refused(metric: str, said: str, *, written: bool) -> None:
    slots = {"geometry": "square", "context": "merge(0.4)", "operands": {"metric": metric}}
    given = drawn(1, 4, 8, 8).float(), torch.empty(0)
    report = attn.explain(Bare(written=written).eval(), given, policy={"version": 1, "rules": [{"attn": slots}]})
    (decision,) = report.decisions
    assert [said in one.reason for one in decision.refusals if one.by == "rule 1"] == ([True] if said else [])
    assert decision.exact is bool(said)


@pytest.mark.parametrize("operands", [{"metric": "residual"}, {"metric": "x"}])
def test_a_call_by_itself_knows_no_block(operands: Mapping[str, str]) -> None:
    with pytest.raises(AttnError, match="nobody knows"):
        attend(Q, K, V, {"geometry": [ROWS, COLUMNS], "context": "merge(0.4)", "operands": operands})
    with pytest.raises(AttnError, match="no `merge` asks for one"):
        attend(Q, K, V, {"mask": "all", "operands": operands})
