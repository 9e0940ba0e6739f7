"""Lets states take the places of the caches that linear attentions read: no length changes their size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import fx

from attn_compiler.algebra.variant import Variant
from attn_compiler.export.caches import cache_of, stand_in
from attn_compiler.export.called import EXPORTED, WITH_STATE
from attn_compiler.graph.calls import call
from attn_compiler.runtime.call import operands_of
from attn_compiler.targets.exported import Call
from attn_compiler.targets.past import remembered


@dataclass(frozen=True)
class Remembering:
    """The inputs that were the keys and the values of a cache, and the shape of the state that they are now, for one row."""

    inputs: tuple[str, str]
    shape: tuple[int, int, int]

    def __str__(self) -> str:
        heads, features, width = self.shape
        return f"the state of a linear attention, {features + 1} x {width} numbers for each of {heads} heads"


def remember(graph: fx.Graph, variants: Mapping[str, Variant]) -> dict[str, Remembering]:
    """Let each attention that is named hold a state, if nobody else reads its cache."""
    found = {}
    for node in graph.find_nodes(op="call_function", target=EXPORTED):
        what = Call.read(node.args[1])
        caches = [cache_of(node, x) for x in node.args[0][1:3]]
        if what.name in variants and what.ends_together and None not in caches:
            found[what.name] = _remember(graph, node, [x for x in caches if x], replace(what, remembers=True))
    graph.eliminate_dead_code()
    return found


def _remember(graph: fx.Graph, node: fx.Node, caches: list[fx.Node], what: Call) -> Remembering:
    given, _, _, *tables = call(node)["operands"]
    past, new = zip(*(call(x)["tensors"] for x in caches), strict=True)
    heads, features, width = shape = _shape(what, [x.meta["val"] for x in (given, *new, *tables)])
    for x, rows in zip(past, (features, 1), strict=True):
        held = x.meta["val"]
        real = torch.promote_types(held.dtype, torch.float32)
        x.meta["val"] = held.new_empty((held.shape[0], heads, rows, width), dtype=real)
    values = [node.meta["val"], *(x.meta["val"] for x in past)]
    stand_in(graph, (node, *caches), WITH_STATE, ([given, *new, *past, *tables], what.write()), values)
    return Remembering((str(past[0]), str(past[1])), shape)


def _shape(what: Call, operands: list[torch.Tensor]) -> tuple[int, int, int]:
    """Heads, features and the width of a state, which one token has already."""
    q, k, v = (torch.zeros(1, x.shape[1], 1, x.shape[3]) for x in operands[:3])
    tables = {name: torch.zeros([int(n) for n in x.shape]) for name, x in zip(what.tables, operands[3:], strict=True)}
    given = operands_of(q, k, v, what.variant, tables, 0, 0, what.layer, what.layers, False)
    _, heads, rows, width = remembered(given, what.variant, None).shape
    return heads, rows - 1, width
