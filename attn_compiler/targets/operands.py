"""The tensors of one call and where they stand: what every form of attention starts from."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attn_compiler.algebra import expr as e
from attn_compiler.algebra.expr import Expr, Sort, symbol
from attn_compiler.algebra.variant import Variant
from attn_compiler.targets.arrays import Arrays, Value
from attn_compiler.targets.rows import Codes

# A key's place along its axis, where its position is another: what a bias given as a tensor is read at.
PLACE = symbol("place", Sort.INDEX)

Positions = int | torch.SymInt | Tensor | None


@dataclass(frozen=True)
class Operands:
    """`q`, `k` and `v` as [batch, heads, tokens, dim]; `head_numbers` are the model's own numbers of the query heads.

    Positions are the number of the first one, a tensor [1 or batch, 1 or heads, tokens], or, for queries, None: the last
    query meets the last key.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    tables: Mapping[str, Tensor]
    q_positions: Positions
    k_positions: int | torch.SymInt | Tensor
    head_numbers: tuple[int, ...]
    heads: int
    kv_heads: int
    layer: int
    layers: int
    training: bool = False  # whether dropout is active
    differentiated: bool = False  # whether gradients will be asked for
    risky: frozenset[str] = frozenset()  # tables that may hold numbers in which a score vanishes, where gradients are wanted
    past: tuple[Tensor, ...] = ()  # states that stand for the tokens before the first key, one for each linear part
    unrotated: tuple[Tensor, Tensor] | None = None  # q and k before the rotary embedding
    codes: tuple[Codes, Codes] | None = None  # what k and v were decoded from, where a kernel may read that instead

    @property
    def q_len(self) -> int:
        return self.q.shape[-2]

    @property
    def k_len(self) -> int:
        return self.k.shape[-2]

    @property
    def first_query(self) -> int | torch.SymInt | None:
        """The position of the first of the queries, where these follow each other."""
        if self.q_positions is None:
            return None if isinstance(self.k_positions, Tensor) else self.k_positions + self.k_len - self.q_len
        return None if isinstance(self.q_positions, Tensor) else self.q_positions

    def counts_from_zero(self) -> bool:
        """Whether a key's position is its place along the key axis."""
        return isinstance(self.k_positions, int) and self.k_positions == 0

    def decoded(self) -> Operands:
        """The same call where k and v are what their codes mean."""
        return self if self.codes is None else replace(self, k=self.codes[0].decode(), v=self.codes[1].decode(), codes=None)

    def take(self, heads: Sequence[int]) -> Operands:
        """The same call for some of the query heads, which keep their numbers."""
        q_at, k_at = self.q_positions, self.k_positions
        return replace(
            self,
            q=pick(self.q, heads),
            k=self._of_keys(self.k, heads),
            v=self._of_keys(self.v, heads),
            q_positions=_pick_rows(q_at, heads) if isinstance(q_at, Tensor) else q_at,
            k_positions=_pick_rows(k_at, heads) if isinstance(k_at, Tensor) else k_at,
            head_numbers=tuple(self.head_numbers[head] for head in heads),
            unrotated=self.unrotated and (pick(self.unrotated[0], heads), self._of_keys(self.unrotated[1], heads)),
            codes=None,
        )

    def _of_keys(self, x: Tensor, heads: Sequence[int]) -> Tensor:
        """What belongs to some query heads of keys or values, of which agents bring one for each query head."""
        return pick(x, kv_owners(heads, self.heads // int(x.shape[1])))

    def of_query_heads(self, variant: Variant) -> Variant:
        """What a variant says, where keys are one for each query head: the kernels count the heads of keys that they get."""
        ratio = self.heads // self.kv_heads
        return variant if ratio == 1 else variant.map(lambda x: x.substitute({e.kv: e.h // ratio}))

    def before_rotation(self, which: Collection[str]) -> Operands:
        """The same call on q and k as they are before the rotary embedding, those of the two that are named."""
        if not which:
            return self
        assert self.unrotated is not None
        q, k = self.unrotated
        return replace(self, q=q if "q" in which else self.q, k=k if "k" in which else self.k)

    def arrays(self, real: torch.dtype) -> Arrays:
        """All that expressions may speak of, with axes [batch, heads, queries, keys]."""
        device = self.q.device
        i = torch.arange(self.q_len, device=device)[:, None]
        place = torch.arange(self.k_len, device=device)
        q_positions = self.q_positions[..., None] if isinstance(self.q_positions, Tensor) else None
        k_positions = self.k_positions
        at: dict[Expr, Value] = {
            **self.numbers(),
            e.b: torch.arange(self.q.shape[0], device=device)[:, None, None, None],
            e.i: i,
            e.q: i + self.first_query if q_positions is None and self.first_query is not None else self._given(q_positions),
            PLACE: place,
            e.k: k_positions[..., None, :] if isinstance(k_positions, Tensor) else place + k_positions,
            **self.head_coordinates(trailing=2),
        }
        whole = {e.b: 4, e.i: 2, PLACE: 1}
        if self.counts_from_zero():
            whole[e.k] = 1
            if isinstance(self.first_query, int) and self.first_query == 0:
                whole[e.q] = 2
        if self.head_numbers == tuple(range(self.heads)):
            whole[e.h] = 3
        return Arrays(at, self.tables, real, device, whole)

    def _given(self, q_positions: Tensor | None) -> Tensor:
        """The queries' positions, or else those of the last keys."""
        if q_positions is not None:
            return q_positions
        assert isinstance(self.k_positions, Tensor)
        return self.k_positions[..., self.k_len - self.q_len :, None]

    def numbers(self) -> dict[Expr, Value]:
        """The sizes that expressions may speak of."""
        return {
            e.heads: self.heads,
            e.q_len: self.q_len,
            e.k_len: self.k_len,
            e.dim: self.q.shape[-1],
            e.layer: self.layer,
            e.layers: self.layers,
        }

    def head_coordinates(self, trailing: int) -> dict[Expr, Value]:
        """`h` and `kv` as tensors with `trailing` axes of one behind that of the heads."""
        h = numbered(self.head_numbers, self.q.device).reshape(-1, *[1] * trailing)
        return {e.h: h, e.kv: h // (self.heads // self.kv_heads)}


def numbered(numbers: Sequence[int], device: torch.device) -> Tensor:
    """Numbers as a tensor that a trace computes: one made of a list would be a constant, which a fragment cannot hold."""
    if tuple(numbers) == tuple(range(numbers[0], numbers[0] + len(numbers))):
        return torch.arange(numbers[0], numbers[0] + len(numbers), device=device)
    return torch.cat([torch.arange(n, n + 1, device=device) for n in numbers])


def kv_owners(heads: Sequence[int], ratio: int) -> list[int]:
    """The kv heads that some query heads share; one for each of them where they do not share alike."""
    owners = [head // ratio for head in heads]
    kv = sorted(set(owners))
    return kv if owners == [x for x in kv for _ in range(len(heads) // len(kv))] else owners


def head_groups(variant: Variant, heads: int) -> tuple[tuple[tuple[int, ...], Variant], ...]:
    """Which query heads compute which variant; heads that no group names compute `variant` itself."""
    rest = set(range(heads))
    groups: list[tuple[tuple[int, ...], Variant]] = []
    for chosen, of_group in variant.groups:
        members = tuple(sorted(chosen.members(heads)))
        groups.append((members, of_group))
        rest.difference_update(members)
    groups.append((tuple(sorted(rest)), replace(variant, groups=())))
    return tuple((members, of_group) for members, of_group in groups if members)


def pick(x: Tensor, heads: Sequence[int]) -> Tensor:
    """Some heads of [batch, heads, …], a view where they follow each other; indexed by a list, a trace would hold a constant."""
    if list(heads) == list(range(heads[0], heads[0] + len(heads))):
        return x.narrow(1, heads[0], len(heads))
    return torch.stack([x[:, head] for head in heads], dim=1)


def _pick_rows(positions: Tensor, heads: Sequence[int]) -> Tensor:
    return positions if positions.shape[1] == 1 else pick(positions, heads)


def in_order(parts: list[Tensor] | tuple[Tensor, ...], order: Sequence[int]) -> Tensor:
    """What groups of heads have, [batch, heads, …] for heads in this order, with the heads in order."""
    joined = torch.cat(parts, dim=1)
    back = sorted(range(len(order)), key=order.__getitem__)
    return joined if back == list(range(len(order))) else torch.stack([joined[:, place] for place in back], dim=1)
