"""Layers of a transformers cache that hold every token, in tensors with rows to spare: a new token copies nothing but itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from attn_compiler import torch_private as private
from attn_compiler.algebra.storage import Held
from attn_compiler.errors import ShapeError
from attn_compiler.runtime.codes import written

SHARE, LEAST = 8, 64  # rows to spare: an eighth of those that are needed, and so many; so each is copied about nine times in all


class GrownLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """The keys and values of all tokens, as they come or in few bits, each in the front of a tensor that is larger.

    A row is written once, behind all that were: who holds slices of it never sees them change. Rows to spare are those of one
    layer; what was copied from it, or cut, moves to larger tensors before it grows.
    """

    is_croppable = True
    is_sliding = False

    def __init__(self, held: Held | None = None) -> None:
        self.how = written(held) if held else ""
        self.first: Any = None  # the first layer of the cache
        self.reset()

    def reset(self) -> None:
        self.rooms: tuple[Tensor, ...] = ()
        self.tokens, self.spare = 0, False  # how many rows are in use, and whether the others are this layer's own
        self.is_initialized = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before = self._before(key_states.shape[-2])
        after = before + key_states.shape[-2]
        new = encoded(key_states, self.how, 0), encoded(value_states, self.how, 1)
        if torch.is_grad_enabled():  # a gradient asks for what was read, in a tensor that nobody has written to since
            self.rooms, self.spare = tuple(map(_joined, self._held() or (None, None), new)), False
        else:
            if not self._has_room(after):
                self._grow(after, self.rooms or new)
            for room, x in zip(self.rooms, new, strict=True):
                room[:, :, before:after] = x
        self.tokens = after
        keys, values = (decoded(x, self.how, self.dtype) for x in (self._held() if before else new))
        return keys, values

    def reserve(self, tokens: int) -> None:
        """Make room for so many more, where some are here: in front of a graph, which is then the same for each token.

        What is part of a graph itself leaves that to `update`.
        """
        if not self.tokens or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return
        if not self._has_room(self.tokens + tokens):
            self._grow(self.tokens + tokens, self.rooms)
        for room in self.rooms:
            private.may_change(room, 2)

    def _before(self, tokens: int) -> int:
        """How many are here, said by the first layer, which has the new ones: in a graph, one number has to be one symbol."""
        told = self.tokens if self.first in (None, self) else self.first.get_seq_length() - tokens
        return told if told == self.tokens else self.tokens

    def _has_room(self, tokens: int) -> bool:  # one row is left: a graph would ask whether what is held lies in one piece
        if not self.spare or tokens >= self.rooms[0].shape[-2]:
            return False
        return torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or not self.rooms[0].is_inference()

    def _grow(self, tokens: int, like: tuple[Tensor, ...]) -> None:
        """Move to tensors for so many tokens, and some more."""
        rows, held = tokens + tokens // SHARE + LEAST, self._held()
        self.rooms = tuple(x.new_empty((*x.shape[:2], rows, x.shape[3])) for x in like)
        for room, x in zip(self.rooms, held, strict=False):
            room[:, :, : self.tokens] = x
        self.spare = True

    def _held(self) -> tuple[Tensor, ...]:
        return tuple(room[:, :, : self.tokens] for room in self.rooms)

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """The rows of keys that are in use."""
        return self._held()[0] if self.rooms else None

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        """The rows of values that are in use."""
        return self._held()[1] if self.rooms else None

    def __copy__(self) -> GrownLayer:
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__, spare=False)
        return twin

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.tokens + query_length, 0

    def get_seq_length(self) -> int:
        return self.tokens

    def get_max_length(self) -> int:
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        if not -self.tokens <= tokens_to_remove <= 0:
            raise ShapeError(f"a cache is cut by a negative number of its {self.tokens} tokens; found {tokens_to_remove}")
        self.tokens, self.spare = self.tokens + tokens_to_remove, self.spare and not tokens_to_remove

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._each(lambda room: room[indices.to(room.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each(lambda room: room.repeat_interleave(repeats, dim=0))

    def offload(self) -> None:
        self._each(lambda room: room.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self._each(lambda room: room.to(self.device, non_blocking=True))

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        self.rooms = tuple(map(change, self.rooms))


def _joined(held: Tensor | None, new: Tensor) -> Tensor:
    return new if held is None else torch.cat([held, new], dim=-2)


def encoded(x: Tensor, how: str, operand: int) -> Tensor:
    """What a cache holds of keys (0) or values (1)."""
    return torch.ops.attn_compiler.encoded(x, how, operand) if how else x


def decoded(rows: Tensor, how: str, dtype: torch.dtype) -> Tensor:
    """What attention reads: operators that know codes take these instead, and this is then never computed."""
    return torch.ops.attn_compiler.decoded(rows, how, dtype) if how else rows
