"""Moves tensors between the layout their model gave them and [batch, heads, tokens, dim], whatever atoms these are made of."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import Tensor

from attn_compiler.graph.atom import Atom, Axes, Axis
from attn_compiler.graph.calls import Size


def arranged(x: Tensor, axes: Axes, groups: Axes) -> Tensor:
    """`x`, whose dimensions are made of `axes`, with one dimension per group of atoms; absent atoms are broadcast."""
    wanted = [atom for group in groups for atom in group]
    present = [atom for axis in axes for atom in axis if atom in wanted]
    x = _split(x, axes, present)
    order = [present.index(atom) for atom in wanted if atom in present]
    if order != sorted(order):
        x = x.permute(order)
    if len(present) < len(wanted):
        for place, atom in enumerate(wanted):
            if atom not in present:
                x = x.unsqueeze(place)
    return _merge(x, groups, present)


def returned(x: Tensor, groups: Axes, axes: Axes) -> Tensor:
    """The way back: `x` has one dimension per group; those of the result are made of `axes`."""
    wanted = [atom for axis in axes for atom in axis]
    present = [atom for group in groups for atom in group if atom in wanted]
    x = _split(x, groups, present)
    order = [present.index(atom) for atom in wanted]
    if order != sorted(order):
        x = x.permute(order)
    return _joined(x, axes)


def _split(x: Tensor, axes: Axes, kept: Iterable[Atom]) -> Tensor:
    """One dimension per kept atom; all others have one place and vanish."""
    kept = set(kept)
    parts = [tuple(atom for atom in axis if atom in kept) for axis in axes]
    if all(len(part) == 1 for part in parts):
        return x
    sizes = ((own,) if len(part) == 1 else (atom.size for atom in part) for part, own in zip(parts, x.shape, strict=True))
    return x.reshape(_sizes(size for split in sizes for size in split))


def _merge(x: Tensor, groups: Axes, present: list[Atom]) -> Tensor:
    """One dimension per group, of which `x` has one per atom; a group with no atom of its own stays as long as it is."""
    if all(len(group) == 1 for group in groups):
        return x
    shared = [any(atom in present for atom in group) for group in groups]
    missing = [of and atom not in present for group, of in zip(groups, shared, strict=True) for atom in group]
    atoms = [atom for group in groups for atom in group]
    if any(missing):
        x = x.expand([atom.size if repeated else -1 for atom, repeated in zip(atoms, missing, strict=True)])
    return _joined(x, groups)


def _joined(x: Tensor, axes: Axes) -> Tensor:
    """One dimension for each of `axes`, of which `x` has one per atom.

    The sizes are those of `x`: a product of two formulas need not be one that can be recorded.
    """
    if all(len(axis) == 1 for axis in axes):
        return x
    own = iter(x.shape)
    return x.reshape(_sizes(math.prod(next(own) for _ in axis) for axis in axes))


def _sizes(sizes: Iterable[Size]) -> list[Size]:
    """Sizes for a reshape; a single symbolic one is left to the reshape to work out, so that it needs no node of its own."""
    known = list(sizes)
    symbolic = [place for place, size in enumerate(known) if not isinstance(size, int)]
    if len(symbolic) == 1:
        known[symbolic[0]] = -1
    return known


def kv_groups(axes: Axes, batch: Axis, kv_heads: Axis, tokens: Axis, dim: Axis) -> Axes:
    """How k or v is laid out for an operator that shares heads: its own head atoms only."""
    own = {atom for axis in axes for atom in axis}
    return (batch, tuple(atom for atom in kv_heads if atom in own), tokens, dim)
