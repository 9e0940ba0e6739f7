"""Caches whose states ask more of a token than its key and value: gates made of the block's input, keys before a rotation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import attn_compiler as attn
from attn_compiler.errors import ShapeError
from attn_compiler.library import folder
from attn_compiler.testing import assert_within_budget
from end_to_end.by_hand import with_weights

pytestmark = pytest.mark.usefixtures("quick")
NEW, PADDING, WINDOW, LENGTH, HEADS = 10, 3, 6, 11, 4
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": HEADS, "num_key_value_heads": 2,
    "head_dim": 8, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
BEFORE_ROTATION = {"q": "q_unrotated", "k": "k_unrotated"}
UNROTATED = {"feature": "elu_one", "operands": BEFORE_ROTATION}
GATED = {"feature": "elu_one", "state": "gate(scalar)", "operands": {"gate": "x"}}
NEAR = {"mask": f"causal & window({WINDOW})"}
BY_HEAD = {"heads": {"0:2": NEAR, "rest": GATED}}
FAR_GLA = {
    "mix": {
        "how": "sum",
        "weights": {"near": 0.5, "far": 0.5},
        "branches": {"near": NEAR, "far": {"mask": f"causal & ~window({WINDOW})", "state": "gate(vector)"}},
    },
    "operands": {"gate": "x"},
}


def ready(name: str) -> dict[str, object]:
    """What a ready policy asks of a linear layer, its window shortened."""
    from yaml import safe_load

    text = (folder("patterns") / "policies" / f"{name}.yaml").read_text().replace("window(128)", f"window({WINDOW})")
    return safe_load(text)["rules"][-1]["attn"]  # type: ignore[no-any-return]


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return with_weights(LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=1)))


def trained(model: nn.Module, slots: Mapping[str, object], at: Path) -> Mapping[str, object]:
    """A policy whose file holds parameters, as if somebody had trained them."""
    policy = {"version": 1, "rules": [{"match": {"kind": "self"}, "attn": slots, "untrained": "allow"}]}
    if slots is UNROTATED:
        return policy
    policy["parameters"] = str(at / "trained.safetensors")
    adapted = attn.adapt(model, policy, (), {"input_ids": torch.zeros(1, LENGTH, dtype=torch.int64), "use_cache": False})
    generator = torch.Generator().manual_seed(1)
    for _, parameter in sorted(adapted.learned.items()):
        parameter.data = torch.randn(parameter.shape, generator=generator) / 3
    adapted.save()
    return policy


def prompt(padding: int, length: int = LENGTH) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(3, 64, (2, length), generator=torch.Generator().manual_seed(5))
    valid = torch.ones_like(tokens)
    valid[0, :padding] = 0
    return tokens, valid


def in_parallel(model: nn.Module, policy: Mapping[str, object], tokens: Tensor, valid: Tensor) -> Tensor:
    """The logits of a text that is read at once, without a cache."""
    torch.compiler.reset()
    run = torch.compile(model, backend="attn", options={"policy": policy})
    places = (valid.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        return run(input_ids=tokens, attention_mask=valid, position_ids=places, use_cache=False).logits


@pytest.mark.parametrize(
    ("slots", "padding", "length", "held"),
    [
        (ready("lizard"), PADDING, LENGTH, [(2, 2, WINDOW - 1, 8), (2, HEADS, WINDOW - 1)]),
        (ready("lizard"), 0, 4, [(2, 2, WINDOW - 1, 8), (2, HEADS, WINDOW - 1)]),
        (ready("infinitevl"), PADDING, LENGTH, []),
        (ready("gla"), PADDING, LENGTH, []),
        (FAR_GLA, 0, LENGTH, [(2, HEADS, WINDOW - 1, 8)]),
        (UNROTATED, PADDING, LENGTH, []),
        (BY_HEAD, 0, LENGTH, [(2, HEADS, WINDOW - 1)]),
    ],
    ids=["lizard", "a prompt shorter than its window", "infinitevl", "gla", "gla behind a window", "unrotated", "heads"],
)
def test_what_is_generated_is_what_the_parallel_form_gives(
    slots: Mapping[str, object], padding: int, length: int, held: list[tuple[int, ...]], tmp_path: Path
) -> None:
    model, (tokens, valid) = llama(), prompt(padding, length)
    asked = trained(model, slots, tmp_path)
    cache, forward = attn.cache(model, asked), model.forward
    torch.compiler.reset()
    model.forward = torch.compile(model.forward, backend="attn", options={"policy": asked})  # type: ignore[method-assign]
    settings = {"max_new_tokens": NEW, "do_sample": False, "disable_compile": True, "return_dict_in_generate": True}
    found = model.generate(tokens, attention_mask=valid, past_key_values=cache, output_logits=True, **settings)
    for layer in cache.layers:
        assert [tuple(rows.shape) for rows in layer.traits] == held
        assert len(layer.states) == 1
    model.forward = forward  # type: ignore[method-assign]
    whole, seen = found.sequences[:, :-1], torch.cat([valid, valid.new_ones(2, NEW - 1)], dim=1)
    plain = in_parallel(model, asked, whole, seen)[:, -NEW:]
    exact = in_parallel(model.double(), asked, whole, seen)[:, -NEW:]
    assert_within_budget(torch.stack(found.logits, dim=1), exact, plain)


@pytest.mark.parametrize(("name", "cuts"), [("lizard", (4, 7, 69)), ("infinitevl", (1, 2, 70)), ("gla", (1, 4, 70))])
def test_pieces_of_a_prompt_go_on_where_the_last_one_ended(name: str, cuts: tuple[int, ...], tmp_path: Path) -> None:
    model, (tokens, valid) = llama(), prompt(0, sum(cuts))
    asked = trained(model, ready(name), tmp_path)
    held, parts, begin = attn.cache(model, asked), list[Tensor](), 0
    run = torch.compile(model, backend="attn", options={"policy": asked})
    with torch.no_grad():
        for part in tokens.split(list(cuts), dim=1):
            seen = {"attention_mask": valid[:, : begin + part.shape[1]], "past_key_values": held}
            places = torch.arange(begin, begin + part.shape[1])[None].expand(2, -1)
            parts.append(run(input_ids=part, position_ids=places, **seen).logits)
            begin += part.shape[1]
    plain = in_parallel(model, asked, tokens, valid)
    exact = in_parallel(model.double(), asked, tokens, valid)
    assert_within_budget(torch.cat(parts, dim=1), exact, plain)


def test_a_model_without_the_policy_cannot_say_what_its_tokens_are_asked_for(tmp_path: Path) -> None:
    model, (tokens, valid) = llama(), prompt(0)
    asked = trained(model, ready("infinitevl"), tmp_path)
    with torch.no_grad(), pytest.raises(ShapeError, match="compile it with the policy of the cache"):
        model(input_ids=tokens, attention_mask=valid, past_key_values=attn.cache(model, asked), use_cache=True)


def test_a_policy_that_asks_for_less_than_a_cache_holds_is_told_so(tmp_path: Path) -> None:
    model, (tokens, valid) = llama(), prompt(0)
    asked = trained(model, UNROTATED, tmp_path)
    held = attn.cache(model, asked)
    other = {"version": 1, "rules": [{"match": {"kind": "self"}, "attn": {"feature": "elu_one"}}]}
    run = torch.compile(model, backend="attn", options={"policy": other})
    with torch.no_grad(), pytest.raises(ShapeError, match="compile it with the policy of the cache"):
        run(input_ids=tokens, attention_mask=valid, past_key_values=held)


def test_gates_in_a_cache_that_keeps_no_trace_of_their_input_are_refused_with_what_to_do(tmp_path: Path) -> None:
    model, (tokens, valid) = llama(), prompt(0)
    asked = trained(model, GATED, tmp_path)
    past = model(input_ids=tokens, attention_mask=valid, use_cache=True).past_key_values
    report = attn.explain(model, (), {"input_ids": tokens[:, :2], "past_key_values": past}, asked)
    assert [refusal.reason.startswith("nobody knows the input of the block") for _, refusal in report.refusals] == [True]


def test_beams_take_along_what_their_tokens_are_asked_for(tmp_path: Path) -> None:
    model, (tokens, valid) = llama(), prompt(0)
    held = attn.cache(model, asked := trained(model, ready("lizard"), tmp_path))
    run = torch.compile(model, backend="attn", options={"policy": asked})
    with torch.no_grad():
        run(input_ids=tokens, attention_mask=valid, past_key_values=held)
    layer = held.layers[0]
    before = layer.traits
    held.reorder_cache(torch.tensor([1, 1]))
    assert all(torch.equal(now, then[[1, 1]]) for now, then in zip(layer.traits, before, strict=True))
    held.reset()
    assert layer.traits == ()


def test_a_report_counts_what_a_cache_holds_beside_keys(tmp_path: Path) -> None:
    model, (tokens, _) = llama(), prompt(0)
    asked = trained(model, ready("lizard"), tmp_path)
    report = attn.explain(model, (), {"input_ids": tokens, "use_cache": False}, asked)
    state, token = HEADS * (2 * 8 + 1) * (8 + 1) * 4, (2 * 2 * 8 + 2 * 8 + HEADS) * 4
    assert {d.caches.decided.most for d in report.plan.decisions if d.caches} == {state + (WINDOW - 1) * token}


def self_attention(slots: Mapping[str, object]) -> Mapping[str, object]:
    return {"version": 1, "rules": [{"match": {"kind": "self"}, "attn": slots}]}


@pytest.mark.parametrize(
    ("of_cache", "of_model"),
    [
        ({"feature": "elu_one"}, {"feature": "silu", "normalizer": "linear(none)"}),
        ({"feature": "elu_one", "state": "decay(0.1)"}, {"feature": "elu_one", "state": "decay(0.9)"}),
        ({"feature": "elu_one", "state": "decay(0.1)"}, {"feature": "elu_one"}),
    ],
    ids=str,
)
def test_states_of_one_policy_serve_no_other(of_cache: Mapping[str, object], of_model: Mapping[str, object]) -> None:
    model, (tokens, _) = llama(), prompt(0)
    held = attn.cache(model, self_attention(of_cache))
    run = torch.compile(model, backend="attn", options={"policy": self_attention(of_model)})
    with torch.no_grad():
        run(input_ids=tokens, past_key_values=held)
        with pytest.raises(ShapeError, match="compile it with the policy of the cache"):
            run(input_ids=tokens[:, :1], past_key_values=held)
    said = [refusal.reason for _, refusal in attn.reports()[-1].refusals]
    assert any(reason.endswith("this needs states of other sums: make both with one policy") for reason in said)


def test_states_serve_whoever_sums_the_same() -> None:
    """What becomes of queries, and of what they gather, is no part of a state."""
    model, (tokens, valid) = llama(), prompt(PADDING)
    plain = self_attention({"feature": "elu_one", "normalizer": "linear(none)"})
    held, logits = attn.cache(model, self_attention({"feature": "elu_one"})), list[Tensor]()
    torch.compiler.reset()
    run = torch.compile(model, backend="attn", options={"policy": plain})
    places = (valid.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        for part in (slice(0, 6), slice(6, None)):
            seen = {"attention_mask": valid[:, : part.stop], "position_ids": places[:, part], "past_key_values": held}
            logits.append(run(input_ids=tokens[:, part], **seen).logits)
    exact = in_parallel(model.double(), plain, tokens, valid)
    assert_within_budget(torch.cat(logits, dim=1), exact, in_parallel(model.float(), plain, tokens, valid))
