"""From a rewritten program to an ONNX model: the exporter of PyTorch for all but the attentions, whose functions are ours."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor
from torch.export import ExportedProgram

from attn_compiler import torch_private as private
from attn_compiler.algebra import wire
from attn_compiler.errors import ExportError
from attn_compiler.export.constants import known_value
from attn_compiler.export.program import Rewritten, renamed, results
from attn_compiler.graph.rewrite import splice
from attn_compiler.planning.formula import formulas, whole
from attn_compiler.planning.plan import Decision
from attn_compiler.planning.table_values import TableValues
from attn_compiler.targets.onnx.choice import Likely, choose
from attn_compiler.targets.onnx.function import DOMAIN, function
from attn_compiler.targets.onnx.spec import Call, Spec, Stored, length, shape_of
from attn_compiler.targets.onnx.walk import Contents

EXPORTED = torch.ops.attn_compiler.exported.default
WITH_CACHE = torch.ops.attn_compiler.exported_with_cache.default
WITH_STATE = torch.ops.attn_compiler.exported_with_state.default


@dataclass(frozen=True)
class Translated:
    """The model, and which body each of its attentions got, by name."""

    model: ir.Model
    strategies: Mapping[str, str]


def translated(rewritten: Rewritten, wanted: str, opset: int) -> Translated:
    """The model, with a labelled local function for each attention that was rewritten."""
    contents = dict(_contents(rewritten.program))
    specs = dict(_called(rewritten.program))
    try:
        exported = torch.onnx.export(rewritten.program, (), dynamo=True, opset_version=opset, verbose=False)
    except torch.onnx.OnnxExporterError as failure:
        reason = str(failure.__cause__ or failure).strip().splitlines()[0]
        raise ExportError(f"PyTorch's exporter cannot write the model as ONNX: {reason}") from failure
    assert exported is not None
    model: ir.Model = exported.model
    strategies = {}
    for name, spec in specs.items():
        decision = rewritten.plan.decisions[rewritten.names.index(name)]
        likely = Likely(decision.site.q_hint, decision.site.k_hint)
        strategies[name] = "states" if spec.call.remembers else choose(spec, likely, contents[name], wanted)
        made = function(spec, strategies[name], contents[name], opset)
        made.metadata_props.update(_metadata(spec, strategies[name], decision))
        model.functions[made.identifier()] = made
    if specs:
        model.opset_imports[DOMAIN] = 1
    return Translated(model, strategies)


def _called(program: ExportedProgram) -> Iterator[tuple[str, Spec]]:
    """Let each attention be a call of its function, as PyTorch's exporter writes one."""
    before = results(program)
    for node in _attentions(program):
        operands, what = node.args
        call = Call.read(what)
        values = [x.meta["val"] for x in operands]
        splice(program.graph, node, private.retrace(partial(_symbolic, call.name, node.meta["val"]), values), operands)
        yield call.name, _spec(call, values)
    renamed(program, before)
    program.graph_module.recompile()


def _attentions(program: ExportedProgram) -> list[Any]:
    return [node for node in program.graph.nodes if node.target in (EXPORTED, WITH_CACHE, WITH_STATE)]


def _symbolic(name: str, result: Tensor | tuple[Tensor, ...], *operands: Tensor) -> Tensor | Sequence[Tensor]:
    name = f"{DOMAIN}::{name}"
    if isinstance(result, Tensor):
        return torch.onnx.ops.symbolic(name, operands, dtype=result.dtype, shape=result.shape, version=1)
    dtypes, shapes = [x.dtype for x in result], [x.shape for x in result]
    return torch.onnx.ops.symbolic_multi_out(name, operands, dtypes=dtypes, shapes=shapes, version=1)


def _contents(program: ExportedProgram) -> Iterator[tuple[str, Contents]]:
    """What is known of the tables of each attention."""
    for node in _attentions(program):
        call = Call.read(node.args[1])
        found = {name: known_value(program, at) for name, at in zip(call.tables, node.args[0][call.operands :], strict=True)}
        masks = frozenset().union(*(part.mask.tables() for part in call.variant.parts()))
        yield (
            call.name,
            {name: TableValues(table.detach().numpy()) for name, table in found.items() if table is not None and name in masks},
        )


def _spec(call: Call, operands: Sequence[Tensor]) -> Spec:
    q, k, v, *past = operands[: call.operands]
    tables = zip(call.tables, operands[call.operands :], strict=True)
    keys = k.shape[2] + past[0].shape[2] if call.held else k.shape[2]
    stored = tuple(Stored(name, _dtype(table), shape_of(table.shape)) for name, table in tables)
    return Spec(
        call, stored, length(q.shape[0]), q.shape[1], k.shape[1], length(q.shape[2]), length(keys), q.shape[3], v.shape[3],
        _dtype(q),
    )  # fmt: skip


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _metadata(spec: Spec, strategy: str, decision: Decision) -> Mapping[str, str]:
    sizes = {"heads": spec.heads, "kv_heads": spec.kv_heads, "q_len": spec.q_len, "k_len": spec.k_len, "head_dim": spec.dim}
    if spec.call.held:
        sizes |= dict(zip(("first", "latest"), spec.call.held, strict=True))
    sizes |= {"remembers": "state"} if spec.call.remembers else {}
    return {
        "attn.computes": whole(formulas(decision.variant, decision.site)),
        "attn.variant": wire.write(spec.call.variant),
        "attn.strategy": strategy,
        "attn.rule": decision.rule,
        "attn.outcome": decision.outcome,
        "attn.sizes": json.dumps(sizes),
    }
