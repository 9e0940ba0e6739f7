"""Keys and values in few bits: what a cache holds, and what kernels for few queries read as it lies."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor

from attn_compiler import library
from attn_compiler.algebra.storage import Held, Storage
from attn_compiler.errors import ShapeError
from attn_compiler.planning.language import Scope
from attn_compiler.planning.storing import read_held
from attn_compiler.planning.yaml_text import entry_of
from attn_compiler.targets.rows import Codes, decoded, dim_of, encoded, objection, row_dtype, row_width

StorageLike = Held | str | Mapping[str, object]


def encode(x: Tensor, storage: StorageLike = "int8") -> Codes:
    """Hold keys or values [batch, heads, tokens, dim] as a policy's `kv_cache` would: `int8`, `{type: int4, per: block(64)}`.

    `attend` takes them for `k` and `v`. Rounded exactly as `attend` rounds keys and values of that storage.
    """
    held = _read(storage)
    reason = objection(held) or ("of two numbers in `largest`, give the one for these" if len(held.largest) > 1 else None)
    if reason:
        raise ShapeError(f"there are no codes in {held}: {reason}")
    if x.ndim != 4 or not x.dtype.is_floating_point:
        raise ShapeError(f"expected real numbers [batch, heads, tokens, dim]; found {x.dtype} {list(x.shape)}")
    return Codes(encoded(x, held), held, x.dtype)


def _read(storage: StorageLike) -> Held:
    return storage if isinstance(storage, Held) else read_held(entry_of(storage, "storage"), "kv_cache", library.words(), Scope())


def written(held: Held) -> str:
    """How codes are held, as a text for an operator."""
    return json.dumps(Storage(kv_cache=held).words())


@lru_cache(maxsize=64)
def held_of(text: str) -> Held:
    """What such a text says."""
    held = Storage.of(json.loads(text)).kv_cache
    assert held is not None
    return held


def _decoded(given: Tensor, how: str, dtype: torch.dtype) -> Tensor:
    return decoded(given, held_of(how), dtype)


def _decoded_shape(given: Tensor, how: str, dtype: torch.dtype) -> Tensor:
    return given.new_empty((*given.shape[:-1], dim_of(given.shape[-1], held_of(how))), dtype=dtype)


def _encoded(x: Tensor, how: str, operand: int = 0) -> Tensor:
    return encoded(x, held_of(how).of(operand))


def _encoded_shape(x: Tensor, how: str, operand: int = 0) -> Tensor:
    held = held_of(how)
    return x.new_empty((*x.shape[:-1], row_width(x.shape[-1], held)), dtype=row_dtype(held))


# In the graph of a model these two say what its cache holds, so that an attention may read that instead of what it means.
_library = torch.library.Library("attn_compiler", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("encoded(Tensor x, str how, int operand=0) -> Tensor")  # type: ignore[no-untyped-call]
_library.define("decoded(Tensor rows, str how, ScalarType dtype) -> Tensor")  # type: ignore[no-untyped-call]
_library.impl("encoded", _encoded, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
_library.impl("decoded", _decoded, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("attn_compiler::encoded", _encoded_shape, lib=_library)
torch.library.register_fake("attn_compiler::decoded", _decoded_shape, lib=_library)
