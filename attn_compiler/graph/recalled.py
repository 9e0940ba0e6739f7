"""Finds keys of whose past only states are left, and asked traits, by the operators that stand for them (`runtime/recall.py`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import SymInt, fx

from attn_compiler.algebra.variant import Variant
from attn_compiler.graph.axes import rearranges, repeats, source
from attn_compiler.graph.calls import Argument, call, is_tensor
from attn_compiler.graph.record import GraphSite, Operand
from attn_compiler.targets.operands import Operands
from attn_compiler.targets.traits import traits, with_traits


@dataclass(frozen=True)
class Recalled:
    """The states, how many places in front of the keys that are here stand for what they remember, and how many are promised.

    `summed` says what the states are sums of, `traits` are rows of the keys that are here.
    """

    past: tuple[fx.Node, ...]
    before: Argument  # a number, or the node of one
    latest: int
    summed: str
    traits: Mapping[str, fx.Node] = field(default_factory=dict)

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """What a computation has to be given of this."""
        return (*self.past, *self.traits.values(), *((self.before,) if isinstance(self.before, fx.Node) else ()))

    def count(self, operands: Operands, values: Sequence[Argument]) -> int | SymInt:
        """How many tokens there are."""
        return operands.k_len

    def stand(self, operands: Operands, variant: Variant, values: Sequence[Argument]) -> tuple[Operands, Variant]:
        """The same call with the keys that are here alone; `values` begin with those of `nodes`."""
        count, known = len(self.past), len(self.past) + len(self.traits)
        before = values[known] if isinstance(self.before, fx.Node) else self.before
        k, v = operands.k[:, :, before:], operands.v[:, :, before:]
        standing = replace(operands, k=k, v=v, q_positions=None, k_positions=before, past=tuple(values[:count]))
        return with_traits(standing, variant, traits(variant), tuple(values[count:known])) if self.traits else (standing, variant)


def recalled(site: GraphSite) -> Recalled | None:
    """What a site's keys recall; None where all of them are there."""
    reads = [call(node) for node in recalls(site)]
    if len(reads) != 2:
        return None
    read = reads[0]
    told = dict(zip(read["names"], read["traits"], strict=True))
    return Recalled(tuple(read["past"]), read["before"], read["latest"], read["summed"], told)


def recalls(site: GraphSite) -> tuple[fx.Node, ...]:
    """The operators that stand for the earlier keys and values of a site."""
    return tuple(node for node in map(_recall, (site.k, site.v)) if node is not None)


def _recall(operand: Operand) -> fx.Node | None:
    node = operand.node
    while is_tensor(node) and (rearranges(node) or repeats(node) or call(node).op in ("cast", "same")):
        node = source(node)
    return node if call(node).op == "recall" else None


def trait_nodes(site: GraphSite) -> tuple[fx.Node, ...]:
    """What a cache asks of the tokens whose keys are new at a site."""
    node = site.k.node
    while not (found := tuple(user for user in node.users if call(user).op == "trait")):
        if call(node).op == "recall":
            node = call(node)["new"]
        elif is_tensor(node) and (rearranges(node) or repeats(node) or call(node).op in ("cast", "same")):
            node = source(node)
        else:
            break
    return found


def forget(graph: fx.Graph, recalls: Iterable[fx.Node]) -> None:
    """Let zeros take the places of what was recalled, which nobody reads once a state has met the queries."""
    for node in dict.fromkeys(recalls):
        read = call(node)
        with graph.inserting_before(node):
            padding = [0, 0, read["before"], 0]
            zeros = graph.call_function(torch.ops.aten.constant_pad_nd.default, (read["here"], padding, 0.0))
        zeros.meta.update(node.meta)
        node.replace_all_uses_with(zeros)
        graph.erase_node(node)
