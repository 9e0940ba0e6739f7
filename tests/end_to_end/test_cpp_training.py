"""Training steps of whole models whose attention runs as generated C++, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import attn_compiler as attn
from attn_compiler.runtime import operator
from attn_compiler.testing import assert_all_within_budget, assert_within_budget
from end_to_end.models import WINDOW, assert_outcome, double, like_llama, llama, outcome, tokens

quick = pytest.mark.usefixtures("quick")
LENGTH = 48


Run = Callable[[nn.Module], Tensor]


def t5(**changes: object) -> nn.Module:
    from transformers import T5Config, T5Model

    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4, dropout_rate=0.0, use_cache=False)
    return T5Model(config)


def like_t5(model: nn.Module) -> Tensor:
    out = model(input_ids=tokens(length=LENGTH), decoder_input_ids=tokens(length=LENGTH)).last_hidden_state
    assert isinstance(out, Tensor)
    return out


def bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)  # fmt: skip
    return BertModel(config, add_pooling_layer=False)


VALID = torch.arange(LENGTH) < torch.tensor([[LENGTH], [31]])


def like_padded_bert(model: nn.Module) -> Tensor:
    out = model(input_ids=tokens(length=LENGTH), attention_mask=VALID.long()).last_hidden_state
    assert isinstance(out, Tensor)
    return out[VALID]


def trained(model: nn.Module, run: Run, policy: object = "exact") -> list[Tensor]:
    """What a training step of a compiled model computes; generated kernels are at work."""
    actual = outcome(torch.compile(model.train(), backend="attn", options={"policy": policy}), run)
    decisions = attn.reports()[-1].decisions
    assert decisions
    assert {(d.target, d.site.phase.value) for d in decisions} == {("cpp", "train")}, str(attn.reports()[-1])
    return actual


MODELS = {
    "llama": (llama, like_llama(tokens(length=LENGTH))),
    "eager llama": (lambda: llama("eager"), like_llama(tokens(length=LENGTH))),
    "t5": (t5, like_t5),
    "padded bert": (bert, like_padded_bert),
}


@quick
@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_model_trains_on_generated_kernels(name: str) -> None:
    make, run = MODELS[name]
    model = make()
    assert_outcome(trained(model, run), model, run)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_inductor_compiles_a_training_step(name: str) -> None:
    make, run = MODELS[name]
    model = make()
    assert_outcome(trained(model, run), model, run)


@quick
def test_a_policy_trains_on_generated_kernels() -> None:
    model, ids = llama(), tokens(length=LENGTH)
    assert_outcome(trained(model, like_llama(ids), WINDOW), model, like_llama(ids, window=8))


@quick
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_checkpointed_model_trains_on_generated_kernels(implementation: str) -> None:
    model, run = llama(implementation), like_llama(tokens(length=LENGTH))
    model.train().activation_checkpointing_enable({"use_reentrant": False})
    assert_outcome(trained(model, run), model, run)


@quick
def test_a_model_in_autocast_trains_on_generated_kernels() -> None:
    model, run = llama(), like_llama(tokens(length=LENGTH))

    def cast(one: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return run(one)

    actual, exact = trained(model, cast), outcome(double(model), run)
    assert attn.reports()[-1].decisions[0].site.dtype == "bfloat16"
    assert_all_within_budget(actual, exact, lambda: outcome(model, cast))


@quick
def test_one_graph_trains_and_infers() -> None:
    model, run = llama(), like_llama(tokens(length=LENGTH))
    compiled = torch.compile(model.train(), backend="attn")
    with torch.no_grad():
        assert_within_budget(run(compiled), run(double(model)), run(model))
    assert_outcome(outcome(compiled, run), model, run)


@quick
def test_a_training_step_attends_once_forward_and_once_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    forward, backward = operator._RUN["cpp"], operator._DIFFERENTIATE["cpp"]
    monkeypatch.setitem(operator._RUN, "cpp", lambda *given, **named: calls.append("forward") or forward(*given, **named))
    monkeypatch.setitem(operator._DIFFERENTIATE, "cpp", lambda *given: calls.append("backward") or backward(*given))
    trained(llama(), like_llama(tokens(length=LENGTH)))
    assert calls == ["forward"] * 2 + ["backward"] * 2
