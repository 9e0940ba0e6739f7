"""Caches that hold codes: tokens are those of recomputing the prefix with rounded keys and values, in half the memory or less."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import attn_compiler as attn
from attn_compiler.backend import attn_eagerly
from attn_compiler.errors import ShapeError
from end_to_end.by_hand import with_weights

pytestmark = pytest.mark.usefixtures("quick")
NEW, PADDING, WIDTH = 6, 3, 8
WINDOW, STREAMING = "causal & window(6)", "causal & (window(6) | sinks(2))"
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": WIDTH, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None,
    "num_hidden_layers": 2,
}  # fmt: skip


def llama(implementation: str = "sdpa") -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return with_weights(LlamaForCausalLM(LlamaConfig(**SIZES, attn_implementation=implementation)))


def mistral() -> nn.Module:
    from transformers import MistralConfig, MistralForCausalLM

    return with_weights(MistralForCausalLM(MistralConfig(**SIZES, sliding_window=9, attn_implementation="sdpa")))


def gemma3() -> nn.Module:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    kinds = ["sliding_attention", "full_attention"]
    config = Gemma3TextConfig(**SIZES, sliding_window=9, layer_types=kinds, query_pre_attn_scalar=8, attn_implementation="sdpa")
    return with_weights(Gemma3ForCausalLM(config))


def policy(storage: object, mask: str | None = None, layers: str = "0:") -> dict[str, object]:
    slots = {"storage": {"kv_cache": storage}, **({"mask": mask} if mask else {})}
    return {"version": 1, "rules": [{"match": {"kind": "self", "layers": layers}, "attn": slots}]}


def prompt(padding: int) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(3, 64, (2, 11), generator=torch.Generator().manual_seed(5))
    valid = torch.ones_like(tokens)
    valid[0, :padding] = 0
    return tokens, valid


def recomputed(model: nn.Module, asked: object, padding: int) -> Tensor:
    """Greedy tokens where each step computes the whole prefix, of keys and values that are rounded, and no cache."""
    forward = torch.compile(model.forward, backend=partial(attn_eagerly, options={"policy": asked}), dynamic=True)
    tokens, valid = prompt(padding)
    for _ in range(NEW):
        places = (valid.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            logits = forward(input_ids=tokens, attention_mask=valid, position_ids=places, use_cache=False).logits
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
        valid = torch.cat([valid, torch.ones_like(valid[:, :1])], dim=1)
    return tokens


def generated(model: nn.Module, asked: object, padding: int, backend: object = None, **more: object) -> tuple[Tensor, object]:
    held = attn.cache(model, asked)  # type: ignore[arg-type]
    backend = backend or partial(attn_eagerly, options={"policy": asked})
    model.forward = torch.compile(model.forward, backend=backend)  # type: ignore[method-assign, call-overload]
    tokens, valid = prompt(padding)
    settings = {"max_new_tokens": NEW, "do_sample": False, "disable_compile": True, **more}
    return model.generate(tokens, attention_mask=valid, past_key_values=held, **settings), held


CASES = [
    (llama, "int4", None, 0, 16),
    (llama, {"type": "int8", "largest": [60, 30]}, None, PADDING, 16),
    (gemma3, "int8", STREAMING, PADDING, 8),
]
MORE = [
    (llama, "int8", STREAMING, PADDING, 7),
    (gemma3, "int4", WINDOW, PADDING, 5),
    (llama, "fp8_e4m3", None, PADDING, 16),
    (llama, "fp8_e5m2", WINDOW, 0, 5),
    (llama, "bf16", None, 0, 16),
    (partial(llama, "eager"), "int4", STREAMING, PADDING, 7),
    (mistral, "int8", None, PADDING, 8),
    (mistral, "int4", WINDOW, 0, 5),
    (gemma3, "fp8_e4m3", STREAMING, 0, 8),
]


@pytest.mark.parametrize(
    ("build", "storage", "mask", "padding", "held"), [*CASES, *(pytest.param(*x, marks=pytest.mark.full) for x in MORE)]
)
def test_tokens_are_those_of_recomputing_with_rounded_keys_and_values(
    build: Callable[[], nn.Module], storage: object, mask: str | None, padding: int, held: int
) -> None:
    model, asked = build(), policy(storage, mask)
    expected = recomputed(model, asked, padding)
    found, cache = generated(model, asked, padding)
    assert torch.equal(found, expected)
    assert cache.layers[0].keys.shape[-2] == held  # type: ignore[attr-defined]


def test_a_graph_reads_the_codes_and_says_so() -> None:
    model, asked = llama(), policy("int4")
    graphs: list[str] = []

    def look(gm: torch.fx.GraphModule, inputs: object, **_: object) -> object:
        from attn_compiler.backend import _rewritten, read_settings

        graph, _extra = _rewritten(gm, inputs, read_settings({"policy": asked}, None))  # type: ignore[arg-type]
        graphs.append(graph.code)
        return graph

    generated(model, asked, 0, look, max_new_tokens=3)
    assert "attn_compiler.encoded" in graphs[-1]
    assert "attn_compiler.decoded" not in graphs[-1]
    [one] = {decision.outcome for decision in attn.reports()[-1].decisions}
    assert one == "exact"
    assert "reads the codes of the cache" in str(attn.reports()[-1])


def test_a_cache_of_codes_takes_their_memory() -> None:
    model = llama()
    codes, numbers = attn.cache(model, policy("int8")), attn.cache(model)
    tokens, _ = prompt(0)
    with torch.no_grad():
        for cache in (codes, numbers):
            model(input_ids=tokens, past_key_values=cache)
    held, plain = (sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values)) for cache in (codes, numbers))
    assert held == plain // (4 * WIDTH) * (WIDTH + 4)  # a byte for each number, and one float for each token and head
    assert held == plain // 4 + plain // WIDTH


@pytest.mark.full
def test_layers_are_held_each_in_its_own_way_and_beams_take_their_codes_along() -> None:
    model, asked = llama(), policy("int4", layers="1")
    forward = model.forward
    found, cache = generated(model, asked, PADDING, num_beams=2)
    assert [layer.keys.dtype for layer in cache.layers] == [torch.float32, torch.uint8]  # type: ignore[attr-defined]
    model.forward = torch.compile(forward, backend=partial(attn_eagerly, options={"policy": asked}))  # type: ignore[method-assign]
    tokens, valid = prompt(PADDING)
    settings = {"max_new_tokens": NEW, "do_sample": False, "disable_compile": True, "num_beams": 2}
    assert torch.equal(found, model.generate(tokens, attention_mask=valid, **settings))


def test_what_no_cache_can_grow_by_is_refused() -> None:
    with pytest.raises(ShapeError, match="follows from tokens that are yet to come; use a type with `per: token`"):
        attn.cache(llama(), policy({"type": "int8", "per": "channel"}))
    heads = {"heads": {"0:2": {"storage": {"kv_cache": "int8"}}}}
    rules = [{"match": {"kind": "self"}, "attn": heads}]
    with pytest.raises(ShapeError, match="all heads of a layer in one way"):
        attn.cache(llama(), {"version": 1, "rules": rules})


def test_another_policy_than_that_of_the_cache_is_refused() -> None:
    model = llama()
    cache = attn.cache(model, policy("int8"))
    forward = torch.compile(model.forward, backend=partial(attn_eagerly, options={"policy": policy("int4")}))
    with torch.no_grad():
        forward(input_ids=prompt(0)[0], past_key_values=cache)
    reasons = {refusal.reason for decision in attn.reports()[-1].decisions for refusal in decision.refusals}
    assert any("this model's cache is held in int8, per token: make it with the same policy" in reason for reason in reasons)
