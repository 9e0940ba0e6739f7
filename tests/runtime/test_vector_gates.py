"""A gate for each feature, as in gated linear attention: the reference is the recurrence, chunks compute what it does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import attn_compiler as attn
from attn_compiler.algebra import wire
from attn_compiler.errors import ShapeError
from attn_compiler.runtime.step import Past
from attn_compiler.targets import faded, gathered
from attn_compiler.testing import Case, assert_all_within_budget, assert_case, assert_within_budget, drawn_case, variant_of

TOKENS, HEADS, DIM = 150, 4, 8
GENERATOR = torch.Generator().manual_seed(4)


def logs(closed: float) -> Tensor:
    """Running logs of gates, [batch, heads, tokens, features], some of which are all but closed for a token."""
    drawn = torch.rand(2, HEADS, TOKENS, DIM, generator=GENERATOR, dtype=torch.float64)
    return torch.where(drawn < 0.03, -closed, drawn.sigmoid().log()).cumsum(2)


TABLES = {"gate": logs(3.0), "shut": logs(300.0), "padding": torch.arange(TOKENS) >= torch.tensor([[0], [37]])}
VARIANTS: Mapping[str, Mapping[str, object]] = {
    "gla": {"state": "gate(vector)", "mask": "causal", "normalizer": "linear(none)", "scale": "1 / sqrt(dim)"},
    "mapped": {"feature": "elu_one", "state": "gate(vector)", "mask": "causal"},
    "padded": {"feature": "elu_one", "state": "gate(vector)", "mask": "causal & valid(padding)"},
    "shut": {"feature": "elu_one", "state": "gate(vector, running=shut)", "mask": "causal", "normalizer": "linear(none)"},
}
LATER: Mapping[str, Mapping[str, object]] = {
    "far": {"feature": "elu_one", "state": "gate(vector)", "mask": "causal & ~window(12)"},
    "near": {"feature": "elu_one", "state": "gate(vector)", "mask": "causal & window(12)"},
    "counted": {"feature": "elu_one", "state": "gate(vector)", "mask": "causal", "normalizer": "linear(mean)"},
    "mixed": {
        "mix": {
            "how": "shared_denominator",
            "branches": {
                "near": {"mask": "causal & window(9)"},
                "far": {"mask": "causal", "feature": "elu_one", "state": "gate(vector)"},
            },
        }
    },
    "heads": {"heads": {"0:2": {"mask": "causal"}, "rest": {"mask": "causal", "feature": "elu_one", "state": "gate(vector)"}}},
}


def case_of(name: str, q_len: int, k_len: int, kv_heads: int) -> Case:
    slots = {**VARIANTS, **LATER}[name]
    tables = {
        one: x[:, :, :k_len] if x.ndim == 4 else x[:, :k_len] for one, x in TABLES.items() if one in variant_of(slots).tables()
    }
    return drawn_case(slots, tables, q_len, k_len, kv_heads=kv_heads)


def recurrent(case: Case, name: str) -> Tensor:
    """S = diag(α) S + k vᵀ, o = S q, token by token, as Yang et al. write it; with ones beside v, the sum of the weights."""
    ratio = case.q.shape[1] // case.k.shape[1]
    k, v = (x.repeat_interleave(ratio, dim=1) for x in (case.k, case.v))
    q = case.q * DIM**-0.5
    if name != "gla":
        q, k = (torch.nn.functional.elu(x) + 1 for x in (case.q, k))
    v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
    log = case.tables["shut" if name == "shut" else "gate"]
    state, out, first = q.new_zeros(2, HEADS, DIM, v.shape[-1]), [], k.shape[2] - q.shape[2]
    for t in range(k.shape[2]):
        alpha = (log[:, :, t] - log[:, :, t - 1]).exp() if t else torch.ones_like(log[:, :, 0])
        real = case.tables["padding"][:, t].reshape(-1, 1, 1, 1) if name == "padded" else 1.0
        state = alpha[..., None] * state + real * k[:, :, t, :, None] * v[:, :, t, None]
        if t >= first:
            out.append((q[:, :, t - first, :, None] * state).sum(-2))
    found = torch.stack(out, dim=2)
    if name in ("gla", "shut"):
        return found[..., :-1]
    return torch.where(found[..., -1:] > 0, found[..., :-1] / (found[..., -1:] + 1e-6), 0.0)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(("q_len", "k_len", "kv_heads"), [(70, 70, 2), (3, 20, 4), (1, 1, 1)])
def test_the_meaning_is_the_recurrence(name: str, q_len: int, k_len: int, kv_heads: int) -> None:
    case = case_of(name, q_len, k_len, kv_heads)
    found = attn.reference(case.q, case.k, case.v, case.variant, tables=case.tables)
    exact = recurrent(case, name)
    assert isinstance(found, Tensor)
    assert_within_budget(found, exact, exact, name)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(("q_len", "k_len", "kv_heads"), [(TOKENS, TOKENS, 2), (67, 97, 4), (64, 128, 1)])
def test_chunks_and_their_gradients_are_those_of_the_meaning(
    name: str, q_len: int, k_len: int, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []
    monkeypatch.setattr(gathered, "pays", lambda *_: True)
    by_chunks = faded._by_chunks
    monkeypatch.setattr(faded, "_by_chunks", lambda *given: ran.append(1) or by_chunks(*given))
    assert_case(case_of(name, q_len, k_len, kv_heads), torch.float32, "torch")
    assert ran


@pytest.mark.parametrize("name", LATER)
def test_where_no_states_serve_scores_mean_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathered, "pays", lambda *_: True)
    assert_case(case_of(name, 40, 70, 2), torch.float32, "torch")


def test_gates_of_several_features_are_not_those_of_one() -> None:
    """Else the tests above could not tell one from the other."""
    case = case_of("gla", 20, 20, 2)
    same = {"gate": case.tables["gate"][..., :1].expand_as(case.tables["gate"])}
    found, alike = (attn.reference(case.q, case.k, case.v, case.variant, tables=x) for x in (case.tables, same))
    scalar = {**VARIANTS["gla"], "state": "gate(scalar)"}
    assert not torch.allclose(found, alike, rtol=1e-3)
    assert torch.allclose(alike, attn.reference(case.q, case.k, case.v, scalar, tables={"gate": same["gate"][..., 0]}))


def test_what_is_dropped_is_no_sum_of_states(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathered, "pays", lambda *_: True)
    case, found = case_of("gla", 70, 70, 2), []
    variant = replace(case.variant, dropout=0.5)
    for seed in (0, 1):
        torch.manual_seed(seed)
        given = (x.float() for x in (case.q, case.k, case.v))
        found.append(attn.attend(*given, variant, tables=case.tables, training=True, target="torch"))
    assert not torch.allclose(*found)


def test_open_gates_have_the_gradients_of_the_plain_formula() -> None:
    """Their logs are equal from token to token, where `min(log, 0)` has a corner."""
    case, shown = case_of("gla", 20, 20, 4), torch.ones(20, 20).tril().bool()
    logs = case.tables["gate"].clone()
    logs[:, :, 9:] = logs[:, :, 9:10]
    scalar = {"mask": "causal", "state": "gate(scalar)", "normalizer": "linear(none)", "scale": 1.0}

    def plain(gate: Tensor) -> Tensor:
        left = torch.where(shown, gate[..., :, None] - gate[..., None, :], 0.0).exp()
        return (case.q @ case.k.mT * left * shown) @ case.v

    def gradient(run: Callable[[Tensor], Tensor], of: Tensor) -> Tensor:
        gate = of.detach().clone().requires_grad_()
        return torch.autograd.grad(run(gate).sin().sum(), gate)[0]

    expected = gradient(plain, logs[..., 0])
    found = gradient(lambda gate: attn.reference(case.q, case.k, case.v, scalar, tables={"gate": gate}), logs[..., 0])
    torch.testing.assert_close(found, expected)
    vector = {**scalar, "state": "gate(vector)"}
    alike = logs[..., :1].expand_as(logs)
    found = gradient(lambda gate: attn.reference(case.q, case.k, case.v, vector, tables={"gate": gate}), alike)
    torch.testing.assert_close(found.sum(-1), expected)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_few_tokens_are_trained_under_torch_compile(backend: str) -> None:
    case = case_of("gla", 20, 20, 2)
    torch.compiler.reset()

    def run(given: Case, *, compiled: bool = False) -> list[Tensor]:
        def attend(*leaves: Tensor) -> Tensor:
            out = attn.attend(*leaves[:3], given.variant, tables={"gate": leaves[3]}, target="torch")
            assert isinstance(out, Tensor)
            return out

        found = (torch.compile(attend, backend=backend) if compiled else attend)(*given.leaves())
        return [found, *torch.autograd.grad(found.sum(), given.leaves())]

    low = case.to(torch.float32)
    assert_all_within_budget(run(low, compiled=True), run(low.to(torch.float64)), lambda: run(low))


def test_gates_travel_as_text() -> None:
    variant = variant_of(VARIANTS["mapped"])
    assert variant.gates is not None
    assert wire.read(wire.write(variant)) == variant


def test_who_does_not_carry_them_says_so() -> None:
    case = case_of("gla", 20, 20, 2)
    with pytest.raises(ShapeError, match="the target flex: "):
        attn.attend(case.q.float(), case.k.float(), case.v.float(), VARIANTS["gla"], tables=case.tables, target="flex")  # type: ignore[arg-type]


def by_steps(given: tuple[Tensor, ...], name: str, cuts: tuple[int, ...]) -> tuple[Tensor, Past]:
    """All tokens, of which so many are given at a time; and what is held in the end."""
    parts, past, first, slots = [], None, 0, {**VARIANTS, **LATER}[name]
    for cut in cuts:
        new = (x[:, :, first : first + cut] for x in given)
        out, past = attn.step(*new, slots, past, position=first, tables=TABLES)
        parts.append(out)
        first += cut
    assert past is not None
    return torch.cat(parts, dim=2), past


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("cuts", [(1,) * 6, (70, 1, 1), (5, 66, 3, 12, 1)])
def test_steps_are_the_recurrence(name: str, cuts: tuple[int, ...]) -> None:
    case = case_of(name, sum(cuts), sum(cuts), 2)
    plain = attn.attend(*(x.float() for x in (case.q, case.k, case.v)), case.variant, tables=case.tables, target="torch")
    found, past = by_steps(tuple(x.float() for x in (case.q, case.k, case.v)), name, cuts)
    assert isinstance(plain, Tensor)
    assert_within_budget(found, recurrent(case, name), plain, name)
    assert [tuple(x.shape) for x in (*past.states, past.k)] == [(2, HEADS, DIM + 1, DIM + 1), (2, 2, 0, DIM)]


@pytest.mark.parametrize("name", [name for name in LATER if name not in ("near", "heads")])
@pytest.mark.parametrize("cuts", [(30, 1, 1, 1), (5, 66, 3, 12, 1)])
def test_a_state_beside_other_things_is_what_all_tokens_at_once_give(name: str, cuts: tuple[int, ...]) -> None:
    case = case_of(name, sum(cuts), sum(cuts), 2)
    leaves = tuple(x.detach().float().requires_grad_() for x in (case.q, case.k, case.v))
    wide = tuple(x.detach().double().requires_grad_() for x in leaves)

    def with_gradients(out: object, of: tuple[Tensor, ...]) -> list[Tensor]:
        assert isinstance(out, Tensor)
        return [out.detach(), *torch.autograd.grad((out * out.detach().sin()).sum(), of)]

    exact = with_gradients(attn.reference(*wide, case.variant, tables=case.tables), wide)
    found = with_gradients(by_steps(leaves, name, cuts)[0], leaves)
    assert_all_within_budget(
        found, exact, lambda: with_gradients(attn.attend(*leaves, case.variant, tables=case.tables, target="torch"), leaves)
    )
