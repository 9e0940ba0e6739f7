"""A gate for each feature on Triton, in its interpreter, against the float64 reference: states whose rows fade each by itself.

Of q and k the gradients are gathered by states whose columns do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from attn_compiler import attend, library
from attn_compiler.algebra.variant import Variant, with_tables_given
from attn_compiler.planning.kept import Kept
from attn_compiler.planning.planner import Carried
from attn_compiler.planning.resolve import asked_of
from attn_compiler.planning.site import Phase
from attn_compiler.runtime import gather, linear, triton, triton_states, tuning
from attn_compiler.runtime.states import Call
from attn_compiler.runtime.triton import TritonTarget
from attn_compiler.targets import gathered
from attn_compiler.targets.held_past import summed
from attn_compiler.targets.triton import states
from attn_compiler.targets.triton.blocks import Blocks
from attn_compiler.testing import Case, assert_all_within_budget, assert_case, drawn_case, variant_of
from runtime.test_gather_apart import by_definition
from runtime.test_triton_states import site_of

pytest.importorskip("triton")

FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16
TOKENS, WIDEST = 27, 40
GENERATOR = torch.Generator().manual_seed(6)


def logs(closed: float) -> Tensor:
    """Running logs of gates, [batch, heads, tokens, features], some of which are all but closed for a token."""
    drawn = torch.rand(2, 2, TOKENS, WIDEST, generator=GENERATOR, dtype=torch.float64)
    return torch.where(drawn < 0.05, -closed, drawn.sigmoid().log()).cumsum(2)


TABLES = {
    "gate": logs(3.0),
    "shut": logs(300.0),
    "open": torch.zeros(2, 2, TOKENS, WIDEST, dtype=torch.float64),
    "padding": torch.arange(TOKENS) >= torch.tensor([[0], [11]]),
}
ELU = {"feature": "elu_one", "state": "gate(vector)", "mask": "causal"}
BARE = {"state": "gate(vector)", "mask": "causal", "normalizer": "linear(none)", "scale": "1 / sqrt(dim)"}
Slots = Mapping[str, object]
VARIANTS: Mapping[
    str, tuple[Slots, torch.dtype, tuple[int, ...]]
] = {  # queries, keys, key heads; then numbers of keys and values
    "bare": (BARE, FLOAT32, (TOKENS, TOKENS, 1)),
    "bare, in bfloat16": (BARE, BFLOAT16, (TOKENS, TOKENS, 2)),
    "bare, in float16": (BARE, FLOAT16, (13, TOKENS, 1)),
    "mapped": (ELU, FLOAT32, (13, TOKENS, 2)),
    "mapped, in bfloat16": (ELU, BFLOAT16, (TOKENS, 18, 1)),
    "padded": ({**ELU, "mask": "causal & valid(padding)"}, FLOAT32, (TOKENS, TOKENS, 1)),
    "padded, with means": ({**ELU, "mask": "causal & valid(padding)", "normalizer": "linear(mean)"}, BFLOAT16, (25, 25, 2)),
    "gates that close": ({**BARE, "state": "gate(vector, running=shut)"}, FLOAT32, (TOKENS, TOKENS, 1)),
    "gates that close, in float16": ({**ELU, "state": "gate(vector, running=shut)"}, FLOAT16, (25, 25, 1)),
    "gates that stay open": ({**ELU, "state": "gate(vector, running=open)"}, FLOAT32, (25, 25, 1)),
    "what lies behind a window": ({**ELU, "mask": "causal & ~window(9)"}, FLOAT32, (25, 25, 1)),
    "one query": (BARE, FLOAT32, (1, TOKENS, 2)),
    "one token": (ELU, BFLOAT16, (1, 1, 1)),
    "odd sizes": (BARE, FLOAT32, (25, 25, 1, 12, 7)),
    "several pieces": (ELU, FLOAT32, (14, 14, 1, 40, 24)),
}


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Call]]:
    """States are always taken where they may be, with short segments and small tiles; and runs are kept."""
    for module in (gathered, linear):
        monkeypatch.setattr(module, "pays", lambda *_: True)
    monkeypatch.setattr(states, "SEGMENT", 8)
    monkeypatch.setattr(tuning, "INTERPRETED", (Blocks(4, 8, width=16),))
    told: list[Call] = []
    run = gather.run_on_triton
    monkeypatch.setattr(gather, "run_on_triton", lambda call, dtype: told.append(call) or run(call, dtype))
    triton_states.blocks_of.cache_clear()
    yield told
    triton_states.blocks_of.cache_clear()


def case_of(slots: Slots, q_len: int, k_len: int, kv_heads: int, dim: int = 8, value_dim: int | None = None) -> Case:
    tables = {name: x[:, :, :k_len, :dim] if x.ndim == 4 else x[:, :k_len] for name, x in TABLES.items()}
    return drawn_case(slots, tables, q_len, k_len, heads=2, kv_heads=kv_heads, dim=dim, value_dim=value_dim)


@pytest.mark.parametrize("name", VARIANTS)
def test_states_and_their_gradients_are_what_all_scores_would_give(name: str, runs: list[Call]) -> None:
    slots, dtype, sizes = VARIANTS[name]
    assert_case(case_of(slots, *sizes), dtype, "triton")
    assert sorted(told.logs[0].ndim for told in runs if told.logs) == [4, 4, 5, 5]  # forward and of v, of q and of k


def apart(rows: bool, q_len: int, k_len: int, offset: int) -> tuple[list[Tensor], list[Tensor]]:
    """Operands, and logs of queries that stand where the latest key stands which they see."""
    generator = torch.Generator().manual_seed(offset)
    shapes = (1, 2, q_len, 8), (1, 1, k_len, 8), (1, 2, k_len, 6)
    log = logs(300.0)[:1, :, :k_len, : 8 if rows else 6]
    at_query = log[:, :, torch.arange(q_len).add(offset).clamp(0, k_len - 1)]
    found = [at_query, log] if rows else [at_query[:, :, :, None], log[:, :, :, None]]
    return [torch.randn(shape, generator=generator) for shape in shapes], found


@pytest.mark.usefixtures("runs")
@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("offset", [-30, -6, 0, 5, 30])
def test_the_operator_gathers_what_it_is_defined_to(offset: int, reverse: bool, rows: bool) -> None:
    given, logs = apart(rows, 18, 26, offset)

    def defined(real: torch.dtype) -> list[Tensor]:
        q, k, v = (x.to(real) for x in given)
        out, mass = q.new_zeros(1, 2, 18, 6), q.new_zeros(1, 2, 18)
        by_definition(Call(q, k, v, out, mass, (logs[0], logs[1]), None, offset, reverse))
        return [out, mass.flip(-1) if reverse else mass]

    found = torch.ops.attn_compiler.gather(*given, logs, offset, reverse, "float32")
    assert_all_within_budget(list(found), defined(torch.float64), lambda: defined(torch.float32), ["sums", "masses"])
    assert rows or not found[1].any()


@pytest.mark.usefixtures("runs")
@pytest.mark.parametrize("rows", [True, False])
def test_logs_that_have_grown_long_lose_nothing(rows: bool) -> None:
    """At a million, a float is 1/16 off: their differences would be, too."""
    given, near = apart(rows, 26, 26, 0)
    near = [x / 100 for x in near]
    far = [x - 1e6 for x in near]
    found, again = (torch.ops.attn_compiler.gather(*given, log, 0, False, "float32")[0] for log in (far, near))
    lossy = torch.ops.attn_compiler.gather(*given, [x.float().double() for x in far], 0, False, "float32")[0]
    assert torch.allclose(found, again, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(lossy, again, rtol=1e-2, atol=1e-2)


def test_a_feature_whose_gate_closes_forgets_all_before_it_and_others_do_not(runs: list[Call]) -> None:
    case = case_of(BARE, 26, 26, 2)
    q, k, v = (x.float() for x in (case.q, case.k, case.v))
    gate = torch.zeros(2, 2, 26, 8)
    gate[:, :, 15:, :4] = -1000.0
    slots = {**BARE, "scale": 1.0}
    found = attend(q, k, v, slots, tables={"gate": gate}, target="triton")
    late = torch.arange(26) >= 15
    kept = torch.where(late[:, None] & ~late, torch.arange(8).ge(4).float()[:, None, None], 1.0)  # [features, queries, keys]
    weights = torch.einsum("bhqd,bhkd,dqk->bhqk", q, k, kept).tril()
    assert isinstance(found, Tensor)
    torch.testing.assert_close(found, weights @ v, atol=1e-4, rtol=1e-4)
    assert runs


@pytest.mark.usefixtures("runs")
def test_the_operator_is_what_autograd_and_compiled_graphs_take_it_for() -> None:
    (q, k, v), log = apart(True, 9, 9, 0)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(
        torch.ops.attn_compiler.gather.default, (*leaves, [x.requires_grad_() for x in log], 0, False, "float32")
    )


def test_the_ready_policy_is_gathered_by_the_kernels(runs: list[Call], monkeypatch: pytest.MonkeyPatch) -> None:
    found = asked_of(
        library.load_policy("gla"), site_of(0, tables={"gate_x": None, "gate_bias": None, "output_gate_x": None})
    ).variant
    assert isinstance(found, Variant), found
    variant = with_tables_given(found)
    case = case_of(BARE, 25, 25, 2)
    given = {"gate": TABLES["gate"][:, :, :25, :8], "output_gate": torch.randn(2, 2, 25, 8, generator=GENERATOR).double()}
    assert_case(Case(variant, case.q, case.k, case.v, {name: given[name] for name in variant.tables()}), FLOAT32, "triton")
    assert len(runs) == 4


def test_a_plan_names_the_kernels_forward_trained_and_behind_states(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "_machine", lambda *_: None)  # as where there is a GPU
    variant, target, form = variant_of(BARE), TritonTarget(), "a generated kernel that adds keys up to states"
    sites = site_of(0), site_of(0, phase=Phase.TRAIN)
    assert [target.carry(site, variant) for site in sites] == [Carried(form, gains=False)] * 2
    bare = site_of(0, q_len=1, q_hint=1, computes=Variant(), frame=None, kept=Kept(0, 0), recalls=1)
    behind = target.carry(replace(bare, summed=summed(variant, bare)), variant)
    assert behind == Carried(f"{form}, which begin with those of the cache", gains=True)
