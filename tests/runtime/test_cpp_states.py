"""The C++ kernel of linear attention: right at every length, offset and width, in every precision, and taken where it is for."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from attn_compiler import attend, kernel_source
from attn_compiler.algebra.variant import Variant
from attn_compiler.errors import ShapeError
from attn_compiler.planning.planner import Carried
from attn_compiler.planning.site import Frame, Kind, Phase, Site
from attn_compiler.runtime import states
from attn_compiler.runtime.cpp import CppTarget
from attn_compiler.testing import assert_all_within_budget, drawn_case, on, plain, variant_of

TABLES = {
    "slopes": torch.tensor([0.1, 0.4, 0.2, 0.9], dtype=torch.float64),
    "gate": torch.rand(2, 4, 300, generator=torch.Generator().manual_seed(4), dtype=torch.float64).sigmoid().log().cumsum(-1),
    "padding": torch.arange(300) >= torch.tensor([[0], [37]]),
}
VARIANTS: Mapping[str, Mapping[str, object]] = {
    "causal": {"feature": "elu_one", "mask": "causal"},
    "everything": {"feature": "elu_one"},
    "outside of a window": {"feature": "elu_one", "mask": "causal & ~window(20)"},
    "a little of the future": {"feature": "elu_one", "mask": "causal(5)"},
    "decay": {"feature": "silu", "mask": "causal", "state": "decay(slopes)", "scale": 0.5, "normalizer": "linear(none)"},
    "decay outside of a window": {
        "feature": "silu", "mask": "causal & ~window(20)", "state": "decay(slopes)", "scale": 0.5, "normalizer": "linear(none)",
    },
    "gate": {"feature": "elu_one", "mask": "causal", "state": "gate(scalar)"},
    "gate outside of a window, padded": {
        "feature": "elu_one", "mask": "causal & ~window(20) & valid(padding)", "state": "gate(scalar)",
    },
    "features made before": {"feature": "taylor", "mask": "causal"},
}  # fmt: skip
LENGTHS = [(130, 130, 2), (1, 97, 4), (67, 97, 2), (97, 67, 4), (33, 1, 4)]


def check(name: str, q_len: int, k_len: int, kv_heads: int, dtype: torch.dtype) -> None:
    case = drawn_case(VARIANTS[name], TABLES, q_len, k_len, kv_heads=kv_heads, dim=6, value_dim=40).to(dtype)
    with torch.no_grad():
        exact = on("reference")(case.to(torch.float64))
        assert_all_within_budget([on("cpp")(case)], [exact], lambda: [plain(case)], [name])


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(("q_len", "k_len", "kv_heads"), LENGTHS)
def test_the_state_says_what_all_scores_would(name: str, q_len: int, k_len: int, kv_heads: int) -> None:
    check(name, q_len, k_len, kv_heads, torch.float32)


def test_queries_long_before_the_first_key_see_nothing_of_another_head() -> None:
    q, k, v = torch.randn(1, 2, 2100, 6), torch.randn(1, 2, 100, 6), torch.randn(1, 2, 100, 40)
    v[:, 0] = torch.nan
    run = [attend(q, k, v, {"feature": "elu_one", "mask": "causal"}, target=name)[:, 1] for name in ("cpp", "reference", "torch")]
    found, exact, other = (x for x in run if isinstance(x, torch.Tensor))
    assert_all_within_budget([found], [exact], lambda: [other], ["the second head"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_states_are_floats_whatever_operands_are_stored_as(dtype: torch.dtype) -> None:
    check("causal", 130, 130, 2, dtype)


def site(tokens: int) -> Site:
    return Site(
        "attn", Kind.SELF, Phase.PREFILL, 0, 1, 2, 4, 4, tokens, tokens, 64, 64, "float32", Variant(), Frame(), tokens, tokens
    )  # fmt: skip


def test_a_site_gets_the_kernel_where_its_length_pays() -> None:
    variant = variant_of(VARIANTS["causal"], dim=6)
    found = CppTarget().carry(site(1024), variant)
    assert isinstance(found, Carried)
    assert found.form == "a generated kernel, whose state stays in the cache"
    assert not isinstance(CppTarget().carry(site(64), variant), Carried)


def test_more_features_than_a_cache_holds_are_left_to_another_target() -> None:
    q = torch.randn(1, 2, 300, 32)
    with pytest.raises(ShapeError, match="it does not carry `feature`"):
        attend(q, q, q, VARIANTS["features made before"], target="cpp")


def test_the_source_of_the_kernel_is_written_to_be_read() -> None:
    source = kernel_source(VARIANTS["decay"], q_len=512, k_len=512, heads=4, head_dim=64)
    assert "INLINE vf feature_of_query(const Task& task, vf x) {\n  return x * logistic(x);\n}" in source
    assert "work.of_key[j] = log_at(call, task, call.at_key, first + j);" in source


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(("q_len", "k_len"), [(130, 130), (97, 67), (260, 300), (5, 97)])
def test_queries_in_segments_meet_the_state_of_all_before_them(
    name: str, q_len: int, k_len: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where heads are fewer than threads; more segments than tiles are empty ones."""
    monkeypatch.setattr(states, "segments", lambda heads, queries: 3)
    monkeypatch.setattr(states, "WORTH_THREADS", 0)
    check(name, q_len, k_len, 2, torch.float32)


def test_there_are_segments_where_heads_are_fewer_than_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert [states.segments(heads, 4096) for heads in (1, 2, 3, 4, 5, 64)] == [8, 4, 2, 2, 1, 1]
    assert [states.segments(1, queries) for queries in (100, 512, 1024)] == [1, 1, 2]
