"""Runs what was exported in onnxruntime, beside the rewritten model in PyTorch, on random inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from torch import SymInt, Tensor, fx, nn
from torch.export import ExportedProgram

from attn_compiler import torch_private as private
from attn_compiler.errors import ExportError
from attn_compiler.export.report import Checked
from attn_compiler.testing.budget import error_of, largest, over_budget

_FILL = -1e4  # a number as low as this is no random one: it hides something


def check(path: Path, program: ExportedProgram, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Checked, ...]:
    """Check the file with onnx's own checker, and compare what it computes with the program."""
    onnx.checker.check_model(path)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    leaves, structure = private.tree_flatten((tuple(args), dict(kwargs)))
    model = program.module()
    names = [str(name) for name in program.graph_signature.user_inputs]
    checked = []
    for inputs in _trials(program, leaves):
        again = private.tree_unflatten(inputs, structure)
        feeds = {name: x for name, x in zip(names, inputs, strict=True) if isinstance(x, Tensor)}
        checked.append(_compared(session, feeds, partial(_run, model, *again)))
    return tuple(checked)


def _run(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    with torch.no_grad():
        return [x for x in private.tree_leaves(model(*args, **kwargs)) if isinstance(x, Tensor)]


def _compared(session: onnxruntime.InferenceSession, feeds: Mapping[str, Tensor], plain: Callable[[], list[Tensor]]) -> Checked:
    wanted = {one.name for one in session.get_inputs()}
    found = session.run(None, {name: x.detach().numpy() for name, x in feeds.items() if name in wanted})
    actual, exact = [torch.from_numpy(x) for x in found], plain()
    shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in feeds.items())
    names = [one.name for one in session.get_outputs()]
    wrong = over_budget(actual, exact, plain, names)
    if wrong:
        raise ExportError(f"onnxruntime computes something else than the rewritten model, for {shapes}: {'; '.join(wrong)}")
    return Checked(shapes, max(map(error_of, actual, exact), default=0.0), max(map(largest, exact), default=0.0))


def _trials(program: ExportedProgram, leaves: Sequence[Any]) -> list[list[Any]]:
    """The inputs of each comparison: random ones of the given shapes, and of others where these may change."""
    generator = torch.Generator().manual_seed(0)
    count = len(program.graph_signature.input_specs) - len(leaves)
    placeholders = program.graph.find_nodes(op="placeholder")[count:]
    same = [
        _random(node, x, x.shape, generator) if isinstance(x, Tensor) else x for node, x in zip(placeholders, leaves, strict=True)
    ]
    others = [_other_shape(node, x) if isinstance(x, Tensor) else () for node, x in zip(placeholders, leaves, strict=True)]
    if all(not isinstance(x, Tensor) or shape == x.shape for shape, x in zip(others, leaves, strict=True)):
        return [same]
    changed = [
        _random(node, x, shape, generator) if isinstance(x, Tensor) else x
        for node, x, shape in zip(placeholders, leaves, others, strict=True)
    ]
    return [same, changed]


def _other_shape(node: fx.Node, x: Tensor) -> tuple[int, ...]:
    """The shape of an input where every size that may change is another one."""
    known = node.meta["val"].shape
    plain = [isinstance(size, SymInt) and private.formula(size).is_symbol for size in known]
    return tuple(size - 1 if free and size > 2 else size + 1 if free else size for free, size in zip(plain, x.shape, strict=True))


def _random(node: fx.Node, x: Tensor, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Random numbers where a model takes any; what counts, chooses or hides is kept, repeated or cut to the shape."""
    known = _vocabulary(node)
    if known and not x.dtype.is_floating_point:
        return torch.randint(0, known, tuple(shape), generator=generator, dtype=x.dtype)
    if x.dtype.is_floating_point and not bool((x < _FILL).any()):
        return torch.randn(tuple(shape), generator=generator).to(x.dtype)
    for axis, size in enumerate(shape):
        x = x.index_select(axis, torch.arange(size) % x.shape[axis])
    return x


def _vocabulary(node: fx.Node) -> int | None:
    """How many different numbers an input may hold that is looked up in an embedding."""
    for user in node.users:
        if user.target is torch.ops.aten.embedding.default and user.args[1] is node:
            return int(user.args[0].meta["val"].shape[0])  # type: ignore[union-attr]
    return None
