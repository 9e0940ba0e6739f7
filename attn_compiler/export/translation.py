"""From a rewritten program to an ONNX model: the exporter of PyTorch for all but the attentions, whose functions are ours."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import onnx_ir as ir
import torch
from torch import Tensor
from torch.export import ExportedProgram

from attn_compiler import torch_private as private
from attn_compiler.algebra import wire
from attn_compiler.export.constants import known_value
from attn_compiler.export.program import Rewritten
from attn_compiler.graph.rewrite import splice
from attn_compiler.planning.formula import formulas, whole
from attn_compiler.planning.plan import Decision
from attn_compiler.planning.table_values import TableValues
from attn_compiler.targets.onnx.choice import Likely, choose
from attn_compiler.targets.onnx.function import DOMAIN, OPSET, function
from attn_compiler.targets.onnx.spec import Call, Spec, Stored, length, shape_of
from attn_compiler.targets.onnx.walk import Contents

EXPORTED = torch.ops.attn_compiler.exported.default


@dataclass(frozen=True)
class Translated:
    """The model, and which body each of its attentions got, by name."""

    model: ir.Model
    strategies: Mapping[str, str]


def translated(rewritten: Rewritten, wanted: str) -> Translated:
    """The model, with a labelled local function for each attention that was rewritten."""
    contents = dict(_contents(rewritten.program))
    specs = dict(_called(rewritten.program))
    exported = torch.onnx.export(rewritten.program, (), dynamo=True, opset_version=OPSET, verbose=False)
    assert exported is not None
    model: ir.Model = exported.model
    strategies = {}
    for name, spec in specs.items():
        decision = rewritten.plan.decisions[rewritten.names.index(name)]
        likely = Likely(decision.site.q_hint, decision.site.k_hint)
        strategies[name] = choose(spec, likely, contents[name], wanted)
        made = function(spec, strategies[name], contents[name])
        made.metadata_props.update(_metadata(spec, strategies[name], decision))
        model.functions[made.identifier()] = made
    if specs:
        model.opset_imports[DOMAIN] = 1
    return Translated(model, strategies)


def _called(program: ExportedProgram) -> Iterator[tuple[str, Spec]]:
    """Let each attention be a call of its function, as PyTorch's exporter writes one."""
    graph = program.graph
    for node in graph.find_nodes(op="call_function", target=EXPORTED):
        operands, what = node.args
        call = Call.read(what)
        values = [x.meta["val"] for x in operands]
        splice(graph, node, private.retrace(partial(_symbolic, call.name), values), operands)
        yield call.name, _spec(call, values)
    program.graph_module.recompile()


def _symbolic(name: str, *operands: Tensor) -> Tensor:
    q, _, v, *_ = operands
    shape = (*q.shape[:3], v.shape[3])
    return torch.onnx.ops.symbolic(f"{DOMAIN}::{name}", operands, dtype=q.dtype, shape=shape, version=1)


def _contents(program: ExportedProgram) -> Iterator[tuple[str, Contents]]:
    """What is known of the tables of each attention."""
    for node in program.graph.find_nodes(op="call_function", target=EXPORTED):
        call = Call.read(node.args[1])
        found = {name: known_value(program, at) for name, at in zip(call.tables, node.args[0][3:], strict=True)}
        masks = frozenset().union(*(part.mask.tables() for part in call.variant.parts()))
        yield (
            call.name,
            {name: TableValues(table.detach().numpy()) for name, table in found.items() if table is not None and name in masks},
        )


def _spec(call: Call, operands: Sequence[Tensor]) -> Spec:
    q, k, v, *tables = operands
    stored = tuple(Stored(name, _dtype(table), shape_of(table.shape)) for name, table in zip(call.tables, tables, strict=True))
    return Spec(
        call, stored, length(q.shape[0]), q.shape[1], k.shape[1], length(q.shape[2]), length(k.shape[2]), q.shape[3], v.shape[3],
        _dtype(q),
    )  # fmt: skip


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _metadata(spec: Spec, strategy: str, decision: Decision) -> Mapping[str, str]:
    sizes = {"heads": spec.heads, "kv_heads": spec.kv_heads, "q_len": spec.q_len, "k_len": spec.k_len, "head_dim": spec.dim}
    return {
        "attn.computes": whole(formulas(decision.variant, decision.site)),
        "attn.variant": wire.write(spec.call.variant),
        "attn.strategy": strategy,
        "attn.rule": decision.rule,
        "attn.outcome": decision.outcome,
        "attn.sizes": json.dumps(sizes),
    }
