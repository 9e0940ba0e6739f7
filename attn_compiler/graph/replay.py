"""Computes sites from their records alone, densely and in plain torch: the proof that a record says all there is to say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from attn_compiler.graph.atom import Atom, Axis
from attn_compiler.graph.record import SCORE, GraphSite, Operand, Step, StepArgument


class Replay(fx.Interpreter):
    """Runs a captured graph, but computes every one of `sites` from its record."""

    def __init__(self, gm: fx.GraphModule, sites: Sequence[GraphSite]) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self._sites = {site.out.node: site for site in sites}

    def run_node(self, n: fx.Node) -> Any:
        return dense(self._sites[n], self.env) if n in self._sites else super().run_node(n)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        # A view takes for granted how its tensor lies in memory, and a site's output may lie in another way.
        target = torch.ops.aten.reshape.default if target is torch.ops.aten.view.default else target
        return super().call_function(target, args, kwargs)


def dense(site: GraphSite, values: dict[fx.Node, Any]) -> Tensor:
    """The output of `site`, given the values of the nodes before it."""
    layout = _Layout(values, _sizes(site, values))
    scores = (*site.batch, *site.heads, *site.queries, *site.keys)
    q = layout.spread(site.q, (*site.batch, *site.heads, *site.queries), site.depth)
    k = layout.spread(site.k, (*site.batch, *site.heads, *site.keys), site.depth)
    v = layout.spread(site.v, (*site.batch, *site.heads, *site.keys), site.width)
    rows, columns = len(site.queries), len(site.keys)
    q, k, v = (x.flatten(-1 - tokens, -2) for x, tokens in ((q, rows), (k, columns), (v, columns)))
    score = _run(site.steps, layout.split(q @ k.mT, site), layout, scores, site)
    weights = _weights(site, score.flatten(-columns).flatten(-1 - rows, -2))
    weights = _run(site.after, layout.split(weights, site), layout, scores, site)
    out = weights.flatten(-columns).flatten(-1 - rows, -2) @ v
    return layout.gathered(out, (*site.batch, *site.heads, *site.queries, *site.width), site.out)


def _weights(site: GraphSite, score: Tensor) -> Tensor:
    if site.causal:
        score = score.masked_fill(~torch.ones(score.shape[-2:], dtype=torch.bool, device=score.device).tril(), -torch.inf)
    weights = score.softmax(-1, dtype=site.softmax_dtype)
    if site.empty_rows_are_zero:
        weights = weights.nan_to_num(0.0)
    if site.extra is None:
        return weights
    return weights[..., : -site.extra] if _columns_come_last(site) else weights[..., site.extra :]


def _columns_come_last(site: GraphSite) -> bool:
    tensors = next(step for step in site.steps if step.op == "cat").arguments["tensors"]
    return isinstance(tensors, tuple) and tensors[0] is SCORE


def _run(steps: tuple[Step, ...], score: Tensor, layout: _Layout, axes: Axis, site: GraphSite) -> Tensor:
    for step in steps:
        score = layout.beside(step, score, axes, site) if step.op == "cat" else step.run(partial(layout.value, score, axes))
    return score


@dataclass(frozen=True)
class _Layout:
    values: dict[fx.Node, Any]
    sizes: dict[Atom, int]

    def value(self, score: Tensor, axes: Axis, argument: StepArgument) -> object:
        if isinstance(argument, Operand):
            return self.spread(argument, axes)
        return self.values[argument] if isinstance(argument, fx.Node) else score if argument is SCORE else argument

    def spread(self, operand: Operand, axes: Axis, last: Axis | None = None) -> Tensor:
        """One dimension per atom of `axes`, then, if given, one for all of `last`."""
        x: Tensor = self.values[operand.node]
        have = [atom for axis in operand.axes for atom in axis]
        order = (*axes, *(last or ()))
        x = x.reshape([self.sizes[atom] for atom in have]).permute([have.index(atom) for atom in order if atom in have])
        for place, atom in enumerate(order):
            if atom not in have:
                x = x.unsqueeze(place)
        return x if last is None else x.flatten(-len(last))

    def split(self, score: Tensor, site: GraphSite) -> Tensor:
        """[..., queries, keys] with one dimension per atom."""
        return score.reshape(*score.shape[:-2], *(self.sizes[atom] for atom in (*site.queries, *site.keys)))

    def beside(self, step: Step, score: Tensor, axes: Axis, site: GraphSite) -> Tensor:
        """The scores with columns beside them; the key axis is one dimension from here on."""
        tensors = step.arguments["tensors"]
        assert isinstance(tensors, tuple)
        score = score.flatten(-len(site.keys))
        column = next(x for x in tensors if isinstance(x, Operand))
        rows = axes[: -len(site.keys)]
        extra = self.spread(Operand(column.node, column.axes), rows).unsqueeze(-1).expand(*score.shape[:-1], site.extra or 1)
        return torch.cat([score if x is SCORE else extra.to(score.dtype) for x in tensors], -1)

    def gathered(self, out: Tensor, have: Axis, target: Operand) -> Tensor:
        """From one dimension per atom to the dimensions of the node that is replaced."""
        want = [atom for axis in target.axes for atom in axis]
        kept = [atom for atom in have if atom in want]
        out = out.reshape([self.sizes[atom] for atom in kept]).permute([kept.index(atom) for atom in want])
        shape = [math.prod(self.sizes[atom] for atom in axis) for axis in target.axes]
        dtype: torch.dtype = target.node.meta["val"].dtype
        return out.reshape(shape).to(dtype)


def _sizes(site: GraphSite, values: dict[fx.Node, Any]) -> dict[Atom, int]:
    """The sizes of all atoms, symbolic ones read off the tensors that have them."""
    sizes: dict[Atom, int] = {}
    for operand in (site.q, site.k, site.v):
        for axis, size in zip(operand.axes, values[operand.node].shape, strict=True):
            sizes.update((atom, atom.size) for atom in axis if isinstance(atom.size, int))
            hidden = [atom for atom in axis if atom not in sizes]
            if len(hidden) == 1:
                sizes[hidden[0]] = int(size) // math.prod(sizes[atom] for atom in axis if atom is not hidden[0])
    for atom in (*site.batch, *site.heads, *site.queries, *site.keys, *site.depth, *site.width):
        sizes.setdefault(atom, int(atom.size))
    return sizes
