"""Reads operators that are an attention by themselves, SDPA and flex, as the same two products and steps as any other."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from attn_compiler.graph.bind import Anchor, Binding
from attn_compiler.graph.calls import Argument, call, dtype, shape
from attn_compiler.graph.chain import Path
from attn_compiler.graph.contraction import Contraction, Label, Side
from attn_compiler.graph.mutation import Versions
from attn_compiler.graph.record import SCORE, GraphSite, Operand, Step

aten = torch.ops.aten


def bind_sdpa(node: fx.Node, versions: Versions) -> GraphSite:
    """Read a call of `scaled_dot_product_attention`."""
    read = call(node)
    q, k, v, mask = (read[name] for name in ("query", "key", "value", "attn_mask"))
    steps = [_scaled(node, q, read["scale"])]
    if mask is not None and dtype(mask) is torch.bool:
        steps.append(Step(aten.where.ScalarOther, {"condition": mask, "self": SCORE, "other": -torch.inf}, node))
    elif mask is not None:
        steps.append(Step(aten.add.Tensor, {"self": SCORE, "other": mask, "alpha": 1}, node))
    after = (
        (Step(aten.dropout.default, {"input": SCORE, "p": read["dropout_p"], "train": True}, node),) if read["dropout_p"] else ()
    )
    site = _bound(node, (q, k, v), tuple(steps), after, versions, shares_heads=bool(read["enable_gqa"]))
    return replace(site, idiom="sdpa", causal=bool(read["is_causal"]), empty_rows_are_zero=True)


def bind_flex(node: fx.Node, versions: Versions) -> GraphSite:
    """Read the flex operator; its functions and block mask stay with the anchor (`site.anchor.args`)."""
    q, k, v = node.args[:3]
    assert isinstance(q, fx.Node)
    assert isinstance(k, fx.Node)
    site = _bound(node, (q, k, v), (_scaled(node, q, node.args[5]),), (), versions, shares_heads=shape(q)[-3] != shape(k)[-3])
    out = next((user for user in node.users if call(user).op == "item" and call(user)["other"] == 0), node)
    others = tuple(user for user in node.users if user is not out and user.users)
    return replace(site, idiom="flex", out=Operand(out, site.out.axes), empty_rows_are_zero=True, escapes=others)


def _scaled(node: fx.Node, q: fx.Node, scale: Argument) -> Step:
    depth = shape(q)[-1]
    return Step(aten.mul.Tensor, {"self": SCORE, "other": depth**-0.5 if scale is None else scale}, node)


def _bound(
    node: fx.Node,
    operands: tuple[Argument, Argument, Argument],
    steps: tuple[Step, ...],
    after: tuple[Step, ...],
    versions: Versions,
    *,
    shares_heads: bool,
) -> GraphSite:
    q, k, v = operands
    outer: tuple[Label, ...] = tuple(range(len(shape(q)) - 2))
    scores = Contraction(node, Side(q, (*outer, "i", "d")), Side(k, (*outer, "j", "d")), (*outer, "i", "j"), steps)
    result = Contraction(node, Side(node, (*outer, "i", "j")), Side(v, (*outer, "j", "w")), (*outer, "i", "w"), after)
    anchor = Anchor(node, node, -1, node)
    binding = Binding(anchor, Path(steps, scores), Path(after, result, last=node), versions, shares_heads=shares_heads)
    return binding.site()
