"""What tables of a program are known before it runs: constants and buffers, and what follows from them alone."""

from __future__ import annotations

from torch import Tensor, fx
from torch.export import ExportedProgram

from attn_compiler import torch_private as private

READABLE = 1 << 20  # numbers in a table up to which it is looked at
_DEPTH = 24  # operations between a constant and what is made of it


def known_value(program: ExportedProgram, node: fx.Node, depth: int = _DEPTH) -> Tensor | None:
    """The value of a node that depends on no input; None where it does, or is large."""
    seen = node.meta.get("val")
    if not isinstance(seen, Tensor) or depth == 0 or not all(isinstance(n, int) for n in seen.shape) or seen.numel() > READABLE:
        return None
    if node.op == "placeholder":
        return _held(program, str(node.name))
    if node.op != "call_function" or private.has_effect(node):
        return None
    operands = {x: known_value(program, x, depth - 1) for x in node.all_input_nodes}
    if any(x is None for x in operands.values()):
        return None
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), operands.__getitem__)
    found = node.target(*args, **kwargs)  # type: ignore[operator]
    return found if isinstance(found, Tensor) else None


def _held(program: ExportedProgram, name: str) -> Tensor | None:
    signature = program.graph_signature
    written = set(signature.buffers_to_mutate.values())
    target = signature.inputs_to_buffers.get(name) or signature.inputs_to_lifted_tensor_constants.get(name)
    if target is None or target in written:
        return None
    found = program.state_dict.get(target, program.constants.get(target))
    return found if isinstance(found, Tensor) else None
