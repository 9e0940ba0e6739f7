"""Layers whose past is a state while they are traced: the graph knows gates, and keys before a rotation, of new tokens alone."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx, nn

from attn_compiler.algebra import wire
from attn_compiler.algebra.variant import Variant
from attn_compiler.errors import ExportError
from attn_compiler.export.called import WITH_STATE
from attn_compiler.export.program import traced
from attn_compiler.export.states import Remembering
from attn_compiler.generation.remembered import Remembered, remembered_at
from attn_compiler.graph.analysis import analyze
from attn_compiler.graph.calls import call
from attn_compiler.planning.plan import Decision, NearMiss, Plan
from attn_compiler.planning.planner import plan
from attn_compiler.planning.policy import Policy
from attn_compiler.planning.site import Kind, Site
from attn_compiler.runtime.call import operands_of
from attn_compiler.targets.exported import Call
from attn_compiler.targets.held_past import joined
from attn_compiler.targets.traits import empty, with_traits


def recalling(model: nn.Module, ids: Tensor, policy: Policy, given: Mapping[str, Tensor]) -> dict[int, Remembered]:
    """The layers, by their numbers, of whose past a policy needs a state alone, which is of more than keys and values.

    The model is looked at without a cache, where the graph knows all of each token.
    """
    if not any(_asks_for_operands(rule.attn.plain()) for rule in policy.rules):
        return {}
    program, found = traced(model, (), {"input_ids": ids, "use_cache": False}, None), list[Site]()

    def look(sites: Sequence[Site], near_misses: Sequence[NearMiss]) -> Plan:
        found.extend(sites)
        return plan([], policy, (), near_misses)

    analyze(program.graph_module, None, look)
    layers: dict[int, Remembered] = {}
    for site in found:
        state = remembered_at(policy, site, given) if site.kind is Kind.SELF and site.layer is not None else None
        if state and state.traits and not state.latest:
            layers[int(site.layer or 0)] = state
    return layers


def _asks_for_operands(written: object) -> bool:
    if isinstance(written, Mapping):
        return "operands" in written or any(map(_asks_for_operands, written.values()))
    return isinstance(written, list) and any(map(_asks_for_operands, written))


def state_of(of: Remembered, k: Tensor, v: Tensor) -> Tensor:
    """The state of a layer after tokens with these keys and values, as far as its shape goes."""
    nothing = k.new_empty((k.shape[0], of.heads, 0, k.shape[3]))
    operands = operands_of(nothing, k, v, Variant(), dict(of.tables), 0, 0, of.layer, of.layers, False)
    rows = [empty(one, k, one.heads(of.heads)) for one in of.traits]
    (state,) = joined(*with_traits(operands, wire.read(of.what), of.traits, rows), ())
    return torch.zeros_like(state)


def check_recalled(decisions: Sequence[Decision]) -> None:
    """Raise where an attention keeps its code although its past is a state."""
    left = [one for one in decisions if one.site.recalls and one.target is None]
    if left:
        reasons = " and ".join(refusal.reason for refusal in left[0].refusals)
        raise ExportError(
            f"{left[0].site.name}: a file that decodes holds the state that the policy asks for there, but {reasons}"
        )


def handed_on(graph: fx.Graph) -> dict[str, Remembering]:
    """Let what attentions leave in the places of states be handed on where a trace hands on copies of what it was given."""
    found = {}
    for node in [one for one in graph.find_nodes(op="call_function", target=WITH_STATE) if _past(one)]:
        operands, what = node.args
        past = _past(node)
        values = node.meta["val"]
        with graph.inserting_after(node):
            parts = [graph.call_function(operator.getitem, (node, place)) for place in (1, 2)]
        for part, x, held in zip(parts, values[1:], past, strict=True):
            part.meta = {**node.meta, "val": x}
            (copied,) = [user for user in held.users if any(one.op == "output" for one in user.users)]
            copied.replace_all_uses_with(part)
        node.args = ([*operands[:3], *past, *operands[5:]], what)
        _, heads, features, width = past[0].meta["val"].shape
        found[Call.read(what).name] = Remembering((str(past[0]), str(past[1])), (heads, features, width))
    graph.eliminate_dead_code()
    return found


def _past(node: fx.Node) -> tuple[fx.Node, ...]:
    """The inputs of the program that the two parts of a state were joined from; none where they are such inputs themselves."""
    read = call(call(node)["operands"][3])
    while read.op in ("slice", "same"):
        read = call(read["self"])
    return tuple(read["tensors"]) if read.op == "cat" else ()
