"""The Triton kernels of linear attention, in Triton's interpreter, against the float64 reference; all gradients included."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from attn_compiler import attend, library
from attn_compiler.algebra.expr import k, q
from attn_compiler.algebra.variant import Variant, with_tables_given
from attn_compiler.errors import ShapeError
from attn_compiler.planning.kept import Kept
from attn_compiler.planning.plan import Refusal
from attn_compiler.planning.planner import Carried
from attn_compiler.planning.resolve import asked_of
from attn_compiler.planning.site import Frame, Kind, Phase, Site
from attn_compiler.runtime import gather, linear, triton, triton_states, tuning
from attn_compiler.runtime.gather import CPP
from attn_compiler.runtime.states import Call
from attn_compiler.runtime.triton import TritonTarget
from attn_compiler.targets import gathered
from attn_compiler.targets.held_past import summed
from attn_compiler.targets.triton import states
from attn_compiler.targets.triton.blocks import Blocks
from attn_compiler.testing import Case, assert_all_within_budget, assert_case, assert_within_budget, drawn_case, variant_of

pytest.importorskip("triton")

FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16
GENERATOR = torch.Generator().manual_seed(3)
TABLES = {
    "padding": torch.arange(120) >= torch.tensor([[0], [37]]),
    "gate": torch.rand(2, 4, 120, generator=GENERATOR, dtype=torch.float64).sigmoid().log().cumsum(-1),
    "beta": torch.rand(2, 4, 120, generator=GENERATOR, dtype=torch.float64),
    "hedgehog_q": torch.randn(4, 8, 4, generator=GENERATOR, dtype=torch.float64),
    "hedgehog_k": torch.randn(4, 8, 4, generator=GENERATOR, dtype=torch.float64),
    "share": torch.linspace(0.2, 0.8, 4, dtype=torch.float64),
}
MIX = {
    "how": "shared_denominator",
    "weights": {"near": "share[h]"},
    "branches": {"near": {"mask": "causal & window(20)"}, "far": {"mask": "causal & ~window(20)", "feature": "hedgehog"}},
}
Slots = Mapping[str, object]
VARIANTS: Mapping[str, tuple[Slots, torch.dtype, tuple[int, int, int]]] = {  # queries, keys, and their heads
    "causal": ({"feature": "elu_one", "mask": "causal"}, FLOAT32, (67, 67, 2)),
    "causal, in bfloat16": ({"feature": "elu_one", "mask": "causal"}, BFLOAT16, (45, 67, 1)),
    "causal, in float16": ({"feature": "elu_one", "mask": "causal"}, FLOAT16, (67, 45, 4)),
    "one query": ({"feature": "elu_one", "mask": "causal"}, FLOAT32, (1, 67, 2)),
    "one token": ({"feature": "elu_one", "mask": "causal", "state": "gate(scalar)"}, BFLOAT16, (1, 1, 2)),
    "everything": ({"feature": "elu_one"}, FLOAT32, (67, 67, 2)),
    "everything, in bfloat16": ({"feature": "elu_one"}, BFLOAT16, (33, 64, 2)),
    "left padding": ({"feature": "elu_one", "mask": "causal & valid(padding)"}, BFLOAT16, (67, 67, 2)),
    "padding and means": (
        {"feature": "elu_one", "mask": "causal & valid(padding)", "normalizer": "linear(mean)"}, FLOAT32, (67, 67, 2)
    ),
    "decay": (
        {"feature": "silu", "mask": "causal", "state": "decay((h + 1) / 8)", "normalizer": "linear(none)", "scale": 0.3},
        BFLOAT16, (67, 67, 2)
    ),
    "gate": ({"feature": "elu_one", "mask": "causal & valid(padding)", "state": "gate(scalar)"}, FLOAT32, (67, 67, 2)),
    "gate, in float16": ({"feature": "elu_one", "mask": "causal", "state": "gate(scalar)"}, FLOAT16, (67, 45, 4)),
    "decay outside of a window": (
        {"feature": "elu_one", "mask": "causal & ~window(20)", "state": "decay((h + 1) / 8)"}, FLOAT32, (67, 67, 2)
    ),
    "a little of the future": ({"feature": "elu_one", "mask": "causal(5)"}, FLOAT32, (45, 67, 1)),
    "shifted weights of the past": (
        {"feature": "identity", "mask": "causal", "scale": 0.3, "normalizer": "linear(subtract)"}, FLOAT32, (67, 67, 2)
    ),
    "learned features": ({"feature": "hedgehog", "mask": "causal"}, FLOAT16, (67, 67, 2)),
    "products of components": ({"feature": "taylor(2)", "mask": "causal"}, BFLOAT16, (67, 67, 2)),
    "a window and what is beyond": ({"mix": MIX}, FLOAT32, (67, 67, 2)),
    "delta": ({"feature": "cosine", "state": "gated_delta", "mask": "causal & valid(padding)"}, FLOAT32, (67, 67, 2)),
}  # fmt: skip


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Call]]:
    """States are always taken where they may be, with short segments and small tiles; and runs are kept."""
    for module in (gathered, linear):
        monkeypatch.setattr(module, "pays", lambda *_: True)
    monkeypatch.setattr(states, "SEGMENT", 16)
    monkeypatch.setattr(tuning, "INTERPRETED", (Blocks(32, 16, width=16),))
    told: list[Call] = []
    run = gather.run_on_triton
    monkeypatch.setattr(gather, "run_on_triton", lambda call, dtype: told.append(call) or run(call, dtype))
    triton_states.blocks_of.cache_clear()
    yield told
    triton_states.blocks_of.cache_clear()


def case_of(slots: Slots, q_len: int, k_len: int, kv_heads: int, **sizes: int) -> Case:
    return drawn_case(slots, {name: x[..., :k_len] if x.ndim > 1 and x.shape[-1] == 120 else x for name, x in TABLES.items()},
                      q_len, k_len, kv_heads=kv_heads, **sizes)  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_states_and_their_gradients_are_what_all_scores_would_give(name: str, runs: list[Call]) -> None:
    slots, dtype, sizes = VARIANTS[name]
    assert_case(case_of(slots, *sizes), dtype, "triton")
    assert len(runs) == 4  # forward, and one for each gradient


def test_rows_of_any_length_are_cut_into_pieces(runs: list[Call]) -> None:
    """40 numbers of a key are two pieces of 32, of which one is cut off; 24 of a value two pieces of 16."""
    slots = {"feature": "elu_one", "mask": "causal", "state": "decay((h + 1) / 8)"}
    assert_case(case_of(slots, 67, 67, 2, dim=40, value_dim=24), FLOAT32, "triton")
    assert runs


def site_of(layer: int, **more: object) -> Site:
    """A causal attention of 4 heads, on a GPU."""
    given = dict.fromkeys((*TABLES, "temperature", "alpha", "meta", "beta_x", "output_gate_x"))
    sizes = (2, 4, 4, 1024, 1024, 8, 8, "float32", Variant(mask=k <= q), Frame(), 1024, 1024)
    site = Site("attn", Kind.SELF, Phase.PREFILL, layer, 8, *sizes, device="cuda", tables=given, input_width=8, rotated=True)  # type: ignore[arg-type]
    return replace(site, **more)  # type: ignore[arg-type]


POLICIES = (
    ("based", 1), ("hedgehog", 0), ("infinitevl", 1), ("inline", 0), ("l2vit", 1), ("lightning", 0), ("lightning", 7),
    ("linfusion", 0), ("lizard", 0), ("lolcats", 0), ("retention", 0),
)  # fmt: skip
LEARNED = {
    **TABLES,
    "gate": TABLES["gate"][..., :67],
    "beta": TABLES["beta"][..., :67],
    "hedgehog_q": torch.randn(8, 4, 8, 4, generator=GENERATOR, dtype=torch.float64) / 3,
    "hedgehog_k": torch.randn(8, 4, 8, 4, generator=GENERATOR, dtype=torch.float64) / 3,
    "temperature": torch.randn(8, 4, generator=GENERATOR, dtype=torch.float64),
    "alpha": torch.rand(8, 4, generator=GENERATOR, dtype=torch.float64),
    "meta": torch.randn(8, 4, generator=GENERATOR, dtype=torch.float64),
    "output_gate": torch.randn(2, 4, 67, 8, generator=GENERATOR, dtype=torch.float64),
}


def unturned(variant: Variant) -> Variant:
    """The variant that takes q and k for what they are before a rotary embedding."""
    branches = () if variant.mix is None else tuple((name, unturned(branch)) for name, branch in variant.mix.branches)
    mix = None if variant.mix is None else replace(variant.mix, branches=branches)
    return replace(variant, unrotated=(), mix=mix)


@pytest.mark.parametrize(("name", "layer"), POLICIES)
def test_ready_policies_are_gathered_by_the_kernels(name: str, layer: int, runs: list[Call]) -> None:
    found = asked_of(library.load_policy(name), site_of(layer)).variant
    assert isinstance(found, Variant), found
    variant = unturned(with_tables_given(found))
    drawn = case_of({"mask": "causal"}, 67, 67, 4)
    dtype = (FLOAT32, BFLOAT16, FLOAT16)[len(name) % 3]
    tables = {table: LEARNED[table] for table in variant.tables()}
    with torch.no_grad():
        assert_case(Case(variant, drawn.q, drawn.k, drawn.v, tables), dtype, "triton")
    assert runs


def drawn(*, tokens: int = 70, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (1, 4, tokens, 8), (1, 2, tokens, 8), (1, 2, tokens, 8)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.usefixtures("runs")
@pytest.mark.parametrize("fades", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("offset", [-80, -20, 0, 7, 100])
def test_the_operator_gathers_what_it_gathers_in_cpp(offset: int, reverse: bool, fades: bool) -> None:
    """Whatever stands ahead of whom, in both directions; C++ has tests of its own, and here the same budget."""
    q, k, v = (x.detach() for x in drawn())
    q, log = q[:, :, :50], torch.rand(1, 4, 70, dtype=torch.float64).cumsum(-1).neg()
    logs = [log[..., :50], log] if fades else []
    found, again = (torch.ops.attn_compiler.gather(q, k, v, logs, offset, reverse, by) for by in ("float32", CPP))
    away = torch.arange(70) - torch.arange(50)[:, None] - offset
    left = (logs[0][..., None] - logs[1][..., None, :]) * (-1 if reverse else 1) if fades else torch.zeros(1, 4, 50, 70)
    seen = away >= 0 if reverse else away <= 0
    weights = (q.double() @ k.double().repeat_interleave(2, 1).mT) * left.double().clamp(max=0).exp() * seen
    exact = weights @ v.double().repeat_interleave(2, 1), weights.sum(-1)
    assert_all_within_budget(list(found), list(exact), lambda: list(again), ["sums", "masses"])


@pytest.mark.usefixtures("runs")
def test_logs_that_have_grown_long_lose_nothing() -> None:
    """At a million, a float is 1/16 off: their differences would be, too."""
    q, k, v = (x.detach() for x in drawn())
    near = torch.rand(1, 4, 70, dtype=torch.float64).cumsum(-1).neg()
    found, again = (torch.ops.attn_compiler.gather(q, k, v, [log, log], 0, False, "float32") for log in (near - 1e6, near))
    rounded = (near - 1e6).float().double()
    lossy = torch.ops.attn_compiler.gather(q, k, v, [rounded, rounded], 0, False, "float32")
    assert all(torch.allclose(x, y, rtol=1e-5, atol=1e-5) for x, y in zip(found, again, strict=True))
    assert not torch.allclose(lossy[0], again[0], rtol=1e-2, atol=1e-2)


def same(found: Tensor, tokens: Sequence[Tensor]) -> None:
    """Whether this is what causal attention to these tokens alone gives."""
    alone, again = (attend(*tokens, VARIANTS["causal"][0], target=target) for target in ("reference", "torch"))  # type: ignore[arg-type]
    assert isinstance(alone, Tensor)
    assert isinstance(again, Tensor)
    assert_within_budget(found, alone, again)


@pytest.mark.usefixtures("runs")
def test_a_gate_that_closes_forgets_all_before_it() -> None:
    q, k, v = drawn()
    gate = torch.zeros(1, 4, 70).index_fill(-1, torch.arange(40, 70), -1000.0)
    slots = {"feature": "elu_one", "mask": "causal", "state": "gate(scalar)"}
    out = attend(q, k, v, slots, tables={"gate": gate}, target="triton")
    assert isinstance(out, Tensor)
    same(out[:, :, 40:], [x[:, :, 40:] for x in (q, k, v)])


def test_heads_that_share_keys_share_their_states(runs: list[Call]) -> None:
    q, k, v = (x.detach() for x in drawn())
    slots: Slots = {"feature": "elu_one", "mask": "causal"}
    attend(q, k, v, slots, target="triton")
    attend(q, k, v, {**slots, "state": "decay(0.1)"}, target="triton")
    attend(q, k, v, {**slots, "state": "decay((h + 1) / 8)"}, target="triton")
    shapes = [triton_states.Run(told, triton_states.likely(told, "float32"), 32).held.shape for told in runs]
    assert [tuple(shape) for shape in shapes] == [(1, 2, 4, 72), (1, 2, 4, 72), (1, 4, 4, 72)]


def test_hidden_keys_leave_nothing_behind(runs: list[Call]) -> None:
    """A row of padding may hold anything."""
    q, k, v = (x.detach() for x in drawn())
    shown = torch.arange(70) >= 9
    k, v = (torch.where(shown[:, None], x, torch.nan) for x in (k, v))
    slots = {"feature": "elu_one", "mask": "causal & valid(ok)"}
    out = attend(q, k, v, slots, tables={"ok": shown[None]}, target="triton")
    assert isinstance(out, Tensor)
    assert runs
    assert not out[:, :, :9].any()
    same(out[:, :, 9:], [x[:, :, 9:] for x in (q, k, v)])


@pytest.mark.usefixtures("runs")
def test_gradients_of_gradients_are_those_of_pytorch() -> None:
    def curvature(target: str, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in drawn(tokens=40)]
        out = attend(*leaves, VARIANTS["causal"][0], target=target)  # type: ignore[arg-type]
        assert isinstance(out, Tensor)
        first = torch.autograd.grad(out.sin().sum(), leaves, create_graph=True)
        return list(torch.autograd.grad(sum(x.square().sum() for x in first), leaves))

    exact = curvature("reference", torch.float64)
    assert_all_within_budget(
        curvature("triton", torch.float32), exact, lambda: curvature("torch", torch.float32), ["of q", "of k", "of v"]
    )


@pytest.mark.usefixtures("runs")
@pytest.mark.parametrize("by", ["float32", "bfloat16"])
def test_the_operator_is_what_autograd_and_compiled_graphs_take_it_for(by: str) -> None:
    q, k, v = drawn(tokens=20, dtype=getattr(torch, by))
    log = torch.rand(1, 4, 20, dtype=torch.float64).cumsum(-1).neg().requires_grad_()
    torch.library.opcheck(torch.ops.attn_compiler.gather.default, (q, k, v, [log, log], 3, True, by))


def test_a_compiled_call_of_any_length_trains_by_the_kernels(runs: list[Call]) -> None:
    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attend(q, k, v, VARIANTS["causal"][0], target="triton")
        assert isinstance(out, Tensor)
        return out

    compiled = torch.compile(step, backend="aot_eager", dynamic=True, fullgraph=True)
    for tokens in (41, 19):
        leaves = drawn(tokens=tokens)
        runs.clear()
        found, wanted = (torch.autograd.grad(way(*leaves).sin().sum(), leaves) for way in (compiled, step))
        assert all(map(torch.equal, found, wanted))
        assert len(runs) == 8


@pytest.mark.parametrize(("queries", "keys"), [(0, 5), (5, 0), (0, 0)])
def test_without_tokens_there_is_nothing_to_gather(queries: int, keys: int) -> None:
    q, k = torch.randn(1, 4, queries, 8, requires_grad=True), torch.randn(1, 2, keys, 8, requires_grad=True)
    out, mass = torch.ops.attn_compiler.gather(q, k, k, [], 0, False, "float32")
    assert out.shape == (1, 4, queries, 8)
    assert not out.any()
    assert not mass.any()
    assert all(not x.any() for x in torch.autograd.grad(out.sum() + mass.sum(), (q, k)))


def test_a_plan_for_a_gpu_names_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "_machine", lambda *_: None)  # as where there is a GPU
    form = "a generated kernel that adds keys up to states"
    asked = {"feature": "elu_one", "mask": "causal"}, {"mix": MIX}, {"mask": "causal & window(20)"}
    forms = [TritonTarget().carry(site_of(0), variant_of(slots)) for slots in asked]
    rest = ", and PyTorch's operators for what is not linear"
    assert [one.form for one in forms if isinstance(one, Carried)] == [form, form + rest, "a generated kernel"]


def test_a_cache_that_let_go_of_keys_is_refused_where_these_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "_machine", lambda *_: None)
    decays, near = variant_of({"mask": "causal", "state": "decay(0.1)"}), variant_of({"mask": "causal & window(20)"})
    kept, recalls = site_of(0, kept=Kept(0, 32)), site_of(0, kept=Kept(0, 0), recalls=1)
    assert isinstance(TritonTarget().carry(kept, near), Carried)
    found = TritonTarget().carry(kept, decays), TritonTarget().carry(recalls, near)
    reasons = [one.reason if isinstance(one, Refusal) else "" for one in found]
    assert "this model's cache holds the latest 32 tokens, and this needs every token" in reasons[0]
    assert reasons[1].startswith("this model's cache holds 1 states and ")


def test_a_plan_says_where_states_of_a_cache_are_met(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "_machine", lambda *_: None)
    bare = site_of(0, q_len=1, q_hint=1, computes=Variant(), frame=None, kept=Kept(0, 0), recalls=1)

    def beside_its_states(state: str, site: Site = bare) -> Carried | Refusal:
        variant = variant_of({"state": state})
        return TritonTarget().carry(replace(site, summed=summed(variant, site)), variant)

    found = beside_its_states("decay(0.1)")
    form = "a generated kernel that adds keys up to states, which begin with those of the cache"
    assert found == Carried(form, gains=True)
    trained = beside_its_states("decay(slopes)", replace(bare, phase=Phase.TRAIN, tables={"slopes": None}))
    assert isinstance(trained, Refusal)
    assert trained.reason == "beside states its kernels know no gradient of a decay's rate"


def test_what_states_cannot_carry_is_refused(runs: list[Call]) -> None:
    """The rate of a decay is trained by PyTorch's operators."""
    slots = {"feature": "silu", "mask": "causal", "state": "decay(slopes)"}
    with pytest.raises(ShapeError, match="the target triton: it does not carry `feature`"):
        attend(*drawn(), slots, tables={"slopes": torch.ones(4, requires_grad=True)}, target="triton")
    with pytest.raises(ShapeError, match="the target triton: it does not carry `feature`"):
        attend(*drawn(), VARIANTS["causal"][0], target="triton", return_lse=True)
    assert not runs
