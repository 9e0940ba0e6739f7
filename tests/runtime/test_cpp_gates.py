"""The C++ kernel where each feature fades by a gate of its own: right however gates close, at every length, and as it trains."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from attn_compiler import attend, kernel_source
from attn_compiler.algebra.variant import Variant
from attn_compiler.planning.planner import Carried
from attn_compiler.planning.site import Frame, Kind, Phase, Site
from attn_compiler.runtime import gather, linear, states
from attn_compiler.runtime.cpp import CppTarget
from attn_compiler.targets import faded, gathered
from attn_compiler.testing import Case, assert_all_within_budget, assert_case, drawn_case, on, plain, variant_of

TOKENS, HEADS, DIM = 300, 4, 6
GENERATOR = torch.Generator().manual_seed(4)


def running(closed: float, share: float) -> Tensor:
    """Running logs of gates, some of which all but close for a token."""
    drawn = torch.rand(2, HEADS, TOKENS, DIM, generator=GENERATOR, dtype=torch.float64)
    return torch.where(drawn < share, -closed, drawn.sigmoid().log()).cumsum(2)


TABLES = {
    "gate": running(3.0, 0.03),
    "shut": running(300.0, 0.03),
    "often": running(40.0, 0.5),
    "open": torch.zeros(2, HEADS, TOKENS, DIM, dtype=torch.float64),
    "padding": torch.arange(TOKENS) >= torch.tensor([[0], [37]]),
}
VARIANTS: Mapping[str, Mapping[str, object]] = {
    "gla": {"state": "gate(vector)", "mask": "causal", "normalizer": "linear(none)", "scale": "1 / sqrt(dim)"},
    "mapped": {"feature": "elu_one", "state": "gate(vector)", "mask": "causal"},
    "padded": {"feature": "elu_one", "state": "gate(vector)", "mask": "causal & valid(padding)"},
    "outside of a window": {"feature": "elu_one", "state": "gate(vector)", "mask": "causal & ~window(12)"},
    "shut": {"feature": "elu_one", "state": "gate(vector, running=shut)", "mask": "causal", "normalizer": "linear(none)"},
    "often shut": {"feature": "silu", "state": "gate(vector, running=often)", "mask": "causal", "normalizer": "linear(none)"},
    "open": {"feature": "elu_one", "state": "gate(vector, running=open)", "mask": "causal"},
    "means": {"feature": "elu_one", "state": "gate(vector)", "mask": "causal & valid(padding)", "normalizer": "linear(mean)"},
}
ALONE = [name for name in VARIANTS if name != "means"]  # what the kernel is for by itself
LENGTHS = [(130, 130, 2), (64, 64, 4), (1, 97, 4), (67, 97, 2), (97, 67, 1), (33, 1, 4), (1, 1, 2)]


def case_of(name: str, q_len: int, k_len: int, kv_heads: int) -> Case:
    return drawn_case(VARIANTS[name], TABLES, q_len, k_len, kv_heads=kv_heads, dim=DIM, value_dim=40)


def check(case: Case) -> None:
    with torch.no_grad():
        exact = on("reference")(case.to(torch.float64))
        assert_all_within_budget([on("cpp")(case)], [exact], lambda: [plain(case)])


@pytest.mark.parametrize("name", ALONE)
@pytest.mark.parametrize(("q_len", "k_len", "kv_heads"), LENGTHS)
def test_the_state_says_what_all_scores_would(name: str, q_len: int, k_len: int, kv_heads: int) -> None:
    check(case_of(name, q_len, k_len, kv_heads).to(torch.float32))


@pytest.mark.parametrize("name", ["gla", "padded"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_states_are_floats_whatever_operands_are_stored_as(name: str, dtype: torch.dtype) -> None:
    case = case_of(name, 130, 130, 2)
    check(Case(case.variant, *(x.to(dtype) for x in (case.q, case.k, case.v)), case.tables))


@pytest.mark.parametrize("name", ALONE)
@pytest.mark.parametrize(("q_len", "k_len"), [(130, 130), (97, 67), (260, 300), (5, 97)])
def test_queries_in_segments_meet_the_state_of_all_before_them(
    name: str, q_len: int, k_len: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(states, "segments", lambda heads, queries: 3)
    monkeypatch.setattr(states, "WORTH_THREADS", 0)
    check(case_of(name, q_len, k_len, 2).to(torch.float32))


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """States are always taken where they may be, and the kernel's runs are counted."""
    for module in (gathered, linear):
        monkeypatch.setattr(module, "pays", lambda *_: True)
    monkeypatch.setattr(faded, "_gathered", None)
    counted: list[int] = []
    run = gather.run
    monkeypatch.setattr(gather, "run", lambda call: counted.append(1) or run(call))
    return counted


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(("q_len", "k_len", "kv_heads"), LENGTHS)
def test_gradients_of_tokens_and_gates_are_what_all_scores_would_give(
    name: str, q_len: int, k_len: int, kv_heads: int, runs: list[int]
) -> None:
    assert_case(case_of(name, q_len, k_len, kv_heads), torch.float32, "cpp")
    assert len(runs) == 4  # forward, and one for each gradient


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_in_16_bits(dtype: torch.dtype, runs: list[int]) -> None:
    assert_case(case_of("mapped", 130, 130, 2), dtype, "cpp")
    assert runs


@pytest.mark.usefixtures("runs")
@pytest.mark.parametrize("name", ["gla", "often shut"])
def test_gradients_of_queries_in_segments(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(states, "segments", lambda heads, queries: 3)
    monkeypatch.setattr(states, "WORTH_THREADS", 0)
    assert_case(case_of(name, 130, 150, 2), torch.float32, "cpp")


def test_rounding_does_not_add_up_where_gates_are_all_but_open() -> None:
    """A state that were faded by as little at a time would lose a bit each time, always in the same direction."""
    tokens = 16384
    q, k, v = (x.abs() for x in torch.randn(3, 1, 1, tokens, 16, generator=torch.Generator().manual_seed(0)))

    def error(step: float) -> float:
        log = -step * torch.arange(tokens, dtype=torch.float64)[:, None].expand(1, 1, tokens, 16)
        found = attend(q, k, v, VARIANTS["gla"], tables={"gate": log}, target="cpp")
        same = {**VARIANTS["gla"], "state": "gate(scalar)"}
        exact = attend(q.double(), k.double(), v.double(), same, tables={"gate": log[..., 0]}, target="torch")
        assert isinstance(found, Tensor)
        assert isinstance(exact, Tensor)
        return ((found - exact).abs().max() / exact.abs().max()).item()

    assert error(1e-7) < 2 * error(0.0)


@pytest.mark.parametrize("how", ["scalar", "vector"])
def test_a_log_that_is_no_number_shows_where_it_is_read(how: str) -> None:
    case = case_of("mapped", 40, 40, 2).to(torch.float32)
    slots, gate = {**VARIANTS["mapped"], "state": f"gate({how})"}, TABLES["gate"][:, :, :40].clone()
    gate[0, 1, 20, 3] = torch.nan
    gate = gate if how == "vector" else gate[..., 3]
    given = (*(x.detach() for x in (case.q, case.k, case.v)), slots)
    found, exact = (attend(*given, tables={"gate": gate}, target=target) for target in ("cpp", "reference"))  # type: ignore[arg-type]
    assert isinstance(found, Tensor)
    assert isinstance(exact, Tensor)
    assert exact[0, 1, 20:].isnan().all()
    assert torch.equal(found.isnan(), exact.isnan())


def site(phase: Phase, tokens: int = 1024) -> Site:
    return Site(
        "attn", Kind.SELF, phase, 0, 1, 2, 4, 4, tokens, tokens, 64, 64, "float32", Variant(), Frame(), tokens, tokens
    )  # fmt: skip


@pytest.mark.parametrize(
    ("phase", "form"),
    [
        (Phase.PREFILL, "a generated kernel, whose state stays in the cache"),
        (Phase.TRAIN, "a generated kernel that adds keys up to states"),
    ],
)
def test_a_site_gets_the_kernel_where_its_length_pays(phase: Phase, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "gain", lambda **_: 2.0)
    variant = variant_of(VARIANTS["gla"], dim=64)
    found = CppTarget().carry(site(phase), variant)
    assert isinstance(found, Carried)
    assert found.form == form
    assert not isinstance(CppTarget().carry(site(phase, 16), variant), Carried)


def test_the_kernel_gathers_faster_than_pytorch_trained_or_not() -> None:
    assert all(linear.gain(training=training, fading=linear.Fading.ROWS) > linear.WORTH for training in (False, True))


def test_the_source_says_what_fades_apart() -> None:
    source = kernel_source(VARIANTS["mapped"], q_len=512, k_len=512, heads=4, head_dim=64)
    assert "constexpr bool COLUMNS = false;" in source
    assert "work.keys[m][n]" in source
