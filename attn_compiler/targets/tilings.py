"""Which heads of an exported attention meet tiles of keys from a list, where all lengths are known: what costs least."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from attn_compiler.algebra.expr import Expr
from attn_compiler.algebra.integers import IntegerSet
from attn_compiler.algebra.variant import EmptyRows, Variant
from attn_compiler.targets.arrangement import Layout
from attn_compiler.targets.blocks import near_or_whole, pays
from attn_compiler.targets.exported import Spec
from attn_compiler.targets.operands import Operands, head_groups
from attn_compiler.targets.reach import reach
from attn_compiler.targets.tiled import Tiling, batched_cost, tiled, tiling
from attn_compiler.targets.walk import Contents, Walk, walks

LISTING = 1.5  # what a pair of gathered tiles costs beside one of all pairs, with some to spare

Who = tuple[tuple[int, ...], Expr]  # heads, and the mask that they follow


@dataclass(frozen=True)
class Tilings:
    """A variant whose heads are grouped by what they visit, and the lists of those for whom lists pay."""

    variant: Variant
    lists: Mapping[Who, Tiling]

    def lay_out(self, operands: Operands, variant: Variant, real: torch.dtype) -> Layout:
        """Tiles from a list where there is one."""
        by = self.lists.get((operands.head_numbers, variant.mask))
        return tiled(operands, real, by) if by else near_or_whole(operands, variant, real)

    def tensors(self) -> list[torch.Tensor]:
        """Those of all lists."""
        return [x for one in self.lists.values() for x in one.tensors()]

    def of(self, tensors: Sequence[torch.Tensor]) -> Tilings:
        """The same, made of what a trace knows of each."""
        rest = iter(tensors)
        lists = {who: one.of([next(rest) for _ in one.tensors()]) for who, one in self.lists.items()}
        return replace(self, lists=lists)


def tilings(spec: Spec, contents: Contents) -> Tilings:
    """Look at every group of heads, and at every branch of what it computes."""
    variant = spec.call.variant
    found = [one for heads, own in head_groups(variant, spec.heads) for one in _of_group(spec, heads, own, contents)]
    lists = {(heads, part.mask): one for heads, _, own in found for part, one in own}
    if not lists:
        return Tilings(variant, {})
    groups = tuple((IntegerSet.parse(", ".join(map(str, heads))), own) for heads, own, _ in found)
    return Tilings(replace(variant, groups=groups) if len(groups) > 1 else variant, lists)


Group = tuple[tuple[int, ...], Variant, list[tuple[Variant, Tiling]]]


def _of_group(spec: Spec, heads: Sequence[int], variant: Variant, contents: Contents) -> Iterator[Group]:
    """Heads that are laid out together, what they compute, and the lists of its parts."""
    parts = [variant] if variant.mix is None else [branch for _, branch in variant.mix.branches]
    walked = {part: walks(spec, heads, part, contents) if _can(spec, part) else [] for part in parts}
    if variant.mix is None and len(walked[variant]) > 1:
        for members, walk in walked[variant]:
            yield members, variant, _listed(spec, variant, walk)
    else:
        alone = [(part, found[0][1]) for part, found in walked.items() if len(found) == 1]
        yield tuple(heads), variant, [one for part, walk in alone for one in _listed(spec, part, walk)]


def _listed(spec: Spec, variant: Variant, walk: Walk) -> list[tuple[Variant, Tiling]]:
    q_len, k_len = spec.q_len, spec.k_len
    assert isinstance(q_len, int)
    assert isinstance(k_len, int)
    if batched_cost(walk) * LISTING > _otherwise(variant, q_len, k_len):
        return []
    return [(variant, tiling(walk, q_len, k_len))]


def _otherwise(variant: Variant, q_len: int, k_len: int) -> int:
    """Pairs that are computed without a list."""
    within = reach(variant.mask)
    block = pays(within, q_len, k_len) if within and within.width >= 0 else None
    return q_len * (k_len if within is None or block is None else within.prefix + within.width + block)


def _can(spec: Spec, variant: Variant) -> bool:
    """Whether lengths are known, and queries can do with some of the keys."""
    if not isinstance(spec.q_len, int) or not isinstance(spec.k_len, int) or spec.first is None:
        return False
    if variant.storage.pv and variant.storage.pv.numbers.block:
        return False
    return variant.empty_rows is EmptyRows.ZERO or spec.always_sees(variant)
