"""Everything that touches torch's private interfaces: a new torch release is this file's work, and no other's."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar, cast

import torch
from torch import SymBool, SymInt, fx
from torch._decomp import get_decompositions
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.source import ConstantSource
from torch._functorch._aot_autograd.frontend_utils import process_inputs
from torch._guards import TracingContext, detect_fake_mode
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import ExportedProgram
from torch.fx import traceback
from torch.fx.experimental import symbolic_shapes
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, get_proxy_mode, make_fx, track_tensor_tree
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatefulSymbolicContext
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

Operator = OpOverload
FakeMode = FakeTensorMode | None
Traced = Any  # whatever flows along an edge of a graph: tensors, symbolic numbers, containers of those
Call = TypeVar("Call", bound=Callable[..., Any])
RETRACE_FAILURES = (RuntimeError, NotImplementedError, AssertionError, TypeError, ValueError)
ASSERT = torch.ops.aten._assert_async.msg  # of a tensor, when a graph runs
DYNAMO_CONTROL_FLOW = TorchDynamoException  # restarts of its analysis come as exceptions: they must pass
statically_known_true = symbolic_shapes.statically_known_true
tree_leaves, tree_map = pytree.tree_leaves, pytree.tree_map
tree_flatten, tree_unflatten = pytree.tree_flatten, pytree.tree_unflatten
ENCODER_LAYER = torch._transformer_encoder_layer_fwd

_OPENS = ("_vmap_increment_nesting", "_grad_increment_nesting", "_jvp_increment_nesting", "_func_increment_nesting")
_CLOSES = ("_vmap_decrement_nesting", "_grad_decrement_nesting", "_jvp_decrement_nesting", "_func_decrement_nesting")
_REGION = ("lazy_load_decompositions", "_add_batch_dim", "_remove_batch_dim", "_enter_dual_level", "_exit_dual_level")
_MODES = ("_set_grad_enabled", "_enter_autocast", "_exit_autocast")
_EFFECTS = frozenset((*_OPENS, *_CLOSES, *_REGION, *_MODES))
_DETACHES = ("detach.default", "detach")


@contextlib.contextmanager
def fake_inputs(gm: fx.GraphModule, example_inputs: Sequence[Traced] | None) -> Iterator[tuple[FakeMode, list[Traced]]]:
    """Lend a fake mode of our own, which shares Dynamo's symbols, and the graph's inputs in it.

    Dynamo's fakes belong to a mode that is retired when a backend runs. AOTAutograd's must not be borrowed either: what a
    retrace writes in place would stay in its memo.
    """
    context = TracingContext.try_get()
    inputs = list(map(known_value, gm.graph.find_nodes(op="placeholder")) if example_inputs is None else example_inputs)
    if any(isinstance(x, FakeTensor) for x in inputs):
        theirs = detect_fake_mode(inputs)
        ours = FakeTensorMode(shape_env=theirs.shape_env if theirs else None)
        yield ours, [fake_like(x, ours) for x in inputs]
    elif context is None or context.fake_mode is None:
        ours = FakeTensorMode(shape_env=None)
        yield ours, [ours.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in inputs]
    else:
        dynamo = context.fake_mode
        context.fake_mode = ours = FakeTensorMode(shape_env=dynamo.shape_env)
        try:
            config: Any = SimpleNamespace(is_export=False, num_params_buffers=0, dynamic_shapes=True)
            made = process_inputs(inputs, config, ours, ours.shape_env)
            yield ours, list(made[0] if isinstance(made, tuple) else made)  # torch 2.11 gives the inputs alone
        finally:
            context.fake_mode = dynamo


def known_value(node: fx.Node) -> Traced:
    """What Dynamo or a retrace knows of a node's value."""
    return node.meta.get("val", node.meta.get("example_value"))


def fake_like(x: Traced, mode: FakeMode) -> Traced:
    """The same tensor in `mode`, its symbolic sizes kept, without leaving a trace of making it."""
    if not isinstance(x, FakeTensor) or mode is None or x.fake_mode is mode:
        return x
    with disable_proxy_modes_tracing(), mode:
        made = torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device=x.device)
    return made.requires_grad_(x.requires_grad)


def retrace(run: Callable[..., Traced], values: Sequence[Traced]) -> fx.GraphModule:
    """Record what `run` makes of values that a captured graph knows, in the fake mode they live in."""
    mode = next((x.fake_mode for x in values if isinstance(x, FakeTensor)), None)
    context = TracingContext.try_get() or SimpleNamespace(fake_mode=None)
    dynamo, context.fake_mode = context.fake_mode, mode
    try:
        return trace(run, mode, values)
    finally:
        context.fake_mode = dynamo


def trace(run: Callable[..., Traced], mode: FakeMode, args: Sequence[Traced]) -> fx.GraphModule:
    """Record the ATen operators that `run` calls, before autograd, autocast and functionalization see them."""
    with traceback.preserve_node_meta(), mode or contextlib.nullcontext():
        return make_fx(run, pre_dispatch=True, tracing_mode="real", _allow_non_fake_inputs=True)(*args)


def provenance(node: fx.Node) -> contextlib.AbstractContextManager[None]:
    """Give what is recorded inside the metadata of `node`."""
    return traceback.set_current_meta(node)


def copy_node(node: fx.Node, args: Traced, kwargs: Traced) -> fx.Proxy:
    """Put `node` as it is into the graph that is being recorded."""
    tracer = _tracer()

    def proxied(x: Traced) -> Traced:
        if isinstance(x, fx.Proxy):
            return x
        if isinstance(x, fx.GraphModule):
            if not any(x is module for module in tracer.root.children()):
                tracer.root.register_module(f"body_{len(list(tracer.root.children()))}", x)
            return x
        return tracer.unwrap_proxy(x)

    new_args, new_kwargs = pytree.tree_map(proxied, (args, kwargs))
    proxy: fx.Proxy = tracer.create_proxy(node.op, node.target, new_args, new_kwargs, name=node.name)
    proxy.node.meta["example_value"] = known_value(node)
    return proxy


def _tracer() -> Any:
    proxy_mode = get_proxy_mode()
    assert proxy_mode is not None, "nothing is being recorded"
    return proxy_mode.tracer


def follow(proxy: fx.Proxy, value: Traced, mode: FakeMode) -> Traced:
    """Let the recording know that `proxy` stands for `value`."""
    known = pytree.tree_map(lambda x: fake_like(x, mode), value)
    proxy.node.meta["val"] = known
    return track_tensor_tree(known, proxy, constant=None, tracer=_tracer())


def schema(operator: Operator) -> torch.FunctionSchema:
    """The names, defaults and aliases of an operator's arguments and results."""
    return operator._schema


def functional(operator: Operator) -> Operator:
    """The operator that gives a new tensor where `operator` writes in place."""
    name = operator._schema.name.removeprefix("aten::").removesuffix("_")
    overload: Operator = getattr(getattr(torch.ops.aten, name), operator._overloadname)
    return overload


def formula(size: SymInt) -> Any:
    """A symbolic size as sympy knows it."""
    return size.node.expr


def likely(size: int | SymInt, unknown: int) -> int:
    """The length a trace was made with, or `unknown` where there was none; adds no guard."""
    if isinstance(size, int):
        return size
    if hasattr(symbolic_shapes, "optimization_hint"):  # torch 2.12 and later
        return int(symbolic_shapes.optimization_hint(size, unknown))
    return int(symbolic_shapes.size_hint(size, unknown))  # type: ignore[attr-defined]


def guarded(condition: bool | SymBool) -> bool | None:
    """The answer to a question about sizes, None if data decides it; of dynamic sizes, it becomes a guard."""
    try:
        return bool(condition)
    except symbolic_shapes.GuardOnDataDependentSymNode:
        return None


def require(condition: bool | SymBool) -> None:
    """Let a trace know that something holds of sizes."""
    torch._check(condition)  # type: ignore[no-untyped-call]


def decomposed(*operators: Operator) -> dict[Any, Callable[..., Any]]:
    """How torch itself writes operators in simpler ones."""
    found: dict[Any, Callable[..., Any]] = get_decompositions(operators)
    return found


def is_fake(x: Traced) -> bool:
    return isinstance(x, FakeTensor)


def is_higher_order(node: fx.Node) -> bool:
    return isinstance(node.target, HigherOrderOperator)


def nesting(node: fx.Node) -> int:
    """How much deeper into a functorch transform (vmap, grad) `node` leads: 1, 0 or -1."""
    name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
    return (name in _OPENS) - (name in _CLOSES)


def enters_region(node: fx.Node) -> bool:
    """Whether `node` hands a value to a vmapped region."""
    return getattr(node.target, "__name__", "") == "_add_batch_dim"


def leaves_region(node: fx.Node) -> bool:
    """Whether `node` hands a value of a vmapped region to the outside."""
    return getattr(node.target, "__name__", "") == "_remove_batch_dim"


def has_effect(node: fx.Node) -> bool:
    """Whether `node` must stay although nobody reads it. torch's own test misses what is written in place by a method."""
    if node.op in ("placeholder", "output"):
        return True
    if node.op == "call_method":
        name = str(node.target)
        return name.endswith("_") and not name.endswith("__")
    if node.op != "call_function":
        return False
    if isinstance(node.target, Operator):
        return schema(node.target).is_mutable or bool(node.is_impure())
    return getattr(node.target, "__name__", "") in _EFFECTS or "out" in node.kwargs or bool(node.is_impure())


def recorded(graph: fx.Graph) -> frozenset[fx.Node]:
    """The nodes that autograd follows: a retrace detaches what it knows, so that only the graph's inputs can tell."""
    found: set[fx.Node] = set()
    enabled = torch.is_grad_enabled()
    for node in graph.nodes:
        if node.target is torch._C._set_grad_enabled:
            enabled = bool(node.args[0])
        elif node.op in ("placeholder", "get_attr"):
            known = (node.meta.get("example_value"), node.meta.get("val"))
            if any(isinstance(x, torch.Tensor) and x.requires_grad for x in known):
                found.add(node)
        elif enabled and getattr(node.target, "__name__", "") not in _DETACHES and not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return frozenset(found)


def keep_identity(source: fx.GraphModule, copy: fx.GraphModule) -> None:
    """Carry over what Dynamo, AOTAutograd and Inductor know a graph and its inputs by."""
    copy.meta.update(source.meta)
    for name in ("_param_name_to_source", "_backend_id"):
        if name in vars(source):
            setattr(copy, name, vars(source)[name])
    placeholders = ([node for node in gm.graph.nodes if node.op == "placeholder"] for gm in (source, copy))
    for old, new in zip(*placeholders, strict=True):
        new.meta = {**{key: value for key, value in old.meta.items() if key != "val"}, **new.meta}
        new.target, new.name = old.target, old.name
        if "_dynamo_source" in vars(old):
            new._dynamo_source = vars(old)["_dynamo_source"]


def taken_whole(function: Call) -> Call:
    """Let Dynamo take calls of `function` as they are; it is traced behind Dynamo, in whatever Python it is written."""
    public = getattr(torch.compiler, "nonstrict_trace", None)  # torch 2.15 and later
    return cast(Call, (public or torch._dynamo.nonstrict_trace)(function))


def argument_name(node: fx.Node) -> str:
    """What the user calls an input: the name of an argument of the compiled function, or nothing for parameters."""
    source = vars(node).get("_dynamo_source")
    if source is None:
        return "" if is_parameter(node) else str(node.target)
    name = source.name if isinstance(source.name, str) else source.name()
    found = re.fullmatch(r"L\['(?:\w+'\]\[')?(\w+)'\]", name)
    return found[1] if found else ""


def source_name(node: fx.Node) -> str:
    """How Dynamo comes by an input of its graph, or nothing: `L['self']._modules['proj']._parameters['weight']`."""
    source = vars(node).get("_dynamo_source")
    return "" if source is None else str(source.name if isinstance(source.name, str) else source.name())


def add_input(gm: fx.GraphModule, name: str, tensor: torch.Tensor) -> fx.Node:
    """Give the graph one more input, which Dynamo knows nothing of; its shape is fixed."""
    last = gm.graph.find_nodes(op="placeholder")[-1:]
    first = next(iter(gm.graph.nodes))
    with gm.graph.inserting_after(last[0]) if last else gm.graph.inserting_before(first):
        node = gm.graph.placeholder(name)
    vars(node)["_dynamo_source"] = None
    seen = (known_value(other) for other in gm.graph.nodes)
    mode = next((x.fake_mode for x in seen if isinstance(x, FakeTensor)), None)
    node.meta["val"] = mode.from_tensor(tensor, static_shapes=True) if mode else tensor
    _fix_shape(tensor, name)
    return node


def pass_in(gm: fx.GraphModule, outer: fx.Node) -> fx.Node:
    """Give the graph inside of an operator one more input, which stands for a node of the graph around it."""
    last = gm.graph.find_nodes(op="placeholder")[-1]
    with gm.graph.inserting_after(last):
        node = gm.graph.placeholder(f"attn_{outer.name}")
    mode = next((x.fake_mode for x in map(known_value, gm.graph.nodes) if isinstance(x, FakeTensor)), None)
    node.meta["val"] = fake_like(known_value(outer), mode)
    return node


def _fix_shape(tensor: torch.Tensor, name: str) -> None:
    """Keep AOTAutograd from giving the tensor symbols that nobody could guard."""
    context = TracingContext.try_get()
    if context is None:
        return
    context.tensor_to_context[tensor] = StatefulSymbolicContext(
        dynamic_sizes=[DimDynamic.STATIC] * tensor.dim(),
        dynamic_strides=[DimDynamic.INFER_STRIDE] * tensor.dim(),
        constraint_sizes=[None] * tensor.dim(),
        constraint_strides=[None] * tensor.dim(),
        view_base_context=None,
        tensor_source=ConstantSource(name),
    )


def may_change(tensor: torch.Tensor, dim: int) -> None:
    """Let graphs take a size of a tensor for one that is another from call to call."""
    torch._dynamo.maybe_mark_dynamic(tensor, dim)


def is_parameter(node: fx.Node) -> bool:
    """Whether `node` is a parameter of the model, in Dynamo's graphs and in exported ones."""
    if node.op == "get_attr":
        return True
    seen = (node.meta.get("example_value"), node.meta.get("val"))
    exported = node.op == "placeholder" and str(node.target).startswith("p_") and "tensor_dict" not in node.meta
    return node.op == "placeholder" and (exported or any(isinstance(x, torch.nn.Parameter) for x in seen))


def drop_claims(program: ExportedProgram) -> None:
    """Remove what torch.export claims of tensors and of inputs' sizes, and what only such claims read: many a mask."""
    program._guards_code = []
    for claim in program.graph.find_nodes(op="call_function", target=torch.ops.aten._assert_tensor_metadata.default):
        program.graph.erase_node(claim)
    program.graph.eliminate_dead_code()


def forget_values(gm: fx.GraphModule) -> None:
    """Drop what the retrace knew of every node: AOTAutograd finds it out again, in a mode of its own."""
    for node in gm.graph.nodes:
        node.meta.pop("val", None)


def inductor() -> Callable[..., Any]:
    """Inductor's entry, imported late: it is slow to load."""
    from torch._inductor.compile_fx import compile_fx

    return compile_fx


def compile_package(program: ExportedProgram, path: Path, says: dict[str, str]) -> None:
    """Let AOTInductor compile a program to a file, which must end in .pt2, and `says` that much of itself."""
    torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs={"aot_inductor.metadata": says})


def load_package(path: Path) -> Callable[..., Traced]:
    """What AOTInductor compiled, to be called as the model was."""
    return cast(Callable[..., Traced], torch._inductor.aoti_load_package(str(path)))


def inductor_settings() -> frozenset[str]:
    """Every setting that Inductor's configuration has."""
    from torch._inductor import config

    return frozenset(config.get_config_copy())


def inductor_options(mode: str | None, options: Mapping[str, Traced]) -> dict[str, Traced] | str:
    """What Inductor's configuration becomes; or the first option that it does not know."""
    from torch._inductor import list_mode_options

    wanted = {key.replace("-", "_"): value for key, value in options.items()}
    unknown = next(iter(sorted(wanted.keys() - inductor_settings())), None)
    return unknown or {**(list_mode_options(mode) if mode else {}), **wanted}


class EveryResult(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While this is entered, every tensor that an operator makes anew is what `change(operator, tensor)` makes of it.

    A softmax and its gradient are taken apart for it: the sum of a row, which their result hides, is made anew as well.
    """

    def __init__(self, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._change = change
        self._apart = get_decompositions([torch.ops.aten._softmax, torch.ops.aten._softmax_backward_data])

    def __torch_dispatch__(self, func: Operator, types: Traced, args: Traced = (), kwargs: Traced = None) -> Traced:
        with self if func in self._apart else contextlib.nullcontext():
            found = self._apart.get(func, func)(*args, **(kwargs or {}))
        if any(result.alias_info for result in func._schema.returns):
            return found
        return pytree.tree_map_only(torch.Tensor, lambda x: self._change(func._schema.name.removeprefix("aten::"), x), found)
