"""One exported attention as an ONNX model of its own, run in onnxruntime."""

from __future__ import annotations

from collections.abc import Mapping

import onnx
import onnx_ir as ir
import onnxruntime
import torch
from torch import Tensor

from attn_compiler.planning.table_values import TableValues
from attn_compiler.runtime.call import operands_of
from attn_compiler.targets.exported import Q_POSITIONS, Call, Spec, Stored
from attn_compiler.targets.onnx.function import DOMAIN, function
from attn_compiler.targets.onnx.nodes import DTYPES
from attn_compiler.targets.walk import Contents
from attn_compiler.testing.case import Case


def run(case: Case, strategy: str, *, dynamic: bool = False, known: bool = False) -> Tensor:
    """The output of a case, its attention being a function of an ONNX model; with `known`, made for the tables' values."""
    spec, tables = spec_of(case, dynamic=dynamic)
    model = _model(spec, strategy, contents(tables) if known else {})
    onnx.checker.check_model(model, full_check=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    feeds = {"q": case.q, "k": case.k, "v": case.v, **tables}
    (out,) = session.run(None, {name: x.detach().numpy() for name, x in feeds.items()})
    return torch.from_numpy(out)


def spec_of(case: Case, *, dynamic: bool = False) -> tuple[Spec, dict[str, Tensor]]:
    """What determines the attention of a case once it is exported, and its tables."""
    operands = operands_of(case.q, case.k, case.v, case.variant, case.tables, case.q_positions, None, 0, 1, False)
    tables = {name: operands.tables[name] for name in sorted(case.variant.tables())}
    positions = operands.q_positions
    if isinstance(positions, Tensor):
        tables[Q_POSITIONS] = positions
    first = positions if isinstance(positions, int) else None
    return _spec(case, Call("model.layers.0.attention", case.variant, tuple(tables), first, 0, 1), tables, dynamic), tables


def contents(tables: Mapping[str, Tensor]) -> Contents:
    """What is known of tables where their values are."""
    return {name: TableValues(table.detach().numpy()) for name, table in tables.items() if table.dtype != torch.float64}


def _spec(case: Case, call: Call, tables: dict[str, Tensor], dynamic: bool) -> Spec:
    batch, heads, q_len, dim = case.q.shape
    _, kv_heads, k_len, value_dim = case.v.shape
    names = {batch: "rows", q_len: "queries", k_len: "keys"} if dynamic and heads not in (batch, q_len, k_len) else {}
    stored = tuple(
        Stored(name, _dtype(x), tuple(names.get(size, size) if size > 1 else size for size in x.shape))
        for name, x in tables.items()
    )
    sizes = [names.get(size, size) for size in (batch, q_len, k_len)]
    return Spec(call, stored, sizes[0], heads, kv_heads, sizes[1], sizes[2], dim, value_dim, _dtype(case.q))


def _dtype(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _model(spec: Spec, strategy: str, contents: Contents) -> onnx.ModelProto:
    made = function(spec, strategy, contents)

    def tensor(name: str, dtype: str, *shape: int | str) -> ir.Value:
        return ir.Value(name=name, type=ir.TensorType(DTYPES[dtype]), shape=ir.Shape(shape))

    inputs = [
        tensor("q", spec.dtype, spec.batch, spec.heads, spec.q_len, spec.dim),
        tensor("k", spec.dtype, spec.batch, spec.kv_heads, spec.k_len, spec.dim),
        tensor("v", spec.dtype, spec.batch, spec.kv_heads, spec.k_len, spec.value_dim),
        *(tensor(table.name, table.dtype, *table.shape) for table in spec.stored),
    ]
    out = tensor("out", spec.dtype, spec.batch, spec.heads, spec.q_len, spec.value_dim)
    call = ir.Node(DOMAIN, made.name, inputs, outputs=[out])
    graph = ir.Graph(inputs, [out], nodes=[call], opset_imports={**made.opset_imports, DOMAIN: 1}, name="main")
    return ir.to_proto(ir.Model(graph, ir_version=10, functions=[made]))
