"""A layer of a transformers cache whose past is a state that comes from outside of a trace."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from attn_compiler.generation.remembered import Remembered
from attn_compiler.runtime.recall import recall, trait

Count = int | torch.SymInt


class RecallingLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Sums and what they have seen, which stand for so many tokens; it goes on holding copies of them.

    The graph finds the operators that stand for earlier tokens and for what only it knows of new ones (`runtime/recall.py`).
    """

    is_croppable = False

    def __init__(self, of: Remembered, held: tuple[Tensor, ...], before: Count) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.of, self.held, self.tokens = of, held, before

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        of, before, past = self.of, self.tokens, (torch.cat(self.held, dim=2),)
        told = [(one, trait(key_states, one, one.heads(of.heads))) for one in of.traits]
        k, v = (recall(x, x, past, before, of.latest, of.summed, told) for x in (key_states, value_states))  # type: ignore[arg-type]
        self.keys, self.values = (x.clone() for x in self.held)
        self.tokens = before + key_states.shape[-2]
        return k, v

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.tokens + query_length, 0  # type: ignore[return-value]

    def get_seq_length(self) -> int:
        return self.tokens  # type: ignore[return-value]

    def get_max_length(self) -> int:
        return -1
