"""Caches that hold codes: what brings these back is fixed when a file is written, by what the model does with an example."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from attn_compiler.errors import ExportError
from attn_compiler.export.called import EXPORTED
from attn_compiler.export.comparison import Plain
from attn_compiler.export.program import hold
from attn_compiler.planning.kept import FAR
from attn_compiler.runtime.exported import attend_eagerly, attend_with_cache
from attn_compiler.targets.exported import SCALES, Call
from attn_compiler.targets.onnx.codes import Codes, codes_of
from attn_compiler.targets.rows import without_cache


@dataclass(frozen=True)
class Seen:
    """The scales of an attention's keys and values, each channel's own, and the relative error of its result with them."""

    codes: Codes
    scales: tuple[Tensor, Tensor]
    error: float

    def __str__(self) -> str:
        whose = "whose scales are those of the example"
        return f"holds its cache in {self.codes}, {whose}: there its result differs by {self.error:.2g}"


def seen(module: fx.GraphModule, names: Iterable[str], inputs: Iterable[Tensor]) -> Mapping[str, Seen]:
    """Run an example, and look at the keys and values of the attentions that are named."""
    watching = _Watching(module, names)
    with torch.no_grad():
        watching.run(*inputs)
    return watching.found


def with_scales(program: ExportedProgram, found: Mapping[str, Seen]) -> Mapping[str, tuple[fx.Node, ...]]:
    """Make the scales constants of a program; their nodes."""
    graph, tensors, nodes = program.graph, [], {}
    for number, (name, one) in enumerate(found.items()):
        made = []
        for scale, side in zip(one.scales, ("key", "value"), strict=True):
            with graph.inserting_after(graph.find_nodes(op="placeholder")[-1]):
                node = graph.placeholder(f"{side}_scale_{number}")
            node.meta["val"] = graph.find_nodes(op="placeholder")[0].meta["val"].new_empty(scale.shape, dtype=scale.dtype)
            made.append(node)
            tensors.append(scale)
        nodes[name] = tuple(made)
    hold(program, tensors)
    return nodes


def check_kept(found: Mapping[str, Seen], promised: Mapping[str, float]) -> None:
    """Raise where fixed scales cost more than a rule promises of an attention."""
    for name, most in promised.items():
        if not found[name].error <= most:
            raise ExportError(
                f"{name}: with its cache in {found[name].codes}, whose scales are those of the example, its result differs by "
                f"{found[name].error:.3g}, beyond its `tolerance` of {most:g}: give another example, or leave its "
                "`storage` out"
            )


def check_coded(wanted: Iterable[str], folded: Collection[str]) -> None:
    """Raise where a cache is wanted in codes that somebody else reads as numbers."""
    missing = next((name for name in wanted if name not in folded), None)
    if missing is not None:
        raise ExportError(f"{missing}: its cache cannot hold codes, since it is read elsewhere too: leave its `storage` out")


class _Watching(Plain):
    """The program on one example."""

    def __init__(self, module: fx.GraphModule, names: Iterable[str]) -> None:
        super().__init__(module)
        self.names, self.found = {*names}, dict[str, Seen]()

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        out = super().call_function(target, args, kwargs)
        call = Call.read(args[1]) if target is EXPORTED else None
        if call and call.name in self.names:
            self.found[call.name] = _seen(call, args[0])
        return out


def _seen(call: Call, operands: list[Tensor]) -> Seen:
    q, k, v, *tables = operands
    tiny, codes = torch.finfo(k.dtype).tiny, codes_of(call.variant)
    scales = [(x.abs().amax((0, 2), keepdim=True) / codes.largest).clamp(min=tiny) for x in (k, v)]
    plain = replace(call, variant=without_cache(call.variant))
    held = replace(plain, tables=(*call.tables, *SCALES), held=(0, FAR), codes=codes.bits)
    none = [codes.encode(x, scale)[:, :, :0] for x, scale in zip((k, v), scales, strict=True)]
    exact = attend_eagerly(operands, plain.write())
    found, _, _ = attend_with_cache([q, k, v, *none, *tables, *scales], held.write())
    return Seen(codes, (scales[0], scales[1]), float((found - exact).norm() / exact.norm().clamp(min=tiny)))
