"""Compiled models train as the same models rewritten by hand do in float64: values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import attn_compiler as attn
from attn_compiler.testing import assert_within_budget
from end_to_end.models import WINDOW, additive, assert_outcome, double, like_llama, llama, near, outcome, tokens

pytestmark = pytest.mark.usefixtures("quick")


def compiled(model: nn.Module, policy: object = "exact", **options: object) -> nn.Module:
    return torch.compile(model, backend="attn", options={"policy": policy, **options})


def rewritten(policy: str = "exact") -> int:
    """How many attentions of the latest graph were rewritten."""
    report = attn.reports()[-1]
    assert report.policy
    return sum(decision.target is not None for decision in report.decisions)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("policy", ["exact", WINDOW], ids=["exact", "window"])
def test_a_llama_trains(implementation: str, policy: object) -> None:
    model, ids = llama(implementation).train(), tokens()
    actual = outcome(compiled(model, policy), like_llama(ids))
    assert len(attn.reports()[-1].decisions) == 2
    assert rewritten() == 2 or (implementation, policy) == ("sdpa", "exact")
    assert_outcome(actual, model, like_llama(ids, None if policy == "exact" else 8))


@pytest.mark.parametrize("policy", ["exact", WINDOW], ids=["exact", "window"])
def test_a_padded_bert_trains(policy: object) -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)  # fmt: skip
    model, ids = BertModel(config, add_pooling_layer=False).train(), tokens()
    valid = torch.arange(32)[None] < torch.tensor([32, 20])[:, None]

    def given(one: nn.Module) -> Tensor:
        return one(ids, attention_mask=valid.long()).last_hidden_state[valid]

    def by_hand(one: nn.Module) -> Tensor:
        seen = valid[:, None, None] & (near(32, 8) if policy != "exact" else torch.ones(32, 32, dtype=torch.bool))
        return one(ids, attention_mask=additive(seen, next(one.parameters()).dtype)).last_hidden_state[valid]

    actual = outcome(compiled(model, policy), given)
    assert len(attn.reports()[-1].decisions) == 2
    assert policy == "exact" or rewritten() == 2
    assert_outcome(actual, model, by_hand)


@pytest.mark.parametrize("policy", ["exact", WINDOW], ids=["exact", "window"])
def test_a_t5_trains(policy: object) -> None:
    from transformers import T5Config, T5Model

    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4, dropout_rate=0.0, use_cache=False)
    model, ids, answer = T5Model(config).train(), tokens(), tokens(2, 16)

    def given(one: nn.Module) -> Tensor:
        return one(input_ids=ids, decoder_input_ids=answer).last_hidden_state

    def by_hand(one: nn.Module) -> Tensor:
        if policy == "exact":
            return given(one)
        dtype = next(one.parameters()).dtype
        encoded = one.encoder(ids, attention_mask=additive(near(32, 8), dtype).expand(2, 1, -1, -1)).last_hidden_state
        own = additive(near(16, 8, causal=True), dtype).expand(2, 1, -1, -1)
        return one.decoder(answer, attention_mask=own, encoder_hidden_states=encoded).last_hidden_state

    actual = outcome(compiled(model, policy), given)
    assert len(attn.reports()[-1].decisions) == 6
    assert policy == "exact" or rewritten() >= 4
    assert_outcome(actual, model, by_hand)


@pytest.mark.parametrize("policy", ["exact", WINDOW], ids=["exact", "window"])
def test_a_swin_trains(policy: object) -> None:
    from transformers import SwinConfig, SwinModel
    from transformers.models.swin.modeling_swin import SwinAttention

    config = SwinConfig(image_size=16, patch_size=2, num_channels=3, embed_dim=16, depths=[2], num_heads=[2], window_size=4,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, drop_path_rate=0.0)  # fmt: skip
    model = SwinModel(config, add_pooling_layer=False).train()
    image = torch.randn(1, 3, 16, 16)

    def run(one: nn.Module) -> Tensor:
        return one(image.to(next(one.parameters()).dtype)).last_hidden_state

    def narrowed(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> tuple[object, object]:
        hidden, mask, *rest = args
        own = additive(near(16, 8), hidden.dtype).expand(hidden.shape[0], -1, -1)
        return (hidden, own if mask is None else mask.repeat(hidden.shape[0] // mask.shape[0], 1, 1) + own, *rest), kwargs

    def by_hand(one: nn.Module) -> Tensor:
        attentions = [x for x in one.modules() if isinstance(x, SwinAttention) and policy != "exact"]
        hooks = [x.register_forward_pre_hook(narrowed, with_kwargs=True) for x in attentions]
        out = run(one)
        for hook in hooks:
            hook.remove()
        return out

    actual = outcome(compiled(model, policy), run)
    assert len(attn.reports()[-1].decisions) == 2
    assert policy == "exact" or rewritten() == 2
    assert_outcome(actual, model, by_hand)


def test_a_rule_can_speak_of_training_alone() -> None:
    policy = {"version": 1, "rules": [{"match": {"phase": "train"}, "attn": {"mask": "window(8)"}}]}
    model, ids = llama().train(), tokens()
    trained = compiled(model, policy)
    assert_outcome(outcome(trained, like_llama(ids)), model, like_llama(ids, 8))
    assert [d.site.phase.value for d in attn.reports()[-1].decisions] == ["train"] * 2
    with torch.no_grad():
        out = trained(ids).last_hidden_state
        assert [d.site.phase.value for d in attn.reports()[-1].decisions] == ["prefill"] * 2
        assert_within_budget(out, like_llama(ids)(double(model)), like_llama(ids)(model))


class Dropping(nn.Module):
    """Written out attention with dropout: of values that are all one, the result is the mean of what is kept."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.softmax(q @ k.mT, dim=-1)
        return nn.functional.dropout(weights, self.rate, training=self.training) @ v


@pytest.mark.parametrize("score", ["score", "softcap(score, 5)"])
def test_dropout_keeps_its_rate_and_its_mean(score: str) -> None:
    rate, keys, draws = 0.3, 16, 4096
    policy = {"version": 1, "rules": [{"match": {}, "attn": {"score": score}}]}
    model = Dropping(rate).train()
    run = compiled(model, policy)
    q, k, v = torch.zeros(draws, 1, 4, 8), torch.zeros(draws, 1, keys, 8), torch.eye(keys).expand(draws, 1, -1, -1)
    kept = run(q, k, v) * keys * (1 - rate)  # with equal weights: one where a weight is kept
    assert attn.reports()[-1].decisions[0].target or score == "score"
    assert set(kept.round(decimals=3).unique().tolist()) == {0.0, 1.0}
    count = kept.numel()
    deviation = (rate * (1 - rate) / count) ** 0.5
    assert abs(kept.mean().item() - (1 - rate)) < 6 * deviation  # once in 5e8 by chance
    assert not torch.equal(kept, run(q, k, v) * keys * (1 - rate))


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_evaluation_drops_nothing(rate: float) -> None:
    policy = {"version": 1, "rules": [{"match": {}, "attn": {"score": "softcap(score, 5)"}}]}
    model = Dropping(rate).eval()
    q, k, v = torch.randn(3, 2, 2, 16, 8)
    run = compiled(model, policy)
    assert torch.equal(run(q, k, v), run(q, k, v))
    if not rate:
        assert torch.equal(run(q, k, v), compiled(model.train(), policy)(q, k, v))
    assert attn.reports()[-1].decisions[0].target
