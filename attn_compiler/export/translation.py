"""From a rewritten program to an ONNX model: the exporter of PyTorch for all but the attentions, whose functions are ours."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import onnx_ir as ir
import torch
from torch import Tensor

from attn_compiler.algebra import wire
from attn_compiler.export.program import Rewritten
from attn_compiler.planning.formula import formulas, whole
from attn_compiler.targets.onnx.choice import FORMS
from attn_compiler.targets.onnx.function import DOMAIN, OPSET, function
from attn_compiler.targets.onnx.spec import Call, Spec, Stored, length, shape_of


def translated(rewritten: Rewritten) -> ir.Model:
    """The model, with a labelled local function for each attention that was rewritten."""
    specs: dict[str, Spec] = {}

    def symbolic(operands: Sequence[Tensor], what: str) -> Tensor:
        call = Call.read(what)
        specs[call.name] = _spec(call, operands)
        q, _, v, *_ = operands
        name, shape = f"{DOMAIN}::{call.name}", (*q.shape[:3], v.shape[3])
        return torch.onnx.ops.symbolic(name, operands, dtype=q.dtype, shape=shape, version=1)

    lowered = rewritten.program.run_decompositions({torch.ops.attn_compiler.exported.default: symbolic})
    exported = torch.onnx.export(lowered, (), dynamo=True, opset_version=OPSET, verbose=False)
    assert exported is not None
    model: ir.Model = exported.model
    strategies = {form: strategy for strategy, form in FORMS.items()}
    for decision, name in zip(rewritten.plan.decisions, rewritten.names, strict=True):
        if name in specs:
            strategy = strategies[decision.form]
            made = function(specs[name], strategy)
            site = decision.site
            made.metadata_props.update(_metadata(specs[name], strategy, decision.rule, whole(formulas(decision.variant, site))))
            model.functions[made.identifier()] = made
    if specs:
        model.opset_imports[DOMAIN] = 1
    return model


def _spec(call: Call, operands: Sequence[Tensor]) -> Spec:
    q, k, v, *tables = operands
    stored = tuple(Stored(name, _dtype(table), shape_of(table.shape)) for name, table in zip(call.tables, tables, strict=True))
    return Spec(
        call, stored, length(q.shape[0]), q.shape[1], k.shape[1], length(q.shape[2]), length(k.shape[2]), q.shape[3], v.shape[3],
        _dtype(q),
    )  # fmt: skip


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _metadata(spec: Spec, strategy: str, rule: str, says: str) -> Mapping[str, str]:
    sizes = {"heads": spec.heads, "kv_heads": spec.kv_heads, "q_len": spec.q_len, "k_len": spec.k_len, "head_dim": spec.dim}
    return {
        "attn.computes": says,
        "attn.variant": wire.write(spec.call.variant),
        "attn.strategy": strategy,
        "attn.rule": rule,
        "attn.sizes": json.dumps(sizes),
    }
