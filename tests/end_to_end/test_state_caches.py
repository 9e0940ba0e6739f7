"""Caches that remember a state: greedy tokens are those of the parallel form over the whole prefix, at constant memory."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attn_compiler as attn
from attn_compiler.errors import ShapeError
from end_to_end.by_hand import ByHand, Seen, with_weights

pytestmark = pytest.mark.usefixtures("quick")
NEW, PADDING, WINDOW = 12, 3, 6
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
ELU = {"feature": "elu_one"}
FADING = {"feature": "silu", "state": "decay((h + 1) / 8)", "normalizer": "linear(none)"}


class Elu(ByHand):
    def formula(self, q: Tensor, k: Tensor, v: Tensor, scores: Tensor, visible: Tensor) -> Tensor:
        if self.count - 1 in self.windows:
            near = torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2]) < WINDOW
            return scores.masked_fill(~(visible & near), -torch.inf).softmax(-1).nan_to_num() @ v
        weights = (F.elu(q) + 1) @ (F.elu(k) + 1).mT * visible
        return weights @ v / (weights.sum(-1, keepdim=True) + 1e-6)

    windows: frozenset[int] = frozenset()


class Windowed(Elu):
    windows = frozenset({1})


class Fading(ByHand):
    def formula(self, q: Tensor, k: Tensor, v: Tensor, scores: Tensor, visible: Tensor) -> Tensor:
        slopes = torch.arange(1, 5, dtype=q.dtype)[:, None, None] / 8
        distance = (torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2])).abs()
        return (F.silu(q) @ F.silu(k).mT * torch.exp(-slopes * distance) * visible) @ v


def policy(*rules: tuple[Mapping[str, object], Mapping[str, object]]) -> dict[str, object]:
    return {"version": 1, "rules": [{"match": {"kind": "self", **match}, "attn": attn} for match, attn in rules]}


EVERYWHERE, FADES = policy(({}, ELU)), policy(({}, FADING))
MIXED = policy(({"layers": "1"}, {"mask": f"causal & window({WINDOW})"}), ({}, ELU))


def llama(layers: int = 2) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return with_weights(LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=layers)))


def prompt(padding: int) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(3, 64, (2, 11), generator=torch.Generator().manual_seed(5))
    valid = torch.ones_like(tokens)
    valid[0, :padding] = 0
    return tokens, valid


def shown(valid: Tensor) -> Seen:
    return lambda number, q, k: torch.ones((), dtype=torch.bool)


def recomputed(model: nn.Module, formula: type[ByHand], padding: int) -> Tensor:
    """Greedy tokens where each step computes the whole prefix in parallel."""
    tokens, valid = prompt(padding)
    for _ in range(NEW):
        places = (valid.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad(), formula(shown(valid)):
            logits = model(input_ids=tokens, attention_mask=valid, position_ids=places, use_cache=False).logits
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
        valid = torch.cat([valid, torch.ones_like(valid[:, :1])], dim=1)
    return tokens


def generated(model: nn.Module, asked: Mapping[str, object], padding: int, **more: object) -> tuple[Tensor, object]:
    held = attn.cache(model, asked)
    model.forward = torch.compile(model.forward, backend="attn", options={"policy": asked})  # type: ignore[method-assign]
    tokens, valid = prompt(padding)
    settings = {"max_new_tokens": NEW, "do_sample": False, "disable_compile": True, **more}
    return model.generate(tokens, attention_mask=valid, past_key_values=held, **settings), held


@pytest.mark.parametrize(
    ("asked", "formula", "padding"),
    [(EVERYWHERE, Elu, 0), (EVERYWHERE, Elu, PADDING), (FADES, Fading, PADDING), (MIXED, Windowed, PADDING)],
)
def test_tokens_are_those_of_the_parallel_form(asked: Mapping[str, object], formula: type[ByHand], padding: int) -> None:
    model = llama()
    expected = recomputed(model, formula, padding)
    found, held = generated(model, asked, padding)
    assert torch.equal(found, expected)
    states = [layer.past for layer in held.layers if hasattr(layer, "past")]  # type: ignore[attr-defined]
    assert len(states) == (1 if asked is MIXED else 2)
    assert all(tuple(state.shape) == (2, 4 if asked is FADES else 2, 9, 9) for state in states)


def test_a_cache_of_other_tables_has_a_state_of_those() -> None:
    slopes = policy(({}, {**FADING, "state": "decay(slopes)"})) | {"labels": {"slopes": {"given": "slopes"}}}
    model, x = llama(1), torch.randn(2, 2, 5, 8)
    pasts = []
    for slope in (0.1, 2.0):
        layer = attn.cache(model, slopes, tables={"slopes": torch.full((4,), slope)}).layers[0]
        layer.update(x, x)
        pasts.append(layer.past)
    assert not torch.equal(*pasts)


@pytest.mark.parametrize("first", [4, 11])
def test_a_second_prompt_meets_the_state_of_the_first_in_every_layer(first: int) -> None:
    model, (tokens, valid) = llama(), prompt(0)
    places, parts = valid.cumsum(-1) - 1, (slice(0, first), slice(first, None))
    tokens, valid, places = (torch.cat([x, x[:, :4]], dim=1) for x in (tokens, valid, places))
    places = valid.cumsum(-1) - 1
    with torch.no_grad():
        with Elu(shown(valid)):
            exact = model(input_ids=tokens, attention_mask=valid, position_ids=places, use_cache=False).logits
        run, held = torch.compile(model, backend="attn", options={"policy": EVERYWHERE}), attn.cache(model, EVERYWHERE)
        for part in parts:
            seen = {"attention_mask": valid[:, : part.stop], "position_ids": places[:, part], "past_key_values": held}
            found = run(input_ids=tokens[:, part], **seen).logits
            assert torch.allclose(found, exact[:, part], atol=1e-4)


def test_a_site_that_keeps_its_code_does_not_do_without_the_past() -> None:
    model, (tokens, valid) = llama(), prompt(0)
    only_one = policy(({"layers": "0"}, ELU))
    run, held = torch.compile(model, backend="attn", options={"policy": only_one}), attn.cache(model, EVERYWHERE)
    with torch.no_grad():
        run(input_ids=tokens, attention_mask=valid, past_key_values=held)
        with pytest.raises(ShapeError, match="compile it with the policy of the cache"):
            run(input_ids=tokens[:, :1], past_key_values=held)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize(
    ("row", "said"),
    [([0] * 11, "a row of the prompt is padding alone"), ([1] * 7 + [0] * 4, "padding behind a row's first token")],
)
def test_padding_that_a_state_could_not_leave_out_is_refused(row: list[int], said: str, compiled: bool) -> None:
    model, (tokens, valid) = llama(1), prompt(0)
    valid[0] = torch.tensor(row)
    held = attn.cache(model, EVERYWHERE)
    run = torch.compile(model, backend="attn", options={"policy": EVERYWHERE}) if compiled else model
    with torch.no_grad(), pytest.raises((ShapeError, RuntimeError), match=said):
        run(input_ids=tokens, attention_mask=valid, past_key_values=held)


def test_a_model_that_attends_otherwise_is_told_so() -> None:
    """There are no keys that it could meet."""
    model, (tokens, valid) = llama(1), prompt(0)
    held = attn.cache(model, EVERYWHERE)
    with torch.no_grad():
        model(input_ids=tokens, attention_mask=valid, past_key_values=held, use_cache=True)
        with pytest.raises(ShapeError, match="compile it with the policy of the cache"):
            model(input_ids=tokens, attention_mask=valid, past_key_values=held, use_cache=True)


def test_beams_take_their_states_along() -> None:
    held = attn.cache(llama(1), EVERYWHERE)
    layer = held.layers[0]
    x = torch.randn(2, 2, 5, 8)
    layer.update(x, x)
    layer.padding = torch.tensor([1, 0])
    before = layer.past
    held.reorder_cache(torch.tensor([1, 1]))
    assert torch.equal(layer.past, before[[1, 1]])
    assert layer.padding.tolist() == [0, 0]
    held.batch_repeat_interleave(2)
    assert layer.past.shape[0] == 4
    with pytest.raises(ShapeError, match="a state cannot be taken back by 3 tokens"):
        layer.crop(-3)
    held.reset()
    assert layer.get_seq_length() == 0
    assert layer.past is None
