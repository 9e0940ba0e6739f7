"""Caches that hold every token grow in place: what was handed on stays as it was, and a graph serves every length."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import attn_compiler as attn
from attn_compiler.algebra.storage import Held
from attn_compiler.errors import ShapeError
from attn_compiler.generation.grown import LEAST, GrownLayer
from attn_compiler.runtime.codes import encode
from end_to_end.by_hand import with_weights

pytestmark = pytest.mark.usefixtures("quick")
BATCH, HEADS, WIDTH = 2, 3, 8
STORED = (None, *(encode(torch.zeros(1, 1, 1, WIDTH), how).held for how in ("int4", {"type": "int8", "largest": 6})))


def rows(tokens: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    given = torch.randn(2, BATCH, HEADS, tokens, WIDTH, generator=torch.Generator().manual_seed(seed))
    return given[0], given[1]


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        num_hidden_layers=2, pad_token_id=0, bos_token_id=None, eos_token_id=None, attn_implementation="sdpa",
    )  # fmt: skip
    return with_weights(LlamaForCausalLM(config))


def filled(held: Held | None, *pieces: int) -> tuple[GrownLayer, Tensor, Tensor]:
    """A layer that was given pieces of so many tokens, and all of the keys and values."""
    layer, (keys, values), at = GrownLayer(held), rows(sum(pieces)), 0
    for piece in pieces:
        layer.update(keys[:, :, at : at + piece], values[:, :, at : at + piece])
        at += piece
    return layer, keys, values


def meant(x: Tensor, held: Held | None) -> Tensor:
    return encode(x, held).decode() if held else x


def check(layer: GrownLayer, keys: Tensor, values: Tensor, held: Held | None) -> None:
    """A layer holds these, and hands them on with the next token behind them."""
    new = rows(1, 7)
    found = layer.update(*(x[: keys.shape[0]] for x in new))
    for mine, whole, one in zip(found, (keys, values), new, strict=True):
        assert torch.equal(mine, meant(torch.cat([whole, one[: whole.shape[0]]], dim=2), held))


@pytest.mark.parametrize("held", STORED)
def test_what_is_handed_on_is_all_that_came(held: Held | None) -> None:
    with torch.no_grad():
        layer, keys, values = filled(held, 5, 1, 1, LEAST, 1, 200, 1)
        check(layer, keys, values, held)


def test_a_token_is_written_beside_the_others_and_moves_none_of_them() -> None:
    with torch.no_grad():
        layer, *_ = filled(None, 100)
        places = set[int]()
        for _ in range(100):
            layer.update(*rows(1))
            places.add(layer.rooms[0].data_ptr())
        assert len(places) <= 3


@pytest.mark.parametrize("held", STORED)
def test_slices_copies_and_cut_layers_never_see_each_other_s_tokens(held: Held | None) -> None:
    with torch.no_grad():
        layer, keys, values = filled(held, 9, 1)
        before = layer.keys
        twin, cut = copy.copy(layer), copy.copy(layer)
        apart = copy.deepcopy(layer)
        cut.crop(-4)
        for other in (layer, twin, apart):
            check(other, keys, values, held)
        check(cut, keys[:, :, :6], values[:, :, :6], held)
        layer.crop(-3)  # two of those it has written since
        check(layer, keys[:, :, :8], values[:, :, :8], held)
        assert torch.equal(before, encode(keys, held).rows if held else keys)
        assert layer.get_seq_length() == 9


@pytest.mark.parametrize("held", STORED)
@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.reorder_cache(torch.tensor([1, 1])),
        lambda layer: layer.batch_select_indices(torch.tensor([1, 1])),
        lambda layer: (layer.batch_select_indices(torch.tensor([1])), layer.batch_repeat_interleave(2)),
        lambda layer: (layer.offload(), layer.prefetch(), layer.reorder_cache(torch.tensor([1, 1]))),
    ],
)
def test_rows_of_a_batch_are_chosen_and_repeated(held: Held | None, change: Callable[[GrownLayer], object]) -> None:
    with torch.no_grad():
        layer, keys, values = filled(held, 5, 2)
        change(layer)
        check(layer, keys[[1, 1]], values[[1, 1]], held)


def test_more_than_there_is_cannot_be_taken_back_and_nothing_is_left_after_a_reset() -> None:
    layer, *_ = filled(None, 5)
    for tokens in (-6, 1):
        with pytest.raises(ShapeError, match=f"by a negative number of its 5 tokens; found {tokens}"):
            layer.crop(tokens)
    layer.reset()
    assert layer.keys is None
    assert layer.get_seq_length() == 0
    check(layer, *(x[:, :, :0] for x in rows(1)), None)


def test_gradients_reach_every_token_whatever_comes_behind() -> None:
    keys, values = (x.requires_grad_() for x in rows(6))
    layer = GrownLayer()
    seen = [layer.update(keys[:, :, at : at + 2], values[:, :, at : at + 2]) for at in (0, 2, 4)]
    with torch.no_grad():
        layer.update(*rows(1))
    sum((k * k + v).sum() for k, v in seen).backward()  # type: ignore[union-attr]
    times = torch.tensor([3.0, 3, 2, 2, 1, 1])[:, None]
    assert torch.equal(keys.grad, 2 * keys * times)
    assert torch.equal(values.grad, torch.ones_like(values) * times)


def test_what_inference_mode_has_written_grows_outside_of_it() -> None:
    with torch.inference_mode():
        layer, keys, values = filled(None, 5, 1)
    with torch.no_grad():
        check(layer, keys, values, None)


def test_a_model_that_is_compiled_as_a_whole_makes_room_itself() -> None:
    """What runs in front of a model is part of its graph then."""
    model = llama()
    run, cache = (
        torch.compile(model, backend="eager"),
        attn.cache(model, {"version": 1, "rules": [{"match": {}, "attn": "exact"}]}),
    )
    tokens = torch.randint(3, 64, (1, LEAST + 20), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        pieces = [run(input_ids=piece, past_key_values=cache).logits for piece in (tokens[:, :8], *tokens[:, 8:].split(1, dim=1))]
        whole = model(input_ids=tokens).logits
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole)
    assert cache.layers[0].tokens == LEAST + 20


@pytest.mark.parametrize("storage", [None, "int8", {"type": "fp8_e4m3", "largest": [60, 30]}], ids=str)
def test_one_graph_serves_every_length_and_every_growth(storage: object) -> None:
    model = llama()
    asked = {"version": 1, "rules": [{"match": {}, "attn": {"storage": {"kv_cache": storage}} if storage else "exact"}]}
    caches, graphs = [attn.cache(model, asked) for _ in range(2)], list[torch.fx.GraphModule]()

    def look(gm: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(gm)
        return gm

    tokens = torch.randint(3, 64, (1, 11), generator=torch.Generator().manual_seed(5))
    settings = {"max_new_tokens": 2 * LEAST + 30, "do_sample": False, "disable_compile": True}
    if storage is None:
        expected = model.generate(tokens, **settings)  # type: ignore[operator]
    else:
        expected = model.generate(tokens, past_key_values=caches[1], **settings)  # type: ignore[operator]
    model.forward = torch.compile(model.forward, backend=look)  # type: ignore[method-assign, arg-type]
    assert torch.equal(model.generate(tokens, past_key_values=caches[0], **settings), expected)  # type: ignore[operator]
    assert len(graphs) == 2
    assert caches[0].layers[0].rooms[0].shape[2] > 2 * LEAST + 30
