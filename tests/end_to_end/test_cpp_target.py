"""Whole models whose attention runs as generated C++."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import attn_compiler as attn
from attn_compiler.runtime import compiler
from attn_compiler.testing import assert_within_budget
from end_to_end.models import WINDOW, double, like_llama, llama, near, tokens

quick = pytest.mark.usefixtures("quick")


def bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4))


def t5() -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4))


def mistral() -> nn.Module:
    from transformers import MistralConfig, MistralModel

    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return MistralModel(MistralConfig(**shape, num_key_value_heads=2, sliding_window=9, use_cache=False))


def padded(model: nn.Module) -> Tensor:
    ids = tokens(length=48)
    out = model(input_ids=ids, attention_mask=(torch.arange(48) < torch.tensor([[48], [31]])).long()).last_hidden_state
    assert isinstance(out, Tensor)
    return out


def check(model: nn.Module, run: Callable[[nn.Module], Tensor], **options: object) -> None:
    """Check a compiled model against itself in float64, and that generated kernels were at work."""
    model = model.eval()
    with torch.no_grad():
        actual = run(torch.compile(model, backend="attn", options=options))  # type: ignore[arg-type]
        assert_within_budget(actual, run(double(model)), run(model))
    decisions = attn.reports()[-1].decisions
    assert decisions
    assert {decision.target for decision in decisions} == {"cpp"}, str(attn.reports()[-1])


@pytest.mark.parametrize("make", [llama, mistral, bert, t5])
def test_a_model_runs_on_generated_kernels(make: Callable[[], nn.Module]) -> None:
    check(make(), padded)


@quick
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_less_precision_runs_on_generated_kernels(dtype: torch.dtype) -> None:
    check(llama().to(dtype), like_llama(tokens(length=48)))


@quick
def test_under_autocast_kernels_take_what_the_model_would() -> None:
    def run(model: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=next(model.parameters()).dtype == torch.float32):
            return like_llama(tokens(length=48))(model)

    check(llama(), run)
    assert attn.reports()[-1].decisions[0].site.dtype == "bfloat16"


@quick
def test_a_policy_runs_on_generated_kernels() -> None:
    model, ids = llama().eval(), tokens(length=48)
    with torch.no_grad():
        actual = like_llama(ids)(torch.compile(model, backend="attn", options={"policy": WINDOW}))  # type: ignore[arg-type]
        by_hand = like_llama(ids, window=8)
        assert_within_budget(actual, by_hand(double(model)), by_hand(model))
    assert {decision.target for decision in attn.reports()[-1].decisions} == {"cpp"}


def test_one_compilation_serves_every_length() -> None:
    draw = random.Random(0)
    model = mistral().eval()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, backend="attn", dynamic=True)
    with torch.no_grad():
        for _ in range(20):
            run = like_llama(tokens(length=draw.randrange(32, 120)))
            assert_within_budget(run(compiled), run(double(model)), run(model))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
    assert {decision.target for decision in attn.reports()[-1].decisions} == {"cpp"}


def test_what_is_seen_of_a_table_may_change_from_call_to_call() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
        return torch.softmax((q @ k.mT * 8**-0.5).masked_fill(hidden, float("-inf")), dim=-1) @ v

    compiled = torch.compile(attend, backend="attn")
    q, k, v = torch.randn(3, 2, 4, 40, 8)
    for window in (3, 17, 40):
        hidden = ~near(40, window)
        exact = attend(q.double(), k.double(), v.double(), hidden)
        assert_within_budget(compiled(q, k, v, hidden), exact, attend(q, k, v, hidden))
    assert attn.reports()[-1].decisions[0].target == "cpp"


@quick
def test_without_a_compiler_torch_serves_and_the_report_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    compiler.compiler.cache_clear()
    try:
        model, run = llama().eval(), like_llama(tokens(length=48))
        with torch.no_grad():
            actual = run(torch.compile(model, backend="attn"))  # type: ignore[arg-type]
            assert_within_budget(actual, run(double(model)), run(model))
        assert "there is no C++ compiler" in str(attn.reports()[-1].decisions[0].refusals)
    finally:
        compiler.compiler.cache_clear()
