"""Caches that follow the plan: the tokens are those of recomputing the whole prefix, and no more is held than they need."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn

import attn_compiler as attn
from attn_compiler.errors import ShapeError
from end_to_end.by_hand import ByHand, Seen, policy, with_weights

pytestmark = pytest.mark.usefixtures("quick")
OWN, NEW, PADDING = 9, 12, 3  # the model's own window, new tokens, padding on the left of the first row
WINDOW, STREAMING = "causal & window(6)", "causal & (window(6) | sinks(2))"
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None,
    "num_hidden_layers": 2,
}  # fmt: skip


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return with_weights(LlamaForCausalLM(LlamaConfig(**SIZES, attn_implementation="sdpa")))


def mistral() -> nn.Module:
    from transformers import MistralConfig, MistralForCausalLM

    return with_weights(MistralForCausalLM(MistralConfig(**SIZES, sliding_window=OWN, attn_implementation="sdpa")))


def gemma3() -> nn.Module:
    """A local layer and a global one."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    kinds = ["sliding_attention", "full_attention"]
    config = Gemma3TextConfig(
        **SIZES, sliding_window=OWN, layer_types=kinds, query_pre_attn_scalar=8, attn_implementation="sdpa"
    )  # fmt: skip
    return with_weights(Gemma3ForCausalLM(config))


def prompt(padding: int) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(3, 64, (2, 11), generator=torch.Generator().manual_seed(5))
    valid = torch.ones_like(tokens)
    valid[0, :padding] = 0
    return tokens, valid


def recomputed(model: nn.Module, seen: Callable[[Tensor], Seen], padding: int) -> Tensor:
    """Greedy tokens where each step computes the whole prefix, within the model's own masks and those that the policy means."""
    tokens, valid = prompt(padding)
    for _ in range(NEW):
        places = (valid.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad(), ByHand(seen(valid)):
            logits = model(input_ids=tokens, attention_mask=valid, position_ids=places, use_cache=False).logits
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
        valid = torch.cat([valid, torch.ones_like(valid[:, :1])], dim=1)
    return tokens


def near(window: int | None, sinks: int = 0, *, layers: Mapping[int, bool] | None = None) -> Callable[[Tensor], Seen]:
    """What a window with sinks shows, in all layers or in some."""

    def seen(valid: Tensor) -> Seen:
        place = torch.arange(valid.shape[1])
        distance, first = place[:, None] - place, valid.argmax(-1)[:, None, None]
        shown = (distance >= 0) & ((distance < (window or 1 << 20)) | (place - first < sinks))
        return lambda number, q, k: shown[:, None] if (layers or {}).get(number, True) else None

    return seen


def generated(model: nn.Module, asked: object, padding: int, **more: object) -> tuple[Tensor, object]:
    """The tokens of a compiled model with a cache for the policy, and the cache."""
    held = attn.cache(model, asked)  # type: ignore[arg-type]
    model.forward = torch.compile(model.forward, backend="attn", options={"policy": asked})  # type: ignore[method-assign]
    tokens, valid = prompt(padding)
    settings = {"max_new_tokens": NEW, "do_sample": False, "disable_compile": True, **more}
    return model.generate(tokens, attention_mask=valid, past_key_values=held, **settings), held


def lengths(held: object) -> list[int]:
    return [layer.keys.shape[-2] for layer in held.layers]  # type: ignore[attr-defined]


CASES = [
    (llama, WINDOW, 0, 0, [5, 5]),
    (llama, STREAMING, 2, PADDING, [7, 7]),
    (gemma3, STREAMING, 2, PADDING, [8, 7]),
]
MORE = [
    (llama, WINDOW, 0, PADDING, [5, 5]),
    (llama, STREAMING, 2, 0, [7, 7]),
    (llama, STREAMING, 2, 10, [7, 7]),
    (mistral, WINDOW, 0, 0, [5, 5]),
    (mistral, WINDOW, 0, PADDING, [5, 5]),
    (mistral, STREAMING, 2, 0, [8, 8]),  # its own window hides the first tokens in the end
    (mistral, STREAMING, 2, PADDING, [8, 8]),
    (gemma3, WINDOW, 0, PADDING, [5, 5]),
    (gemma3, STREAMING, 2, 0, [8, 7]),
]


@pytest.mark.parametrize(
    ("build", "mask", "sinks", "padding", "held"), [*CASES, *(pytest.param(*case, marks=pytest.mark.full) for case in MORE)]
)
def test_tokens_are_those_of_recomputing_the_prefix(
    build: Callable[[], nn.Module], mask: str, sinks: int, padding: int, held: list[int]
) -> None:
    model = build()
    expected = recomputed(model, near(6, sinks), padding)
    plain = recomputed(model, near(None), padding)
    found, cache = generated(model, policy(mask), padding)
    assert torch.equal(found, expected)
    assert not torch.equal(plain, expected)
    assert lengths(cache) == held


@pytest.mark.full
def test_attention_that_is_written_out_uses_it_too() -> None:
    model = llama()
    expected = recomputed(model, near(6, 2), PADDING)
    model.set_attn_implementation("eager")  # type: ignore[operator]
    found, cache = generated(model, policy(STREAMING), PADDING)
    assert torch.equal(found, expected)
    assert lengths(cache) == [7, 7]


@pytest.mark.parametrize(("build", "held"), [(llama, [22, 22]), (mistral, [8, 8]), (gemma3, [8, 22])])
def test_without_a_policy_the_model_s_own_windows_are_held(build: Callable[[], nn.Module], held: list[int]) -> None:
    model = build()
    tokens, valid = prompt(PADDING)
    settings = {"max_new_tokens": NEW, "do_sample": False, "disable_compile": True}
    expected = model.generate(tokens, attention_mask=valid, **settings)
    cache = attn.cache(model)
    assert torch.equal(model.generate(tokens, attention_mask=valid, past_key_values=cache, **settings), expected)
    assert lengths(cache) == held


def test_each_layer_holds_what_it_needs_itself() -> None:
    model = llama()
    rules = [{"match": {"layers": "0"}, "attn": "exact"}, {"match": {"kind": "self"}, "attn": {"mask": STREAMING}}]
    expected = recomputed(model, near(6, 2, layers={0: False}), PADDING)
    found, cache = generated(model, {"version": 1, "rules": rules}, PADDING)
    assert torch.equal(found, expected)
    assert lengths(cache) == [22, 7]


def test_a_rule_whose_tolerance_nobody_measured_lets_no_key_go() -> None:
    model = llama()
    expected = recomputed(model, near(None), PADDING)
    rule = {"match": {"kind": "self"}, "attn": {"mask": WINDOW}, "tolerance": {"site": 0.5}}
    found, cache = generated(model, {"version": 1, "rules": [rule]}, PADDING)
    assert torch.equal(found, expected)
    assert lengths(cache) == [22, 22]


def test_beams_take_their_keys_along() -> None:
    model = llama()
    asked = policy(STREAMING)
    model.forward = torch.compile(model.forward, backend="attn", options={"policy": asked})  # type: ignore[method-assign]
    tokens, valid = prompt(PADDING)
    settings = {"max_new_tokens": NEW, "do_sample": False, "num_beams": 3, "disable_compile": True}
    expected = model.generate(tokens, attention_mask=valid, **settings)
    found = model.generate(tokens, attention_mask=valid, past_key_values=attn.cache(model, asked), **settings)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("other", [None, "causal & window(9)"])
def test_a_model_that_attends_to_what_is_gone_is_told_so(other: str | None) -> None:
    """One that nobody compiled, and one that was compiled with another policy."""
    model = llama()
    held, (tokens, valid) = attn.cache(model, policy(WINDOW)), prompt(0)
    run = torch.compile(model, backend="attn", options={"policy": policy(other)}) if other else model
    with torch.no_grad():
        run(input_ids=tokens, attention_mask=valid, past_key_values=held)
        with pytest.raises(ShapeError, match="holds the latest 5 tokens, and the model attends to more"):
            run(input_ids=tokens[:, :1], past_key_values=held)
    reasons = {refusal.reason for d in attn.reports()[-1].decisions for refusal in d.refusals} if other else set()
    assert not other or "this model's cache holds the latest 5 tokens, and this needs the latest 8 tokens" in str(reasons)


def test_a_model_that_attends_to_less_reads_what_is_held() -> None:
    model = llama()
    held, (tokens, _) = attn.cache(model, policy(STREAMING)), prompt(0)
    run = torch.compile(model, backend="attn", options={"policy": policy("causal & window(3)")})
    with torch.no_grad():
        for piece in (tokens, tokens[:, :1]):
            found = run(input_ids=piece, past_key_values=held).logits
        whole = torch.cat([tokens, tokens[:, :1]], dim=1)
        assert torch.allclose(found, run(input_ids=whole, use_cache=False).logits[:, -1:], atol=1e-4)


def test_what_is_gone_cannot_be_taken_back() -> None:
    model = llama()
    cache = attn.cache(model, policy(WINDOW))
    tokens, valid = prompt(0)
    with torch.no_grad():
        model(input_ids=tokens, attention_mask=valid, past_key_values=cache)
    with pytest.raises(ShapeError, match="let go of 6 tokens"):
        cache.crop(-1)


def test_only_models_that_generate_have_a_cache() -> None:
    with pytest.raises(ShapeError, match="models of transformers that generate; found Linear"):
        attn.cache(nn.Linear(2, 2))


def test_a_prompt_in_pieces_may_begin_with_padding_alone_where_no_first_tokens_are_held() -> None:
    model = llama()
    expected = recomputed(model, near(6), 7)
    found, _ = generated(model, policy(WINDOW), 7, prefill_chunk_size=4)
    assert torch.equal(found, expected)


def test_first_tokens_of_a_row_that_has_not_begun_are_refused() -> None:
    with pytest.raises(ShapeError, match="a row of the prompt is padding alone, and a cache has to know where rows begin"):
        generated(llama(), policy(STREAMING), 7, prefill_chunk_size=4)
