"""Whatever fails of ours, the model compiles as Inductor alone compiles it, and the report says what failed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import attn_compiler as attn
from attn_compiler import backend
from attn_compiler.errors import PolicyError, RefusedError, TableError
from attn_compiler.graph import analysis
from attn_compiler.testing import assert_within_budget
from end_to_end.models import WINDOW, double, like_llama, llama, outcome, tokens

quick = pytest.mark.usefixtures("quick")


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT * 8**-0.5, dim=-1) @ v


def refused(**rule: object) -> dict[str, object]:
    """A policy whose only rule speaks of distances, which nobody knows in a bare function."""
    return {"version": 1, "rules": [{"match": {}, "attn": {"mask": "window(4)"}, **rule}]}


@pytest.mark.parametrize("failing", ["match", "describe", "rewrite", "capture"])
def test_a_failure_leaves_the_graph_to_inductor(failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> object:
        raise ZeroDivisionError("on purpose")

    compiled_graphs = []

    def watched(gm, inputs, config_patches=None):  # type: ignore[no-untyped-def]
        compiled_graphs.append(gm)
        return gm.forward

    handed = []
    original = backend._rewritten
    monkeypatch.setattr(
        backend, "_rewritten", lambda gm, *rest: (handed.append((gm, gm.print_readable(False))), original(gm, *rest))[1]
    )
    monkeypatch.setattr(backend.private, "inductor", lambda: watched)
    monkeypatch.setattr(analysis, failing, fail)
    model, ids = llama("eager").eval(), tokens()
    with torch.no_grad():
        out = torch.compile(model, backend="attn", options={"policy": WINDOW})(ids).last_hidden_state
        assert torch.equal(out, model(ids).last_hidden_state)
    assert attn.reports()[-1].plan.warnings == ("the graph is left as it is: ZeroDivisionError: on purpose",)
    (before, code), *_ = handed
    assert compiled_graphs[0] is before
    assert compiled_graphs[0].print_readable(False) == code


@quick
def test_what_is_refused_stays_as_it_is() -> None:
    q, k, v = torch.randn(3, 1, 2, 16, 8)
    out = torch.compile(attend, backend="attn", options={"policy": refused()})(q, k, v)
    assert torch.equal(out, attend(q, k, v))
    assert "nobody knows where this site's queries stand" in attn.reports()[-1].refusals[0][1].reason


@quick
def test_a_rule_may_turn_a_refusal_into_an_error() -> None:
    q, k, v = torch.randn(3, 1, 2, 16, 8)
    compiled = torch.compile(attend, backend="attn", options={"policy": refused(fallback="error")})
    with pytest.raises(BackendCompilerFailed, match="rule 1 says `fallback: error`") as error:
        compiled(q, k, v)
    assert isinstance(error.value.inner_exception, RefusedError)


@quick
def test_a_missing_table_is_an_error_that_names_it() -> None:
    policy = {
        "version": 1,
        "labels": {"document": {"given": "documents"}},
        "rules": [{"match": {}, "attn": {"mask": "same(document)"}}],
    }
    compiled = torch.compile(llama(), backend="attn", options={"policy": policy, "tables": {"document": torch.zeros(16)}})
    with pytest.raises(BackendCompilerFailed, match=r'"documents".*did you mean "document"') as error:
        compiled(tokens())
    assert isinstance(error.value.inner_exception, TableError)


@quick
def test_an_error_of_a_policy_keeps_its_message() -> None:
    q, k, v = torch.randn(3, 1, 2, 16, 8)
    wrong = {"version": 1, "rules": [{"match": {"kid": "self"}, "attn": "exact"}]}
    compiled = torch.compile(attend, backend="attn", options={"policy": wrong})
    with pytest.raises(BackendCompilerFailed, match=r'unknown key of `match` "kid".*did you mean "kind"') as error:
        compiled(q, k, v)
    assert isinstance(error.value.inner_exception, PolicyError)


@quick
def test_weights_that_somebody_else_reads_are_left_alone() -> None:
    model, ids = llama("eager", output_attentions=True).eval(), tokens()
    with torch.no_grad():
        got = torch.compile(model, backend="attn", options={"policy": WINDOW})(ids)
        expected = model(ids)
    assert all(torch.equal(a, x) for a, x in zip(got.attentions, expected.attentions, strict=True))
    decisions = attn.reports()[-1].decisions
    assert [d.target for d in decisions] == [None, None]
    assert all("attention weights are also read" in d.refusals[0].reason for d in decisions)


class Scaled(nn.Module):
    """The scale is a float that the caller passes: Dynamo compiles it as a number first, and as a tensor once it changes."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return torch.softmax(q @ k.mT * scale, dim=-1) @ v


def test_a_float_that_changes_is_right_every_time() -> None:
    policy = {"version": 1, "rules": [{"match": {}, "attn": {"score": "softcap(score, 5)"}}]}
    q, k, v = torch.randn(3, 1, 2, 16, 8)
    compiled = torch.compile(Scaled(), backend="attn", options={"policy": policy})

    def by_hand(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return torch.softmax(torch.tanh(q @ k.mT * scale / 5) * 5, dim=-1) @ v

    for scale in (0.3, 0.7, 1.9):
        exact = by_hand(q.double(), k.double(), v.double(), scale)
        assert_within_budget(compiled(q, k, v, scale), exact, by_hand(q, k, v, scale), f"scale {scale}")
    assert attn.reports()[-1].decisions[0].target


@quick
def test_graph_breaks_give_one_report_per_graph() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = llama("eager"), llama("eager")

        def forward(self, ids: Tensor) -> Tensor:
            hidden = self.first(ids).last_hidden_state
            torch._dynamo.graph_break()
            return self.second(inputs_embeds=hidden).last_hidden_state

    model, ids = Broken().eval(), tokens()
    before = len(attn.reports())
    with torch.no_grad():
        out = torch.compile(model, backend="attn", options={"policy": "exact"})(ids)
        assert_within_budget(out, double(model)(ids), model(ids))
    assert [len(report.decisions) for report in attn.reports()[before:]] == [2, 2]


@quick
def test_a_whole_model_is_one_graph_and_two_policies_do_not_meet() -> None:
    model, other, ids = llama("eager").train(), llama("eager").train(), tokens()
    exact = torch.compile(model, backend="attn", fullgraph=True, options={"policy": "exact"})
    narrow = torch.compile(other, backend="attn", fullgraph=True, options={"policy": WINDOW})
    for _ in range(2):
        for compiled, eager, window in ((exact, model, None), (narrow, other, 8)):
            out, *_ = outcome(compiled, like_llama(ids))
            run = like_llama(ids, window)
            assert_within_budget(out, run(double(eager)).detach(), run(eager).detach())


@quick
@pytest.mark.parametrize("layers", [None, "0"])
def test_blocks_may_be_compiled_one_by_one(layers: str | None) -> None:
    match = {"kind": "self"} if layers is None else {"kind": "self", "layers": layers}
    policy = {"version": 1, "rules": [{"match": match, "attn": {"mask": "window(8)"}}]}
    model, ids = llama("eager", num_hidden_layers=4).eval(), tokens()
    expected, exact = (
        like_llama(ids, None if layers else 8)(model).detach(),
        like_llama(ids, None if layers else 8)(double(model)).detach(),
    )
    for layer in model.layers:
        layer.compile(backend="attn", options={"policy": policy})
    before = len(attn.reports())
    with torch.no_grad():
        assert_within_budget(model(ids).last_hidden_state, exact, expected)
    assert len(attn.reports()) == before + 1
    decision = attn.reports()[-1].decisions[0]
    if layers:
        assert decision.target is None
        assert "nobody knows its layer" in decision.refusals[0].reason
