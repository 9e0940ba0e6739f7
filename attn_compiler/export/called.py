"""The attentions of a rewritten program while each is one operator still, and all that is known of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from attn_compiler.export.constants import known_value
from attn_compiler.planning.table_values import TableValues
from attn_compiler.targets.exported import Call, Spec, Stored, length, shape_of
from attn_compiler.targets.walk import Contents

EXPORTED = torch.ops.attn_compiler.exported.default
WITH_CACHE = torch.ops.attn_compiler.exported_with_cache.default
WITH_STATE = torch.ops.attn_compiler.exported_with_state.default


@dataclass(frozen=True)
class Called:
    """One of them: its node, its operands, what is computed of them, and what stands in the tables that its masks read."""

    node: fx.Node
    operands: tuple[fx.Node, ...]
    spec: Spec
    contents: Contents

    @property
    def values(self) -> list[Tensor]:
        """What a trace knows of the operands."""
        return [x.meta["val"] for x in self.operands]


def called(program: ExportedProgram, graph: fx.Graph | None = None) -> Iterator[Called]:
    """The attentions of a graph of a program, of its outermost one unless given."""
    for node in list((graph or program.graph).nodes):
        if node.target in (EXPORTED, WITH_CACHE, WITH_STATE):
            operands, what = node.args
            call = Call.read(what)
            contents = dict(_contents(program, call, operands[call.operands :]))
            yield Called(node, tuple(operands), _spec(call, [x.meta["val"] for x in operands]), contents)


def _contents(program: ExportedProgram, call: Call, tables: tuple[fx.Node, ...]) -> Iterator[tuple[str, TableValues]]:
    masks = frozenset().union(*(part.mask.tables() for part in call.variant.parts()))
    for name, at in zip(call.tables, tables, strict=True):
        table = known_value(program, at) if name in masks else None
        if table is not None:
            yield name, TableValues(table.detach().numpy())


def _spec(call: Call, operands: list[Tensor]) -> Spec:
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
