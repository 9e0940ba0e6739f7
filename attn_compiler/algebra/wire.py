"""Writes a variant as text and reads it back: what an operator in a stored graph needs to be itself again in another process."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any

from attn_compiler.algebra.context import read_context
from attn_compiler.algebra.expr import Expr, Sort
from attn_compiler.algebra.feature import Block, Feature
from attn_compiler.algebra.integers import IntegerSet
from attn_compiler.algebra.output import Local, Step
from attn_compiler.algebra.storage import Storage
from attn_compiler.algebra.variant import EmptyRows, How, Mix, Normalizer, Variant
from attn_compiler.errors import AlgebraError

_VERSION = 12
Written = Mapping[str, Any]
Number = Callable[[Expr], int]
Node = Callable[[int], Expr]


@lru_cache(maxsize=1024)
def write(variant: Variant) -> str:
    """The variant as one line of JSON. The recipes of derived tables, and of made ones, are not part of it."""
    nodes: dict[Expr, int] = {}

    def number(root: Expr) -> int:
        for node in root.walk():
            nodes.setdefault(node, len(nodes))
        return nodes[root]

    written = _written(variant, number)
    listed = [[node.op, [nodes[a] for a in node.args], node.value, node.sort.value] for node in nodes]
    return json.dumps([_VERSION, listed, written], separators=(",", ":"))


@lru_cache(maxsize=1024)
def read(text: str) -> Variant:
    """The variant that was written."""
    version, listed, written = json.loads(text)
    if version != _VERSION:
        raise AlgebraError(f"a variant of the wire format {version}, where this release reads {_VERSION}: compile again")
    nodes: list[Expr] = []
    for op, args, value, sort in listed:
        nodes.append(Expr(op, tuple(nodes[a] for a in args), value, Sort(sort)))
    return _variant(written, nodes.__getitem__)


def _written(variant: Variant, number: Number) -> Written:
    normalizer, mix = variant.normalizer, variant.mix
    return {
        "mask": number(variant.mask),
        "empty rows": variant.empty_rows.value,
        "scale": number(variant.scale),
        "score": number(variant.score),
        "normalizer": [normalizer.name, *map(number, normalizer.expressions())],
        "feature": [variant.feature.name, *(_blocks(side, number) for side in (variant.feature.of_q, variant.feature.of_k))],
        "mix": None if mix is None else _written_mix(mix, number),
        "groups": [[str(heads), _written(of_group, number)] for heads, of_group in variant.groups],
        "dropout": variant.dropout,
        "storage": variant.storage.words(),
        "order": None if variant.order is None else number(variant.order),
        "delta": None if variant.delta is None else number(variant.delta),
        "gates": None if variant.gates is None else number(variant.gates),
        "output": [_step(step, number) for step in variant.output],
        "context": [one.words() for one in variant.context],
        "unrotated": list(variant.unrotated),
    }


def _blocks(blocks: Iterable[Block], number: Number) -> list[list[object]]:
    return [[number(b.each), b.power, None if b.weights is None else number(b.weights), b.softmax] for b in blocks]


def _written_mix(mix: Mix, number: Number) -> list[object]:
    branches = [[name, _written(branch, number)] for name, branch in mix.branches]
    return [mix.how.value, branches, [number(weight) for weight in mix.weights]]


def _variant(written: Written, node: Node) -> Variant:
    normalizer, *ways = written["normalizer"]
    name, *sides = written["feature"]
    return Variant(
        mask=node(written["mask"]),
        empty_rows=EmptyRows(written["empty rows"]),
        scale=node(written["scale"]),
        score=node(written["score"]),
        normalizer=Normalizer(normalizer, *map(node, ways)),
        feature=Feature(name, *(tuple(_block(block, node) for block in side) for side in sides)),
        mix=None if written["mix"] is None else _mix(written["mix"], node),
        groups=tuple((IntegerSet.parse(heads), _variant(of_group, node)) for heads, of_group in written["groups"]),
        dropout=float(written["dropout"]),
        storage=Storage.of(written["storage"]),
        order=None if written["order"] is None else node(written["order"]),
        delta=None if written["delta"] is None else node(written["delta"]),
        gates=None if written["gates"] is None else node(written["gates"]),
        output=tuple(_read_step(step, node) for step in written["output"]),
        context=tuple(map(read_context, written["context"])),
        unrotated=tuple(written["unrotated"]),
    )


def _step(step: Step, number: Number) -> object:
    if isinstance(step, Expr):
        return number(step)
    bias = None if step.bias is None else number(step.bias)
    return [list(step.sizes), number(step.weights), bias, list(step.grid), step.before, step.centered]


def _read_step(written: Any, node: Node) -> Step:
    if isinstance(written, int):
        return node(written)
    sizes, weights, bias, grid, before, centered = written
    return Local(tuple(sizes), node(weights), None if bias is None else node(bias), tuple(grid), before, centered)


def _block(written: list[Any], node: Node) -> Block:
    each, power, weights, softmax = written
    return Block(node(each), power, None if weights is None else node(weights), softmax)


def _mix(written: list[Any], node: Node) -> Mix:
    how, branches, weights = written
    return Mix(How(how), tuple((name, _variant(branch, node)) for name, branch in branches), tuple(map(node, weights)))
