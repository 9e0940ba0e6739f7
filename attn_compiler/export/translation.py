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
from attn_compiler.errors import ExportError
from attn_compiler.export.called import Called, called
from attn_compiler.export.program import Rewritten, decomposing, renamed, results
from attn_compiler.graph.rewrite import splice
from attn_compiler.planning.formula import formulas, whole
from attn_compiler.planning.plan import Decision
from attn_compiler.targets.exported import Spec
from attn_compiler.targets.onnx.choice import Likely, choose
from attn_compiler.targets.onnx.fit import refusal
from attn_compiler.targets.onnx.function import DOMAIN, function


@dataclass(frozen=True)
class Translated:
    """The model, and which body each of its attentions got, by name."""

    model: ir.Model
    strategies: Mapping[str, str]
    notes: tuple[str, ...]  # where a body was asked for that an attention has not, and why not


def translated(rewritten: Rewritten, wanted: str, opset: int) -> Translated:
    """The model, with a labelled local function for each attention that was rewritten."""
    calls = list(_called(rewritten.program))
    try:
        with decomposing():
            exported = torch.onnx.export(rewritten.program, (), dynamo=True, opset_version=opset, verbose=False)
    except torch.onnx.OnnxExporterError as failure:
        reason = str(failure.__cause__ or failure).strip().splitlines()[0]
        raise ExportError(f"PyTorch's exporter cannot write the model as ONNX: {reason}") from failure
    assert exported is not None
    model: ir.Model = exported.model
    strategies, notes = {}, []
    for spec, contents in ((one.spec, one.contents) for one in calls):
        name = spec.call.name
        decision = rewritten.plan.decisions[rewritten.names.index(name)]
        likely = Likely(decision.site.q_hint, decision.site.k_hint)
        only = "states" if spec.call.remembers else "contrib" if spec.call.codes else ""  # what its cache leaves it
        strategies[name] = only or choose(spec, likely, contents, wanted, opset)
        objection = None if wanted in ("auto", only) else f'its cache asks for "{only}"' if only else refusal(spec, wanted, opset)
        notes += [f'{name} has no body "{wanted}": {objection}'] if objection else []
        made = function(spec, strategies[name], contents, opset)
        made.metadata_props.update(_metadata(spec, strategies[name], decision))
        model.functions[made.identifier()] = made
        model.opset_imports.update({domain: version for domain, version in made.opset_imports.items() if domain})
    if calls:
        model.opset_imports[DOMAIN] = 1
    return Translated(model, strategies, tuple(notes))


def _called(program: ExportedProgram) -> Iterator[Called]:
    """Let each attention be a call of its function, as PyTorch's exporter writes one."""
    before = results(program)
    for one in called(program):
        symbolic = partial(_symbolic, one.spec.call.name, one.node.meta["val"])
        splice(program.graph, one.node, private.retrace(symbolic, one.values), one.operands)
        yield one
    renamed(program, before)
    program.graph_module.recompile()


def _symbolic(name: str, result: Tensor | tuple[Tensor, ...], *operands: Tensor) -> Tensor | Sequence[Tensor]:
    name = f"{DOMAIN}::{name}"
    if isinstance(result, Tensor):
        return torch.onnx.ops.symbolic(name, operands, dtype=result.dtype, shape=result.shape, version=1)
    dtypes, shapes = [x.dtype for x in result], [x.shape for x in result]
    return torch.onnx.ops.symbolic_multi_out(name, operands, dtypes=dtypes, shapes=shapes, version=1)


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
