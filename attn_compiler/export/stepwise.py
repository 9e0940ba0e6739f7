"""A model of transformers as one function from tokens and the past to logits and the past of the next call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attn_compiler import torch_private as private
from attn_compiler.errors import ExportError
from attn_compiler.export.decoder import PADDING
from attn_compiler.generation.remembered import Remembered

PAST = 32  # tokens of the past that a model is traced with: any other number serves as well
WRAPPED = "model."  # what the names of modules begin with once they are part of what is traced
BEFORE = ("input_ids", "position_ids")
CACHE, STATE = ("key", "value"), ("state", "seen")


@dataclass(frozen=True)
class Stepwise:
    """The model, what it is traced with, which sizes may change, and what the inputs and outputs are called."""

    module: nn.Module
    args: tuple[Tensor, ...]
    dynamic_shapes: tuple[Any, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    vocabulary: int
    positions: int  # how many tokens a text may have
    example: tuple[Tensor, ...]  # what it is given for the tokens that the caller gave, behind no others

    @property
    def before(self) -> int:
        """How many inputs stand before the caches."""
        return len(self.inputs) - len(self.outputs) + 1


def stepwise(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    logits: int = 1,
    states: Callable[[Tensor], Mapping[int, Remembered]] = lambda _: {},
) -> Stepwise:
    """Let the cache of a model be inputs and outputs: those of each layer are called as onnxruntime's own examples do.

    Of so many of the last tokens there are logits; 0 are all. The past of some layers is a state: `states` says which, and of
    what, given the tokens.
    """
    ids = _tokens(model, args, kwargs)
    config: Any = model.config
    rows, length = max(2, ids.shape[0]), max(2, ids.shape[1])
    recalls = states(ids)
    held = [x for layer, pair in enumerate(_sides(model, ids)) for x in _past(pair, recalls.get(layer), rows)]
    tokens = (ids.new_zeros(rows, length), torch.arange(PAST, PAST + length).expand(rows, -1))
    batch, new, before = map(torch.export.Dim, ("batch", "tokens", "past"))
    padded = kwargs.get(PADDING)
    masks = [] if padded is None else [torch.ones(rows, PAST + length, dtype=padded.dtype)]
    names = [f"{layer}.{side}" for layer in range(len(held) // 2) for side in (STATE if layer in recalls else CACHE)]
    grows = [place // 2 not in recalls for place in range(len(held))]
    return Stepwise(
        (_Padded if masks else _Stepwise)(model, logits, recalls),
        (*tokens, *masks, *held),
        (
            *({0: batch, 1: new} for _ in tokens),
            *({0: batch, 1: torch.export.Dim.AUTO} for _ in masks),
            tuple({0: batch, 2: before} if one else {0: batch} for one in grows),
        ),
        (*BEFORE, *(PADDING for _ in masks), *(f"past_key_values.{name}" for name in names)),
        ("logits", *(f"present.{name}" for name in names)),
        config.vocab_size,
        getattr(config, "max_position_embeddings", None) or 1 << 20,
        (
            ids,
            torch.arange(ids.shape[1]).expand(ids.shape[0], -1),
            *([] if padded is None else [padded]),
            *((x[:1, :, :0] if one else x[:1]).expand(ids.shape[0], -1, -1, -1) for x, one in zip(held, grows, strict=True)),
        ),
    )


def _past(sides: Sequence[Tensor], recalls: Remembered | None, rows: int) -> tuple[Tensor, ...]:
    """What a layer is traced with that leaves such keys and values of a token behind: of so many tokens, or their state."""
    from attn_compiler.export.recalling import state_of

    if recalls is None:
        return tuple(x.new_zeros(rows, x.shape[1], PAST, x.shape[3]) for x in sides)
    state = state_of(recalls, *sides).expand(rows, -1, -1, -1)
    return state[:, :, :-1].clone(), state[:, :, -1:].clone()


class _Model(nn.Module):
    """A model whose cache is handed in and out."""

    def __init__(self, model: nn.Module, logits: int, recalls: Mapping[int, Remembered]) -> None:
        super().__init__()
        self.model, self.logits, self.recalls = model, logits, recalls
        self.training = model.training

    def run(self, past: Sequence[Tensor], **given: Tensor) -> tuple[Tensor, ...]:
        """The logits of the last tokens, and the keys and values of all tokens of each layer, or their state."""
        grown = [x.shape[2] for place, x in enumerate(past) if place // 2 not in self.recalls]
        if PADDING in given:
            grown.append(given[PADDING].shape[1] - given["input_ids"].shape[1])
        for length in grown:  # torch.export takes each length for one of its own
            private.require(length == grown[0])
        cache = _cache(past, self.recalls, grown[0] if grown else 0)
        out = self.model(**given, past_key_values=cache, use_cache=True, logits_to_keep=self.logits)
        return (out.logits, *_held(cache))


class _Stepwise(_Model):
    def forward(self, input_ids: Tensor, position_ids: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        """Rows of one length."""
        return self.run(past, input_ids=input_ids, position_ids=position_ids)


class _Padded(_Model):
    def forward(self, input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        """The mask is 1 for the tokens of a row, those of the past included, and 0 in front of them."""
        return self.run(past, input_ids=input_ids, position_ids=position_ids, attention_mask=attention_mask)


def _tokens(model: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """The tokens that a model is traced with; other inputs would be those of its every call."""
    ids = args[0] if args else kwargs.get("input_ids")
    other = sorted({*kwargs} - {"input_ids", "use_cache", PADDING})
    if getattr(model, "config", None) is None or not hasattr(model, "generate"):
        raise ExportError(f"`decode` is for models of transformers that generate text; found {type(model).__name__}")
    if model.config.is_encoder_decoder:
        raise ExportError(f"`decode` is for models without an encoder; found {type(model).__name__}")
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.dtype.is_floating_point or len(args) > 1 or other:
        found = other or [type(x).__name__ for x in args]
        said = "`input_ids` of shape [rows, tokens], perhaps `attention_mask`, and nothing else"
        raise ExportError(f"`decode` takes {said}; found {', '.join(found)}")
    there = kwargs.get(PADDING)
    if there is not None and there.shape != ids.shape:
        raise ExportError(f"`{PADDING}` is said of {list(ids.shape)} tokens; found {list(there.shape)}")
    return ids


def _sides(model: nn.Module, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The keys and values of each layer, as the model leaves them behind."""
    from transformers import DynamicCache

    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=ids[:1, :1], past_key_values=cache, use_cache=True)
    if not all(hasattr(layer, "keys") for layer in cache.layers):
        raise ExportError(f"{type(model).__name__} has layers that remember something else than keys and values")
    held = _held(cache)
    return list(zip(held[::2], held[1::2], strict=True))


def _cache(past: Sequence[Tensor], recalls: Mapping[int, Remembered], before: int) -> Any:
    """A cache that holds this much already."""
    from transformers import DynamicCache

    from attn_compiler.export.recalling_layer import RecallingLayer

    cache: Any = DynamicCache()
    for layer, (keys, values) in enumerate(zip(past[::2], past[1::2], strict=True)):
        if layer in recalls:
            cache.layers.append(RecallingLayer(recalls[layer], (keys, values), before))
            continue
        cache.update(keys[:, :, :0], values[:, :, :0], layer)
        cache.layers[layer].keys, cache.layers[layer].values = keys, values
    return cache


def _held(cache: Any) -> list[Tensor]:
    layers: list[Any] = cache.layers
    return [x for layer in layers for x in (layer.keys, layer.values)]
