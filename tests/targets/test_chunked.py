"""Linear attention by states: right at every length, offset and group of heads, and taken only where it is linear."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from attn_compiler import attend
from attn_compiler.algebra import expr as e
from attn_compiler.targets import gathered
from attn_compiler.targets.linear import Linear, linear
from attn_compiler.testing import assert_case, drawn_case, variant_of

TABLES = {
    "slopes": torch.tensor([0.1, 0.4, 0.2, 0.9], dtype=torch.float64),
    "ok": torch.rand(2, 300, generator=torch.Generator().manual_seed(3)) < 0.8,
    "gate": torch.rand(2, 4, 300, generator=torch.Generator().manual_seed(4), dtype=torch.float64).sigmoid().log().cumsum(-1),
}
VARIANTS: Mapping[str, Mapping[str, object]] = {
    "causal": {"feature": "elu_one", "mask": "causal"},
    "everything": {"feature": "elu_one"},
    "padding": {"feature": "elu_one", "mask": "valid(ok)"},
    "causal with padding and means": {"feature": "elu_one", "mask": "causal & valid(ok)", "normalizer": "linear(mean)"},
    "decay": {"feature": "silu", "mask": "causal", "state": "decay(slopes)", "normalizer": "linear(none)"},
    "gate": {"feature": "elu_one", "mask": "causal", "state": "gate(scalar)"},
    "outside of a window": {"feature": "elu_one", "mask": "causal & ~window(20)"},
    "decay outside of a window": {"feature": "elu_one", "mask": "causal & ~window(20)", "state": "decay(slopes)"},
    "a little of the future": {"feature": "elu_one", "mask": "causal(5)"},
    "shifted weights": {"feature": "identity", "scale": 0.3, "normalizer": "linear(subtract)"},
    "shifted weights of the past": {"feature": "identity", "mask": "causal", "scale": 0.3, "normalizer": "linear(subtract)"},
}
NOT_LINEAR: Mapping[str, Mapping[str, object]] = {
    "a softmax": {"mask": "causal"},
    "a window": {"feature": "elu_one", "mask": "causal & window(9)"},
    "documents": {"feature": "elu_one", "mask": "causal & same(ok)"},
    "a decay to both sides": {"feature": "elu_one", "state": "decay(0.5)"},
    "a decay that reaches ahead": {"feature": "elu_one", "mask": "causal(5)", "state": "decay(0.5)"},
    "a score that is no product": {"feature": "elu_one", "score": "abs(score)"},
    "a clamped denominator of squares": {"feature": "elu_one", "score": "score * score"},
}


@pytest.fixture
def by_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """States are always taken where they may be."""
    monkeypatch.setattr(gathered, "pays", lambda *_: True)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(("q_len", "k_len", "kv_heads"), [(130, 130, 2), (1, 97, 4), (67, 97, 2), (97, 67, 4)])
@pytest.mark.usefixtures("by_states")
def test_states_compute_what_scores_would(name: str, q_len: int, k_len: int, kv_heads: int) -> None:
    assert_case(drawn_case(VARIANTS[name], TABLES, q_len, k_len, kv_heads=kv_heads, value_dim=6), torch.float32)


@pytest.mark.parametrize("name", VARIANTS)
def test_what_may_be_summed_up_before_queries_meet_it_is_linear(name: str) -> None:
    assert linear(variant_of(VARIANTS[name])) is not None


@pytest.mark.parametrize("name", NOT_LINEAR)
def test_what_may_not_is_not(name: str) -> None:
    assert linear(variant_of(NOT_LINEAR[name])) is None


def test_a_window_beside_the_past_leaves_a_shorter_past() -> None:
    found = linear(variant_of(VARIANTS["outside of a window"]))
    assert found == Linear(20, e.true, None)


@pytest.mark.parametrize(("length", "taken"), [(64, 0), (2048, 1)])
def test_states_are_taken_where_they_save_work(length: int, taken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    gather = gathered.gather_by_states
    monkeypatch.setattr(
        "attn_compiler.targets.torch_target.gather_by_states", lambda *given: calls.append(1) or gather(*given)
    )  # fmt: skip
    q = torch.randn(1, 1, length, 32)
    attend(q, q, q, {"feature": "elu_one", "mask": "causal"}, target="torch")
    assert len(calls) == taken


@pytest.mark.usefixtures("by_states")
def test_a_gate_that_closes_forgets_all_before_it() -> None:
    """The running sum falls by a thousand: nothing overflows, and the gradients are numbers."""
    case = drawn_case(VARIANTS["gate"], TABLES, 130, 130, value_dim=6)
    gate = case.tables["gate"].clone()
    gate[..., 40:] -= 1000
    leaves = [x.float().requires_grad_() for x in (case.q, case.k, case.v, gate[..., :130])]
    out = attend(*leaves[:3], case.variant, tables={"gate": leaves[3]}, target="torch")
    assert isinstance(out, Tensor)
    alone = attend(*(x[:, :, 40:] for x in leaves[:3]), case.variant, tables={"gate": leaves[3][..., 40:]})
    assert isinstance(alone, Tensor)
    assert torch.allclose(out[:, :, 40:], alone, atol=1e-5)
    assert all(x.isfinite().all() for x in torch.autograd.grad(out.sum(), leaves))
