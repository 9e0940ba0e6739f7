"""Where queries and keys come from: the activations that they are projections of."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from attn_compiler.graph.axes import rearranges, repeats, source
from attn_compiler.graph.calls import call, equal, is_tensor, shape
from attn_compiler.graph.record import GraphSite

_PROJECTIONS = {"linear": ("input",), "addmm": ("mat1",), "mm": ("self",), "matmul": ("self",), "einsum": ("tensors",)}
_PROJECTIONS |= {"convolution": ("input",), "conv1d": ("input",), "conv2d": ("input",)}
_NORMS = ("layer_norm", "rms_norm", "native_layer_norm", "rsqrt", "mean", "pow", "mul", "add", "sub", "neg", "div", "cat")
_KEPT = ("slice", "select", "chunk", "split", "split_with_sizes", "unbind", "item", "cast", "dropout", "same", "index", "gelu")
_WRITES = {"index_copy": "source", "index_put": "values"}
_LONGEST = 400


@dataclass
class Streams:
    """What one operand is made of."""

    inputs: set[fx.Node] = field(default_factory=set)  # activations it is a projection of
    joined: bool = False  # several streams of tokens, one behind the other
    learned: bool = False  # it depends on nothing but parameters


def streams(node: fx.Node) -> Streams:
    """Follow an operand back to what its projections read."""
    found, seen, stack, learned = Streams(), {node}, [node], True
    while stack and len(seen) < _LONGEST:
        current = stack.pop()
        read = call(current)
        if read.op in _PROJECTIONS and _projects(current):
            start = plain(_first(current))
            if not is_parameter(start):
                found.inputs.add(start)
                learned = False
            continue
        if current.op == "placeholder":
            learned = learned and is_parameter(current)
            continue
        if read.op in _WRITES:  # a cache of fixed size: what is new in it says whose tokens these are
            stack.append(read[_WRITES[read.op]])
            continue
        if read.op == "cat" and len(read["tensors"]) > 1 and _along_tokens(current, node):
            found.joined = True
        if read.op in _NORMS or read.op in _KEPT or _moves(current):
            before = [x for x in current.all_input_nodes if is_tensor(x) or call(x).op in ("chunk", "split", "unbind")]
            stack += [x for x in before if x not in seen]
            seen.update(before)
        elif read.op not in ("arange", "cos", "sin"):
            learned = False
    found.learned = learned
    return found


def same_tokens(site: GraphSite) -> bool:
    """Whether queries and keys are projections of the same activations."""
    queries, keys = streams(site.q.node).inputs, streams(site.k.node).inputs
    return bool(queries) and queries == keys


def plain(node: fx.Node) -> fx.Node:
    """The tensor that views of it are taken of."""
    while is_tensor(node) and (_moves(node) or call(node).op in ("cast", "same")) and isinstance(node.args[0], fx.Node):
        node = source(node)
    return node


def is_parameter(node: fx.Node) -> bool:
    """Whether this is an input that does not change from call to call."""
    return node.op == "get_attr" or (node.op == "placeholder" and ("parameters_" in node.name or "buffers_" in node.name))


def _moves(node: fx.Node) -> bool:
    return is_tensor(node) and node.op == "call_function" and (rearranges(node) or repeats(node) or call(node).op == "view")


def _first(node: fx.Node) -> fx.Node:
    first = call(node).get(_PROJECTIONS[call(node).op][0])
    first = first[0] if isinstance(first, list | tuple) else first
    assert isinstance(first, fx.Node)
    return first


def _projects(node: fx.Node) -> bool:
    """A product with a weight, not of two activations."""
    others = [plain(x) for x in node.all_input_nodes if x is not _first(node)]
    return any(is_parameter(x) for x in others) or call(node).op in ("linear", "addmm")


def _along_tokens(cat: fx.Node, operand: fx.Node) -> bool:
    """Rotary embeddings put halves of heads together, caches put the past before the new; streams of tokens are neither."""
    tensors, dim = call(cat)["tensors"], call(cat)["dim"]
    last = len(shape(cat)) - 1
    if dim % (last + 1) == last or not all(streams_of(x) for x in tensors):
        return False
    return not all(equal(shape(x)[dim], shape(tensors[0])[dim]) for x in tensors) or len(tensors) > 1


def streams_of(node: fx.Node) -> bool:
    return bool(streams(node).inputs)
