"""The kernel that adds keys up to states, as it trains: right at every length, decay, mask and group of heads."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from attn_compiler import attend
from attn_compiler.algebra.variant import Variant
from attn_compiler.errors import ShapeError
from attn_compiler.planning.planner import Carried, decide
from attn_compiler.planning.resolve import Asked
from attn_compiler.planning.site import Frame, Kind, Phase, Site
from attn_compiler.runtime import gather, linear
from attn_compiler.runtime.cpp import CppTarget
from attn_compiler.runtime.targets import TARGETS
from attn_compiler.targets import gathered
from attn_compiler.testing import assert_all_within_budget, assert_case, assert_within_budget, drawn_case, variant_of

TABLES = {
    "ok": torch.rand(2, 300, generator=torch.Generator().manual_seed(3)) < 0.8,
    "padding": torch.arange(300) >= torch.tensor([[0], [37]]),
    "gate": torch.rand(2, 4, 300, generator=torch.Generator().manual_seed(4), dtype=torch.float64).sigmoid().log().cumsum(-1),
    "hedgehog_q": torch.randn(4, 8, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64),
    "hedgehog_k": torch.randn(4, 8, 4, generator=torch.Generator().manual_seed(6), dtype=torch.float64),
    "share": torch.linspace(0.2, 0.8, 4, dtype=torch.float64),
}
VARIANTS: Mapping[str, Mapping[str, object]] = {
    "causal": {"feature": "elu_one", "mask": "causal"},
    "everything": {"feature": "elu_one"},
    "left padding": {"feature": "elu_one", "mask": "causal & valid(padding)"},
    "padding and means": {"feature": "elu_one", "mask": "causal & valid(ok)", "normalizer": "linear(mean)"},
    "decay": {"feature": "silu", "mask": "causal", "state": "decay((h + 1) / 8)", "normalizer": "linear(none)", "scale": 0.3},
    "gate": {"feature": "elu_one", "mask": "causal & valid(padding)", "state": "gate(scalar)"},
    "decay outside of a window": {"feature": "elu_one", "mask": "causal & ~window(20)", "state": "decay((h + 1) / 8)"},
    "a little of the future": {"feature": "elu_one", "mask": "causal(5)"},
    "shifted weights of the past": {"feature": "identity", "mask": "causal", "scale": 0.3, "normalizer": "linear(subtract)"},
    "learned features": {"feature": "hedgehog", "mask": "causal"},
    "a window and what is beyond": {
        "mix": {
            "how": "shared_denominator",
            "weights": {"near": "share[h]"},
            "branches": {"near": {"mask": "causal & window(20)"}, "far": {"mask": "causal & ~window(20)", "feature": "hedgehog"}},
        }
    },
}
LENGTHS = [(130, 130, 2), (64, 64, 4), (1, 97, 4), (67, 97, 2), (97, 67, 1), (1, 1, 2)]


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """States are always taken where they may be, and the kernel's runs are counted."""
    for module in (gathered, linear):
        monkeypatch.setattr(module, "pays", lambda *_: True)
    counted: list[int] = []
    run = gather.run
    monkeypatch.setattr(gather, "run", lambda call: counted.append(1) or run(call))
    return counted


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(("q_len", "k_len", "kv_heads"), LENGTHS)
def test_states_and_their_gradients_are_what_all_scores_would_give(
    name: str, q_len: int, k_len: int, kv_heads: int, runs: list[int]
) -> None:
    assert_case(drawn_case(VARIANTS[name], TABLES, q_len, k_len, kv_heads=kv_heads), torch.float32, "cpp")
    assert len(runs) == 4  # forward, and one for each gradient


def drawn(*, tokens: int = 70) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (1, 4, tokens, 8), (1, 2, tokens, 8), (1, 2, tokens, 8)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def test_the_rate_of_a_decay_is_trained_by_the_operators_that_lose_less(runs: list[int]) -> None:
    """Its gradient is a small difference of large sums."""
    slots = {"feature": "silu", "mask": "causal", "state": "decay(slopes)", "normalizer": "linear(none)"}
    slopes = torch.tensor([0.1, 0.4, 0.2, 0.9], requires_grad=True)
    attend(*drawn(), slots, tables={"slopes": slopes})
    assert not runs
    with pytest.raises(ShapeError, match="it does not carry `feature`"):
        attend(*drawn(), slots, tables={"slopes": slopes}, target="cpp")


@pytest.mark.usefixtures("runs")
def test_gradients_of_gradients_are_those_of_pytorch() -> None:
    def curvature(target: str, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in drawn()]
        out = attend(*leaves, VARIANTS["causal"], target=target)  # type: ignore[arg-type]
        assert isinstance(out, Tensor)
        first = torch.autograd.grad(out.sin().sum(), leaves, create_graph=True)
        return list(torch.autograd.grad(sum(x.square().sum() for x in first), leaves))

    exact = curvature("reference", torch.float64)
    assert_all_within_budget(
        curvature("cpp", torch.float32), exact, lambda: curvature("torch", torch.float32), ["of q", "of k", "of v"]
    )


def test_the_operator_is_what_autograd_and_compiled_graphs_take_it_for() -> None:
    q, k, v = drawn()
    log = torch.rand(1, 4, 70, dtype=torch.float64).cumsum(-1).neg().requires_grad_()
    for logs, reverse in (([], False), ([log, log], True)):
        torch.library.opcheck(torch.ops.attn_compiler.gather.default, (q, k, v, logs, 3, reverse, gather.CPP))


@pytest.mark.parametrize(("queries", "keys"), [(0, 5), (5, 0), (0, 0)])
def test_without_tokens_there_is_nothing_to_gather(queries: int, keys: int) -> None:
    q = torch.randn(1, 4, queries, 8, requires_grad=True)
    k = torch.randn(1, 2, keys, 8, requires_grad=True)
    out, mass = torch.ops.attn_compiler.gather(q, k, k, [], 0, False, gather.CPP)
    assert out.shape == (1, 4, queries, 8)
    assert not out.any()
    assert not mass.any()
    assert all(not x.any() for x in torch.autograd.grad(out.sum() + mass.sum(), (q, k)))


@pytest.mark.usefixtures("runs")
@pytest.mark.parametrize("training", [False, True])
def test_keys_that_are_hidden_leave_nothing_behind(training: bool) -> None:
    """A row of padding may hold anything."""
    q, k, v = drawn()
    shown = torch.arange(70) >= 9
    k, v = (torch.where(shown[:, None], x, torch.nan).detach().requires_grad_(training) for x in (k, v))
    slots = {"feature": "elu_one", "mask": "causal & valid(ok)"}
    with torch.set_grad_enabled(training):
        out = attend(q, k, v, slots, tables={"ok": shown[None]}, target="cpp")
    later = [x[:, :, 9:] for x in (q, k, v)]
    alone, again = (attend(*later, VARIANTS["causal"], target=target) for target in ("reference", "torch"))  # type: ignore[arg-type]
    assert isinstance(out, Tensor)
    assert isinstance(alone, Tensor)
    assert isinstance(again, Tensor)
    assert not out[:, :, :9].any()
    assert_within_budget(out[:, :, 9:], alone, again, "after the padding")


@pytest.mark.usefixtures("runs")
def test_a_gate_that_closes_forgets_all_before_it() -> None:
    """The running sum falls by a thousand: nothing overflows, and the gradients are numbers."""
    q, k, v = drawn()
    gate = torch.zeros(1, 4, 70)
    gate[..., 40:] -= 1000
    gate.requires_grad_()
    out = attend(q, k, v, {"feature": "elu_one", "mask": "causal", "state": "gate(scalar)"}, tables={"gate": gate}, target="cpp")
    alone = attend(q[:, :, 40:], k[:, :, 40:], v[:, :, 40:], VARIANTS["causal"], target="reference")
    again = attend(q[:, :, 40:], k[:, :, 40:], v[:, :, 40:], VARIANTS["causal"], target="torch")
    assert isinstance(out, Tensor)
    assert isinstance(alone, Tensor)
    assert isinstance(again, Tensor)
    assert_within_budget(out[:, :, 40:], alone, again, "after the gate")
    assert all(x.isfinite().all() for x in torch.autograd.grad(out.sum(), (q, k, v, gate)))


def site(phase: Phase) -> Site:
    return Site(
        "attn", Kind.SELF, phase, 0, 1, 2, 4, 4, 1024, 1024, 64, 64, "float32", Variant(), Frame(), 1024, 1024
    )  # fmt: skip


@pytest.mark.parametrize(("gain", "target"), [(2.0, "cpp"), (0.9, "torch")])
def test_a_site_trains_by_the_kernel_where_that_is_faster_on_the_machine(
    gain: float, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "gain", lambda **_: gain)
    variant = variant_of(VARIANTS["causal"])
    found = decide(site(Phase.TRAIN), Asked(variant, "a rule", False, (1,)), tuple(TARGETS.values()))
    assert found.target == target
    assert "states" in found.form


def test_a_mix_gathers_its_linear_branch_by_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "gain", lambda **_: 2.0)
    found = CppTarget().carry(site(Phase.PREFILL), variant_of(VARIANTS["a window and what is beyond"]))
    assert isinstance(found, Carried)
    assert found.form == "a generated kernel that adds keys up to states, and PyTorch's operators for what is not linear"


def test_a_compiled_call_of_any_length_trains_by_the_kernel(runs: list[int]) -> None:
    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attend(q, k, v, VARIANTS["causal"], target="cpp")
        assert isinstance(out, Tensor)
        return out

    compiled = torch.compile(step, backend="aot_eager", dynamic=True, fullgraph=True)
    for tokens in (70, 41):
        leaves = drawn(tokens=tokens)
        runs.clear()
        found, wanted = (torch.autograd.grad(way(*leaves).sin().sum(), leaves) for way in (compiled, step))
        assert all(map(torch.equal, found, wanted))
        assert len(runs) == 8
