"""Models with sliding windows of their own generate, under a policy, what recomputing the whole prefix gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

import attn_compiler as attn
from attn_compiler import Report
from attn_compiler.planning.plan import Decision
from end_to_end.by_hand import ByHand, Seen, compiled_since, policy, with_weights

pytestmark = pytest.mark.usefixtures("quick")
OWN, NEW, PADDING = 12, 8, 3  # the model's own window, new tokens, padding on the left of the first row
WINDOW, STREAMING = "causal & window(6)", "causal & (window(6) | sinks(2))"
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "max_position_embeddings": 64, "sliding_window": OWN, "pad_token_id": 0, "bos_token_id": None,
    "eos_token_id": None,
}  # fmt: skip


def mistral() -> nn.Module:
    from transformers import MistralConfig, MistralForCausalLM

    return with_weights(MistralForCausalLM(MistralConfig(**SIZES, num_hidden_layers=2, attn_implementation="sdpa")))


def gemma3() -> nn.Module:
    """A local layer and a global one."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    kinds = ["sliding_attention", "full_attention"]
    config = Gemma3TextConfig(
        **SIZES, num_hidden_layers=2, layer_types=kinds, query_pre_attn_scalar=8, attn_implementation="sdpa"
    )  # fmt: skip
    return with_weights(Gemma3ForCausalLM(config))


MODELS = pytest.mark.parametrize("build", [mistral, gemma3])


def prompt() -> tuple[Tensor, Tensor]:
    """Two rows of tokens, the first padded on the left, and which of them are tokens."""
    tokens = torch.randint(3, 64, (2, 11), generator=torch.Generator().manual_seed(5))
    valid = torch.ones_like(tokens)
    valid[0, :PADDING] = 0
    return tokens, valid


def generated(model: nn.Module, cache: str) -> Tensor:
    tokens, valid = prompt()
    settings = {"cache_implementation": "static"} if cache == "static" else {}
    out = model.generate(tokens, attention_mask=valid, max_new_tokens=NEW, do_sample=False, disable_compile=True, **settings)
    assert isinstance(out, Tensor)
    return out


def recomputed(model: nn.Module, sinks: int) -> Tensor:
    """Greedy tokens where each step computes the whole prefix, within the model's own masks and the one that the policy means."""
    tokens, valid = prompt()
    for _ in range(NEW):
        with torch.no_grad(), ByHand(_streaming(valid, sinks)):
            logits = model(input_ids=tokens, attention_mask=valid, position_ids=_places(valid), use_cache=False).logits
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
        valid = torch.cat([valid, torch.ones_like(valid[:, :1])], dim=1)
    return tokens


def _places(valid: Tensor) -> Tensor:
    return (valid.cumsum(-1) - 1).clamp(min=0)


def _streaming(valid: Tensor, sinks: int) -> Seen:
    place = torch.arange(valid.shape[1])
    distance, first = place[:, None] - place, valid.argmax(-1)[:, None, None]
    near = (distance >= 0) & (distance < 6)
    kept = (distance >= 0) & (place - first < sinks)
    return lambda number, q, k: (near | kept)[:, None]


def compiled(model: nn.Module, mask: str) -> None:
    model.forward = torch.compile(model.forward, backend="attn", options={"policy": policy(mask)})  # type: ignore[method-assign]


def decided_since(before: Sequence[Report]) -> list[Decision]:
    return [decision for report in compiled_since(before) for decision in report.decisions]


@MODELS
def test_a_window_inside_of_the_model_s_own_generates_what_it_means(build: Callable[[], nn.Module]) -> None:
    model = build()
    expected, plain, before = recomputed(model, sinks=0), generated(model, "dynamic"), attn.reports()
    compiled(model, WINDOW)
    assert torch.equal(generated(model, "dynamic"), expected)
    assert not torch.equal(plain, expected)
    assert {decision.outcome for decision in decided_since(before)} == {"approximate"}


@MODELS
def test_once_a_static_cache_slides_a_window_is_refused_and_never_just_left_out(build: Callable[[], nn.Module]) -> None:
    model, before = build(), attn.reports()
    compiled(model, WINDOW)
    generated(model, "static")
    found = decided_since(before)
    assert {decision.outcome for decision in found} == {"approximate", "refused"}
    reasons = {refusal.reason for decision in found if decision.outcome == "refused" for refusal in decision.refusals}
    assert reasons == {"its mask speaks of distances, and nobody knows where this site's queries stand among its keys"}


@MODELS
def test_sinks_are_refused_once_the_cache_has_let_go_of_the_oldest_keys(build: Callable[[], nn.Module]) -> None:
    model, before = build(), attn.reports()
    compiled(model, STREAMING)
    generated(model, "dynamic")
    local = [decision for decision in decided_since(before) if decision.site.layer == 0]
    sliding = [decision for decision in local if decision.site.q_len != decision.site.k_len]
    assert sliding
    for decision in sliding:
        assert decision.outcome == "refused"
        assert "its oldest keys are gone" in decision.refusals[0].reason
