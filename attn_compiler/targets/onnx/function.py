"""Builds the local function `attn::<site>` of one exported attention: standard operators, made from its variant."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import onnx_ir as ir

from attn_compiler.algebra import expr as e
from attn_compiler.algebra.expr import acc
from attn_compiler.algebra.variant import EmptyRows, How, Variant
from attn_compiler.planning.kept import FAR
from attn_compiler.planning.layout import dilation
from attn_compiler.targets.exported import SCALES, UNROTATED, Call, Spec
from attn_compiler.targets.linear import linear
from attn_compiler.targets.onnx import attention, contrib, formula
from attn_compiler.targets.onnx.cache import appended, latest_of, let_go
from attn_compiler.targets.onnx.choice import shortest
from attn_compiler.targets.onnx.corrected import corrected
from attn_compiler.targets.onnx.dense import dense
from attn_compiler.targets.onnx.either import either
from attn_compiler.targets.onnx.fit import closed, is_static, sees_alike
from attn_compiler.targets.onnx.formula import Block, Group
from attn_compiler.targets.onnx.listed import listed
from attn_compiler.targets.onnx.mapped import by_query_heads, mapped
from attn_compiler.targets.onnx.mixing import mixed
from attn_compiler.targets.onnx.nodes import DTYPES, Nodes
from attn_compiler.targets.onnx.operators import latest, scaled_ahead
from attn_compiler.targets.onnx.opsets import OPSET
from attn_compiler.targets.onnx.scan import scan
from attn_compiler.targets.onnx.scope import All, Inputs, Scope, picked, real_of
from attn_compiler.targets.onnx.stacked import by_lists, in_reach
from attn_compiler.targets.onnx.states import State, continued, gathered_by, ones_beside, states
from attn_compiler.targets.operands import head_groups, kv_owners
from attn_compiler.targets.reach import sides
from attn_compiler.targets.walk import Contents, walks

DOMAIN = "attn"
Strategy = Callable[[Group], ir.Value]
STACKED: Mapping[str, Strategy] = {"batched": attention.attend, "matmul": formula.attend}


def function(spec: Spec, strategy: str, contents: Contents, opset: int = OPSET) -> ir.Function:
    """The function of one attention; its inputs are q, k, v, the past of its cache if it has one, and the tables.

    `contents` are those of the tables that are known already. Its operators are the same in all of `OPSETS`.
    """
    nodes = Nodes()
    q, k, v = given = [ir.Value(name=name) for name in ("q", "k", "v")]
    past = [ir.Value(name=name) for name in _past(spec.call)]
    tables = {name: ir.Value(name=f"table{place}_{name.replace('.', '_')}") for place, name in enumerate(spec.call.tables)}
    if spec.call.held and not spec.call.codes:
        k, v = (appended(nodes, old, new) for old, new in zip(past, (k, v), strict=True))
    shown = {name: latest_of(nodes, x, k) if spec.call.held and name in spec.call.along_keys else x for name, x in tables.items()}
    inputs = Inputs(q, k, v, shown)
    if spec.call.codes:
        out, *held = _coded(spec, nodes, replace(inputs, k=given[1], v=given[2]), past)
    elif spec.call.remembers:
        out, *held = _continued(spec, nodes, inputs, State(*past))
    else:
        out = _attention(spec, nodes, inputs, strategy, contents)
        held = [k, v] if spec.call.held else []
    if spec.call.held and spec.call.held[1] < FAR:
        held = [let_go(nodes, x, *spec.call.held) for x in held]
    graph = ir.Graph(
        [*given, *past, *tables.values()],
        [out, *held],
        nodes=[*nodes.shared.front, *nodes.written],
        opset_imports={"": opset} | {node.domain: 1 for node in nodes.written if node.domain},
        name=spec.call.name,
    )
    return ir.Function(DOMAIN, spec.call.name, graph=graph, attributes=[])


def _past(call: Call) -> tuple[str, ...]:
    return ("past_key", "past_value") if call.held else ("past_state", "past_seen") if call.remembers else ()


def _continued(spec: Spec, nodes: Nodes, inputs: Inputs, past: State) -> tuple[ir.Value, ir.Value, ir.Value]:
    """What all heads compute where the past is a state, and the state after them; a chunk of one size is apart from one token."""
    variant = spec.call.variant
    if is_static(spec) or (variant.delta is None and variant.gates is None):
        return _behind(spec, nodes, inputs, past)

    def branch(here: Spec) -> Callable[[Nodes], tuple[Sequence[ir.Value], Sequence[ir.Value]]]:
        return lambda inner: ([], _behind(here, inner, inputs, past))

    one = nodes.op("Equal", nodes.size(inputs.q, 2), nodes.index(1))
    results = nodes.named("attended"), nodes.named("sums"), nodes.named("count")
    bodies = {"then_branch": _at_one_token(spec), "else_branch": spec}
    nodes.write("If", [one], results, {name: nodes.inside(branch(here), name) for name, here in bodies.items()})
    return results


def _at_one_token(spec: Spec) -> Spec:
    """The same where a call brings a single token: tables along the tokens have one row, or one more than that."""
    known = {spec.q_len: 1, f"{spec.q_len} + 1": 2}
    stored = tuple(replace(x, shape=tuple(known.get(size, size) for size in x.shape)) for x in spec.stored)
    return replace(spec, stored=stored, q_len=1, k_len=1)


def _behind(spec: Spec, nodes: Nodes, inputs: Inputs, past: State) -> tuple[ir.Value, ir.Value, ir.Value]:
    """The same in one way for any number of tokens."""
    variant = spec.call.variant
    found, group = linear(variant), _group(spec, nodes, inputs, range(spec.heads), variant)
    assert found is not None
    sums = nodes.slice(past.sums, 3, 0, spec.value_dim)
    out, state = continued(corrected(group, found, spec.value_dim, sums), found, past)
    assert state is not None
    return _cast(nodes, out, group.scope.real, spec.dtype), state.sums, state.count


def _coded(spec: Spec, nodes: Nodes, inputs: Inputs, past: Sequence[ir.Value]) -> tuple[ir.Value, ...]:
    """What all heads compute where the cache holds codes, and the codes of all tokens."""
    group = _group(spec, nodes, inputs, range(spec.heads), spec.call.variant)
    shown = latest(spec.call.variant.mask)
    assert shown is not None
    return contrib.with_codes(group, shown, past, [inputs.tables[name] for name in SCALES], spec.call.codes)


def _attention(spec: Spec, nodes: Nodes, inputs: Inputs, strategy: str, contents: Contents) -> ir.Value:
    """What all heads compute."""
    groups = [
        part for heads, own in head_groups(spec.call.variant, spec.heads) for part in _parts(spec, heads, own, strategy, contents)
    ]
    outs = [_heads(spec, nodes, inputs, heads, variant, run) for heads, variant, run in groups]
    joined = outs[0] if len(outs) == 1 else nodes.op("Concat", *outs, axis=1)
    order = [head for heads, _, _ in groups for head in heads]
    return _cast(nodes, picked(nodes, joined, np.argsort(order).tolist(), spec.heads, 1), real_of(spec), spec.dtype)


def _parts(
    spec: Spec, heads: Sequence[int], variant: Variant, strategy: str, contents: Contents
) -> Iterator[tuple[Sequence[int], Variant, Strategy]]:
    """Heads that are computed together, and how."""
    if strategy == "listed":
        for members, walk in walks(spec, heads, variant, contents):
            yield members, variant, partial(listed, walk=walk)
    elif strategy == "contrib":
        yield heads, variant, _own_operator(spec, variant)
    elif strategy in STACKED:
        yield from _stacked(spec, heads, variant, STACKED[strategy], contents)
    elif strategy in ("states", "branches"):
        yield heads, variant, _own(variant)
    elif strategy == "either":
        yield heads, variant, partial(either, below=shortest(spec, variant))
    else:
        yield heads, variant, {"dense": dense, "scan": scan}[strategy]


def _stacked(
    spec: Spec, heads: Sequence[int], variant: Variant, attend: Strategy, contents: Contents
) -> Iterator[tuple[Sequence[int], Variant, Strategy]]:
    """Blocks side by side: of keys in reach where all see equally many, else of keys from lists."""
    if is_static(spec) and not sees_alike(spec, variant):
        for members, walk in walks(spec, heads, variant, contents):
            yield members, variant, partial(by_lists, attend=attend, walk=walk)
    else:
        yield heads, variant, partial(in_reach, attend=attend)


def _own_operator(spec: Spec, variant: Variant) -> Strategy:
    """The operator of onnxruntime for a variant."""
    found, shown = linear(variant), latest(spec.in_positions(variant.mask))
    if found is not None:
        return partial(gathered_by, found=found, gather=contrib.linear_attention)
    assert shown is not None
    return partial(contrib.group_query, shown=shown)


def _own(variant: Variant) -> Strategy:
    """The body for a variant, where nothing but the variant decides."""
    found = linear(variant)
    return scan if found is None else partial(states, found=found)


def _heads(spec: Spec, nodes: Nodes, inputs: Inputs, heads: Sequence[int], variant: Variant, strategy: Strategy) -> ir.Value:
    """What some of the heads compute, branch by branch where there are any."""
    mix = variant.mix
    if mix is None:
        group = _group(spec, nodes, inputs, heads, variant)
        return _computed(corrected(group, linear(variant), spec.value_dim), strategy)
    branches = [branch for _, branch in mix.branches]
    wide, given = spec, inputs
    if mix.how is How.SHARED:
        wide, given = replace(spec, value_dim=spec.value_dim + 1), replace(inputs, v=ones_beside(nodes, inputs.v, spec.dtype))
        branches = [replace(one, normalizer=replace(one.normalizer, output=acc)) for one in branches]
    groups = [corrected(_group(wide, nodes, given, heads, one), linear(one), spec.value_dim) for one in branches]
    outs = [_computed(group, _own(one)) for group, one in zip(groups, branches, strict=True)]
    return mixed(replace(groups[0].scope, spec=spec), mix, outs)


def _computed(group: Group, strategy: Strategy) -> ir.Value:
    """What some of the heads compute by one formula."""
    return (strategy if _suits(group, strategy) else dense)(group)


def _group(spec: Spec, nodes: Nodes, inputs: Inputs, heads: Sequence[int], variant: Variant) -> Group:
    """Some of the heads, their operands mapped and scaled."""
    kv = kv_owners(heads, spec.heads // spec.kv_heads)
    earlier = dict(zip(("q", "k"), UNROTATED, strict=True))
    q, k = (inputs.tables[earlier[name]] if name in variant.unrotated else x for name, x in (("q", inputs.q), ("k", inputs.k)))
    q = picked(nodes, q, heads, spec.heads, 1)
    k, v = (picked(nodes, x, kv, spec.kv_heads, 1) for x in (k, inputs.v))
    q_len = spec.q_len if isinstance(spec.q_len, int) else nodes.size(inputs.q, 2)
    k_len = spec.k_len if isinstance(spec.k_len, int) else nodes.size(inputs.k, 2)
    scope = Scope(spec, nodes, inputs, tuple(heads), All(q_len), All(k_len))
    q, k, v = (_cast(nodes, x, spec.dtype, scope.real) for x in (q, k, v))
    block, placed = mapped(scope, Block(q, k, v, len(kv)), spec.in_places(variant))
    if variant.gates is not None:
        block = by_query_heads(scope, block)
    if scaled_ahead(placed):
        block = replace(block, q=nodes.op("Mul", block.q, scope.scores.real_tensor(placed.scale)))
    empty = None if spec.always_sees(variant) else _empty(scope, v, len(heads) // len(kv), variant.empty_rows)
    mask = spec.in_positions(variant.mask)
    step = dilation(mask) if spec.position == e.i and spec.q_len == spec.k_len else 1
    return Group(scope, block, placed, empty, sides(mask), spec.first, step)


def _suits(group: Group, run: Strategy) -> bool:
    """Whether a block of queries can do with some of the keys; a row that is empty may be of all of them."""
    whole = group.variant.empty_rows is EmptyRows.UNMASKED and group.empty is not None
    kind = run.func if isinstance(run, partial) else run
    if kind in (listed, by_lists):
        return not whole
    if isinstance(run, partial) and kind in (states, gathered_by):
        return scaled_ahead(group.variant) and (run.keywords["found"].behind is None or group.first is not None)
    if kind is contrib.group_query:
        return True
    if group.variant.gates is not None:
        return False
    if kind is in_reach and not closed(group.sides, group.step):
        return False
    return not whole and group.first is not None and (group.sides.bounded or group.step > 1)


def _cast(nodes: Nodes, x: ir.Value, held: str, wanted: str) -> ir.Value:
    return x if held == wanted else nodes.op("Cast", x, to=int(DTYPES[wanted]))


def _empty(scope: Scope, v: ir.Value, ratio: int, rule: EmptyRows) -> ir.Value:
    """What a query that sees no key gets."""
    nodes = scope.nodes
    if rule is EmptyRows.MEAN:
        mean = nodes.op("ReduceMean", v, nodes.vector(2), keepdims=1)
        owners = [head // ratio for head in range(len(scope.heads))]
        return nodes.op("Gather", mean, nodes.constant(owners, "int64"), axis=1)
    return nodes.constant(np.nan if rule is EmptyRows.NAN else 0.0, scope.real)
