"""What else computes an attention on a GPU: PyTorch's kernels, and libraries where they are installed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import attn_compiler as attn
from _gpu_shapes import Shape

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


class UnsuitableError(Exception):
    """A peer that has no way to say what a shape asks for."""


def attentions(shape: Shape, device: str) -> Mapping[str, Attention]:
    """Ours first, then all others: dense ones compute more than was asked for where most pairs are hidden."""
    peers = {
        "ours": ours,
        "apart": apart,
        "cuDNN": dense_by(SDPBackend.CUDNN_ATTENTION),
        "flash": dense_by(SDPBackend.FLASH_ATTENTION),
        "flex": flex,
        "flex, FLASH": lambda *given: flex(*given, kernel_options={"BACKEND": "FLASH"}),
        "NATTEN": natten,
        "FLA": fla,
        "SageAttention": sage,
        "xFormers": xformers,
    }
    tables = {name: make(shape.length).to(device) for name, make in shape.tables.items()}
    return {name: (lambda q, k, v, peer=peer: peer(shape, tables, q, k, v)) for name, peer in peers.items()}


def ours(shape: Shape, tables: Mapping[str, Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    given = (k, v) if shape.cache is None else (_codes(k, shape.cache), _codes(v, shape.cache))
    return attn.attend(q, *given, shape.held, tables=tables, target="triton")  # type: ignore[arg-type,return-value]


@lru_cache(maxsize=2)
def _codes(x: Tensor, how: str) -> attn.Codes:
    """What a cache holds before anything is timed."""
    return attn.encode(x, how)


def apart(shape: Shape, _: object, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Heads of each kind in a call of their own, as if nobody knew how to launch them together."""
    needs(bool(shape.apart))
    found = []
    for heads, variant in shape.apart.items():
        some = slice(*map(int, heads.split(":")))
        found.append(attn.attend(q[:, some], k[:, some], v[:, some], variant, target="triton"))  # type: ignore[arg-type]
    return torch.cat(found, 1)  # type: ignore[arg-type]


def dense_by(backend: SDPBackend) -> Callable[..., Tensor]:
    def run(shape: Shape, _: object, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=shape.queries is None, enable_gqa=q.shape[1] != k.shape[1])

    return run


@cache
def _compiled(device: str) -> Callable[..., Any]:
    return torch.compile(flex_attention) if device == "cuda" else flex_attention


@cache
def _blocks(shape_name: str, sees: Callable[[Tensor, Tensor], Tensor], q_len: int, k_len: int, device: str) -> object:
    return create_block_mask(lambda b, h, i, j: sees(i, j), None, None, q_len, k_len, device=device)


def flex(shape: Shape, _: object, q: Tensor, k: Tensor, v: Tensor, **more: object) -> Tensor:
    needs(shape.sees is not None and (not more or q.device.type == "cuda"))
    blocks = _blocks(shape.name, shape.sees, q.shape[2], k.shape[2], q.device.type)  # type: ignore[arg-type]
    return _compiled(q.device.type)(q, k, v, block_mask=blocks, enable_gqa=q.shape[1] != k.shape[1], **more)  # type: ignore[no-any-return]


def natten(shape: Shape, _: object, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    needs(shape.grid is not None)
    import natten  # type: ignore[import-not-found]

    kernel, side = shape.grid  # type: ignore[misc]
    q, k, v = (x.transpose(1, 2).unflatten(1, (side, side)) for x in (q, k, v))
    return natten.na2d(q, k, v, kernel_size=(kernel, kernel)).flatten(1, 2).transpose(1, 2)  # type: ignore[no-any-return]


@lru_cache(maxsize=1)
def _steps(running: Tensor) -> Tensor:
    """The logs of single tokens' gates, as FLA takes them: made before anything is timed."""
    return running.diff(dim=2, prepend=running[:, :, :1]).transpose(1, 2).float().contiguous()


def fla(shape: Shape, tables: Mapping[str, Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    needs(shape.window == 0 or bool(shape.linear))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if shape.linear == "retention":
        from fla.ops.retention import chunk_retention  # type: ignore[import-not-found]

        out, _ = chunk_retention(q, k, v)
    elif shape.linear == "gla":
        from fla.ops.gla import chunk_gla  # type: ignore[import-not-found]

        out, _ = chunk_gla(q, k, v, _steps(tables["gate"]), scale=shape.dim**-0.5)
    elif shape.linear:
        from fla.ops.linear_attn import chunk_linear_attn  # type: ignore[import-not-found]

        out, _ = chunk_linear_attn(F.elu(q) + 1, F.elu(k) + 1, v, scale=1.0)
    else:
        from fla.ops.attn import parallel_attn  # type: ignore[import-not-found]

        out = parallel_attn(q, k, v)
    return out.transpose(1, 2)  # type: ignore[no-any-return]


def sage(shape: Shape, _: object, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """With codes of eight bits, so it is less exact than all others."""
    needs(shape.window == 0 and not q.requires_grad)
    from sageattention import sageattn  # type: ignore[import-not-found]

    return sageattn(q, k, v, tensor_layout="HND", is_causal=True)  # type: ignore[no-any-return]


def xformers(shape: Shape, _: object, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    needs(shape.window is not None)
    from xformers.ops import LowerTriangularMask, memory_efficient_attention  # type: ignore[import-not-found]

    mask = LowerTriangularMask()
    mask = mask.make_local_attention(shape.window) if shape.window else mask
    return memory_efficient_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_bias=mask).transpose(1, 2)  # type: ignore[no-any-return]


def needs(suits: bool) -> None:
    if not suits:
        raise UnsuitableError
