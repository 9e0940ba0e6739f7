"""Caches that remember a state: greedy tokens are those of the parallel form over the whole prefix, at constant memory."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attn_compiler as attn
from attn_compiler.errors import ShapeError
from attn_compiler.generation import states
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


class Shared(ByHand):
    """Softmax in a window and elu + 1 before it, under one denominator, as LoLCATs has it."""

    def formula(self, q: Tensor, k: Tensor, v: Tensor, scores: Tensor, visible: Tensor) -> Tensor:
        near = torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2]) < WINDOW
        near, far = visible & near, visible & ~near
        peak = scores.masked_fill(~near, -torch.inf).amax(-1, keepdim=True).nan_to_num(neginf=0.0)
        weights = (scores - peak).exp() * near + (F.elu(q) + 1) @ (F.elu(k) + 1).mT * far
        mass = weights.sum(-1, keepdim=True)
        return weights @ v / torch.where(mass == 0, 1.0, mass)


class ByHead(ByHand):
    """Two heads with a window, two that are linear."""

    def formula(self, q: Tensor, k: Tensor, v: Tensor, scores: Tensor, visible: Tensor) -> Tensor:
        near = visible & (torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2]) < WINDOW)
        soft = scores.masked_fill(~near, -torch.inf).softmax(-1).nan_to_num() @ v
        weights = (F.elu(q) + 1) @ (F.elu(k) + 1).mT * visible
        return torch.cat([soft[:, :2], (weights @ v / (weights.sum(-1, keepdim=True) + 1e-6))[:, 2:]], dim=1)


class Windowed(Elu):
    windows = frozenset({1})


class Fading(ByHand):
    def formula(self, q: Tensor, k: Tensor, v: Tensor, scores: Tensor, visible: Tensor) -> Tensor:
        slopes = torch.arange(1, 5, dtype=q.dtype)[:, None, None] / 8
        distance = (torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2])).abs()
        return (F.silu(q) @ F.silu(k).mT * torch.exp(-slopes * distance) * visible) @ v


class Gated(Fading):
    """A window, and the same share of a decaying sum of all keys."""

    def formula(self, q: Tensor, k: Tensor, v: Tensor, scores: Tensor, visible: Tensor) -> Tensor:
        distance = torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2])
        near = scores.masked_fill(~(visible & (distance < WINDOW)), -torch.inf).softmax(-1).nan_to_num() @ v
        return 0.75 * near + 0.25 * super().formula(q, k, v, scores, visible)


def policy(*rules: tuple[Mapping[str, object], Mapping[str, object]]) -> dict[str, object]:
    return {"version": 1, "rules": [{"match": {"kind": "self", **match}, "attn": attn} for match, attn in rules]}


EVERYWHERE, FADES = policy(({}, ELU)), policy(({}, FADING))
MIXED = policy(({"layers": "1"}, {"mask": f"causal & window({WINDOW})"}), ({}, ELU))
NEAR, FAR = {"mask": f"causal & window({WINDOW})"}, {"mask": f"causal & ~window({WINDOW})", "feature": "elu_one"}
SHARED = policy(({}, {"mix": {"how": "shared_denominator", "branches": {"near": NEAR, "far": FAR}}}))
GATED = policy(({}, {"mix": {"how": "lerp", "weights": {"near": 0.75}, "branches": {"near": NEAR, "far": FADING}}}))
BY_HEAD = policy(({}, {"heads": {"0:2": NEAR, "rest": ELU}}))


def llama(layers: int = 2) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return with_weights(LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=layers)))


def prompt(padding: int, length: int = 11) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(3, 64, (2, length), generator=torch.Generator().manual_seed(5))
    valid = torch.ones_like(tokens)
    valid[0, : min(padding, length - 1)] = 0
    return tokens, valid


def shown(valid: Tensor) -> Seen:
    return lambda number, q, k: torch.ones((), dtype=torch.bool)


def recomputed(model: nn.Module, formula: type[ByHand], padding: int, length: int = 11) -> Tensor:
    """Greedy tokens where each step computes the whole prefix in parallel."""
    tokens, valid = prompt(padding, length)
    for _ in range(NEW):
        places = (valid.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad(), formula(shown(valid)):
            logits = model(input_ids=tokens, attention_mask=valid, position_ids=places, use_cache=False).logits
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
        valid = torch.cat([valid, torch.ones_like(valid[:, :1])], dim=1)
    return tokens


def generated(model: nn.Module, asked: Mapping[str, object], padding: int, length: int = 11) -> tuple[Tensor, object]:
    held = attn.cache(model, asked)
    model.forward = torch.compile(model.forward, backend="attn", options={"policy": asked})  # type: ignore[method-assign]
    tokens, valid = prompt(padding, length)
    settings = {"max_new_tokens": NEW, "do_sample": False, "disable_compile": True}
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
    remembered = [state for layer in held.layers for state in getattr(layer, "states", ())]  # type: ignore[attr-defined]
    assert len(remembered) == (1 if asked is MIXED else 2)
    assert all(tuple(state.shape) == (2, 4 if asked is FADES else 2, 9, 9) for state in remembered)


@pytest.mark.parametrize(
    ("asked", "formula", "heads", "padding", "prompted"),
    [
        (SHARED, Shared, 2, PADDING, 11),
        (GATED, Gated, 4, 0, 11),
        (BY_HEAD, ByHead, 1, PADDING, 11),
        pytest.param(SHARED, Shared, 2, 0, 3, marks=pytest.mark.full),
        pytest.param(GATED, Gated, 4, PADDING, 3, marks=pytest.mark.full),
        pytest.param(BY_HEAD, ByHead, 1, PADDING, 3, marks=pytest.mark.full),
    ],
)
def test_beside_a_state_a_layer_holds_the_window_that_is_mixed_with_it(
    asked: Mapping[str, object], formula: type[ByHand], heads: int, padding: int, prompted: int
) -> None:
    model = llama()
    expected = recomputed(model, formula, padding, prompted)
    found, held = generated(model, asked, padding, prompted)
    assert torch.equal(found, expected)
    for layer in held.layers:  # type: ignore[attr-defined]
        assert [tuple(state.shape) for state in layer.states] == [(2, heads, 9, 9)]
        assert layer.keys.shape == layer.values.shape == (2, 2, WINDOW - 1, 8)


@pytest.mark.parametrize("padding", [None, PADDING])
def test_tokens_join_a_state_when_the_window_has_passed_them_however_they_come(
    padding: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(states, "recall", lambda here, *_: here)
    x, y = (torch.randn(2, 2, 20, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    at_once, one_by_one = (attn.cache(llama(1), SHARED).layers[0] for _ in range(2))
    for layer, cuts in ((at_once, [20]), (one_by_one, [1] * 20)):
        layer.padding = None if padding is None else torch.tensor([padding, 0])
        for k, v in zip(x.split(cuts, dim=2), y.split(cuts, dim=2), strict=True):
            layer.update(k, v)
        assert torch.equal(layer.keys, x[:, :, 1 - WINDOW :])
        assert torch.equal(layer.values, y[:, :, 1 - WINDOW :])
    assert torch.allclose(at_once.states[0], one_by_one.states[0], atol=1e-5)


def test_a_cache_of_other_tables_has_a_state_of_those() -> None:
    slopes = policy(({}, {**FADING, "state": "decay(slopes)"})) | {"labels": {"slopes": {"given": "slopes"}}}
    model, x = llama(1), torch.randn(2, 2, 5, 8)
    pasts = []
    for slope in (0.1, 2.0):
        layer = attn.cache(model, slopes, tables={"slopes": torch.full((4,), slope)}).layers[0]
        layer.update(x, x)
        pasts.append(layer.states[0])
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
    (before,) = layer.states
    held.reorder_cache(torch.tensor([1, 1]))
    assert torch.equal(layer.states[0], before[[1, 1]])
    assert layer.padding.tolist() == [0, 0]
    held.batch_repeat_interleave(2)
    assert layer.states[0].shape[0] == 4
    with pytest.raises(ShapeError, match="a state cannot be taken back by 3 tokens"):
        layer.crop(-3)
    held.reset()
    assert layer.get_seq_length() == 0
    assert layer.states == ()


@pytest.mark.parametrize(
    "slots",
    [
        {**ELU, "mask": "causal & strided(1, 2)"},
        {**ELU, "mask": "causal & ~sinks(2)"},
        {**ELU, "normalizer": "linear(none)", "scale": "1 / k_len"},
        {**ELU, "normalizer": "linear(none)", "scale": "1 / (q + 1)"},
        {"operands": {"q": "q_unrotated", "k": "k_unrotated"}, "mask": "causal & window(6)"},
        {
            "mix": {
                "how": "sum",
                "weights": {"far": "4 / k_len"},
                "branches": {"near": {"mask": "causal & window(4)"}, "far": ELU},
            }
        },
    ],
    ids=str,
)
def test_what_asks_where_tokens_stand_holds_all_of_them(slots: Mapping[str, object]) -> None:
    from attn_compiler.generation.grown import GrownLayer

    assert [type(layer) for layer in attn.cache(llama(1), policy(({}, slots))).layers] == [GrownLayer]
