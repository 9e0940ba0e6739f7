"""Brings a Dynamo graph into the form the matcher reads: pre-dispatch ATen, one schema per operation, provenance kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from attn_compiler import torch_private as private
from attn_compiler.errors import CaptureError
from attn_compiler.graph.calls import Argument, call
from attn_compiler.graph.leaves import LEAVES

_LARGEST_LITERAL = 4096
_LOOPS = ("while_loop", "scan", "associative_scan", "map_impl")
_LITERALS = (torch.tensor, torch.as_tensor, torch.scalar_tensor)  # traced, they would turn into buffers nobody knows


@dataclass(frozen=True)
class Body:
    """The graph inside a higher-order operator (a checkpointed block, a branch, the body of a loop).

    Its placeholders stand for `operands`; there are none where a loop passes something else each time.
    """

    name: str
    node: fx.Node
    module: fx.GraphModule
    operands: tuple[fx.Node, ...]


def capture(gm: fx.GraphModule, example_inputs: Sequence[private.Traced] | None = None) -> fx.GraphModule:
    """Retrace `gm` to pre-dispatch ATen; every node of the result knows its value (`meta["val"]`).

    A graph that is ATen already, as `torch.export` makes it, is returned as it is. `gm` is never changed.
    """
    if is_aten(gm):
        return gm
    try:
        with private.fake_inputs(gm, example_inputs) as (mode, args):
            retraced = private.trace(_Retrace(gm, mode).run, mode, args)
            drop_dead_code(retraced)
            _write_out_constants(retraced, mode)
    except private.DYNAMO_CONTROL_FLOW:
        raise
    except private.RETRACE_FAILURES as failure:
        raise CaptureError(f"the graph cannot be retraced to ATen: {type(failure).__name__}: {failure}") from failure
    private.keep_identity(gm, retraced)
    retraced.recompile()
    return retraced


def is_aten(gm: fx.GraphModule) -> bool:
    """Whether all of `gm` is ATen with known values."""
    calls = [node for node in gm.graph.nodes if node.op in ("call_function", "call_method", "call_module")]
    return bool(calls) and all(node.op == "call_function" and "val" in node.meta for node in calls)


def bodies(gm: fx.GraphModule) -> Iterator[Body]:
    """Yield the graphs inside of the higher-order operators of a captured graph, with what their placeholders stand for."""
    for node in gm.graph.nodes:
        if node.op != "call_function" or not private.is_higher_order(node):
            continue
        flat: list[fx.Node] = [x for x in private.tree_leaves((node.args, node.kwargs)) if isinstance(x, fx.Node)]
        modules = {x: gm.get_submodule(str(x.target)) for x in flat if _is_body(gm, x)}
        operands = tuple(x for x in flat if x not in modules)
        if str(node.target) == "cond":
            operands = operands[1:]  # the first is what chooses
        for at, module in modules.items():
            assert isinstance(module, fx.GraphModule)
            if str(node.target) in _LOOPS:
                yield Body(str(at.target), node, module, ())
            elif len(module.graph.find_nodes(op="placeholder")) == len(operands):
                yield Body(str(at.target), node, module, operands)


def _is_body(gm: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "get_attr" and isinstance(dict(gm.named_modules()).get(str(node.target)), fx.GraphModule)


def capture_body(body: Body) -> fx.GraphModule:
    """Capture the graph inside a higher-order operator, its inputs being what the outer graph knows of them."""
    inputs = body.operands or body.module.graph.find_nodes(op="placeholder")
    return capture(body.module, [private.known_value(x) for x in inputs])


def drop_dead_code(gm: fx.GraphModule) -> None:
    """Remove what nobody reads, but nothing that writes or draws random numbers."""
    for node in reversed(gm.graph.nodes):  # `eliminate_dead_code` goes on into bodies, and asks nobody what they write
        if not node.users and (not private.has_effect(node) or _drops_nothing(node)):
            gm.graph.erase_node(node)


def _drops_nothing(node: fx.Node) -> bool:
    """Whether this is the dropout of a model that is not trained, which torch counts among what draws random numbers."""
    read = call(node)
    return read.op == "dropout" and not read["train"]


class _Retrace(fx.Interpreter):
    """Runs a Dynamo graph while it is recorded; what recording would destroy is copied as it is."""

    def __init__(self, gm: fx.GraphModule, mode: private.FakeMode) -> None:
        super().__init__(gm)
        self._mode = mode
        self._depth = 0  # of functorch transforms around the current node

    def run_node(self, n: fx.Node) -> private.Traced:
        with private.provenance(n):
            if n.op not in ("call_function", "call_method"):
                return super().run_node(n)
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            inside = any(isinstance(x, fx.Proxy) for x in private.tree_leaves((args, kwargs)))
            self._depth += max(private.nesting(n), 0)
            if self._depth or inside:
                return self._copy_inside(n, args, kwargs)
            if private.is_higher_order(n) or n.target in _LITERALS:
                return private.follow(private.copy_node(n, args, kwargs), private.known_value(n), self._mode)
            if n.op == "call_function" and n.target in LEAVES:
                return LEAVES[n.target](*args, **kwargs)
            return super().run_node(n)

    def _copy_inside(self, n: fx.Node, args: private.Traced, kwargs: private.Traced) -> private.Traced:
        """Copy a node of a functorch region: batched tensors cannot be recorded, so there only proxies flow."""
        proxy = private.copy_node(n, args, kwargs)
        outermost = self._depth <= 1
        self._depth += min(private.nesting(n), 0)
        if outermost and private.leaves_region(n):
            return private.follow(proxy, private.known_value(n), self._mode)
        return proxy


def _write_out_constants(gm: fx.GraphModule, mode: private.FakeMode) -> None:
    """Turn the constants that tracing keeps as attributes into literals: AOTAutograd rejects buffers that Dynamo never saw."""
    for node in list(gm.graph.nodes):
        constant = getattr(gm, str(node.target), None) if node.op == "get_attr" else None
        if not isinstance(constant, torch.Tensor) or isinstance(constant, torch.nn.Parameter):
            continue
        if private.is_fake(constant):
            raise CaptureError(f"a value that is not known while compiling became a constant of the graph: {node}")
        if constant.numel() > _LARGEST_LITERAL:
            raise CaptureError(f"the graph makes a constant of {constant.numel()} elements: register it as a buffer")
        with gm.graph.inserting_before(node):
            placed: dict[str, Argument] = {"dtype": constant.dtype, "device": constant.device}
            literal = gm.graph.call_function(torch.tensor, (constant.tolist(),), placed)
        literal.meta.update(node.meta)
        literal.meta["val"] = mode.from_tensor(constant) if mode else constant
        node.replace_all_uses_with(literal)
        gm.graph.erase_node(node)
        delattr(gm, str(node.target))
