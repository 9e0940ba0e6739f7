"""Applies feature maps: the same call with q and k mapped, and a variant that has no map any more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from attn_compiler.algebra import expr as e
from attn_compiler.algebra import feature as f
from attn_compiler.algebra.expr import Sort
from attn_compiler.algebra.feature import IDENTITY, Block
from attn_compiler.algebra.variant import Variant
from attn_compiler.errors import TableError
from attn_compiler.targets.arrays import Arrays, Value
from attn_compiler.targets.operands import Operands, kv_owners, numbered


def featured(operands: Operands, variant: Variant, real: torch.dtype) -> tuple[Operands, Variant]:
    """The call of a variant without groups and branches where q and k are features, computed in `real`."""
    if variant.feature.is_identity:
        return operands, variant
    q, k, v = (x.to(real) for x in (operands.q, operands.k, operands.v))
    if any(block.weights is not None and block.weights.mentions(e.h) for block in variant.feature.of_k):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    of_q = _Mapping(operands, operands.head_numbers, real)
    kv = kv_owners(operands.head_numbers, operands.heads // operands.kv_heads)
    of_k = of_q if k.shape[1] == q.shape[1] else _Mapping(operands, kv, real, of_keys=True)
    known = {e.dim: e.const(int(q.shape[-1]))}
    plain = replace(variant.map(lambda x: x.substitute(known)), feature=IDENTITY)
    return replace(operands, q=of_q.mapped(q, variant.feature.of_q), k=of_k.mapped(k, variant.feature.of_k), v=v), plain


class _Mapping:
    """Maps the vectors of some heads; those of keys have the numbers of kv heads."""

    def __init__(self, operands: Operands, numbers: Sequence[int], real: torch.dtype, *, of_keys: bool = False) -> None:
        self.operands, self.numbers, self.real, self.of_keys = operands, tuple(numbers), real, of_keys

    def mapped(self, x: Tensor, blocks: Sequence[Block]) -> Tensor:
        parts = [self._block(x, block) for block in blocks]
        return torch.cat([part.expand(*x.shape[:-1], part.shape[-1]) for part in parts], dim=-1) if parts else x

    def _block(self, x: Tensor, block: Block) -> Tensor:
        dim = x.shape[-1]
        numbers = x if block.weights is None else x @ self._weights(block.weights, dim)
        numbers = _power(numbers, block.power)
        arrays = self._arrays({})
        known: dict[e.Expr, Value] = {f.x: numbers}
        if block.each.mentions(f.norm):
            known[f.norm] = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        mapped = arrays.tensor(arrays.read(block.each, known), Sort.REAL).expand(numbers.shape)
        return mapped.softmax(dim=-1) if block.softmax else mapped

    def _weights(self, weights: e.Expr, dim: int) -> Tensor:
        stored = self.operands.tables[str(weights.value)]
        if stored.ndim < 2 or stored.shape[-2] != dim:
            raise TableError(
                f'the table "{weights.value}" maps vectors of {dim} numbers, so it is [..., {dim}, features]; '
                f"found {list(stored.shape)}"
            )
        device = stored.device
        places = {
            f.component: torch.arange(dim, device=device)[:, None],
            f.feature: torch.arange(stored.shape[-1], device=device),
        }
        arrays = self._arrays(places)
        return arrays.tensor(arrays.read(weights), Sort.REAL)

    def _arrays(self, places: Mapping[e.Expr, Value]) -> Arrays:
        """What maps may speak of, with axes [heads, tokens or components, features]."""
        operands = self.operands
        device = operands.q.device
        of_heads = operands.head_coordinates(trailing=2)
        if self.of_keys:
            of_heads = {e.kv: numbered(self.numbers, device).reshape(-1, 1, 1)}
        symbols = {**operands.numbers(), **of_heads, **places}
        counted = self.numbers == tuple(range(len(self.numbers)))
        at = {f.component: 2, f.feature: 1} | ({e.kv if self.of_keys else e.h: 3} if counted else {})
        return Arrays(symbols, operands.tables, self.real, device, {x: n for x, n in at.items() if x in symbols})


def _power(x: Tensor, power: int) -> Tensor:
    """All products of so many components."""
    if power == 0:
        return x.new_ones((1,) * x.ndim)
    products = x
    for _ in range(power - 1):
        products = (products[..., :, None] * x[..., None, :]).flatten(-2)
    return products
