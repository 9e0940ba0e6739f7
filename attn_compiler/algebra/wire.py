"""Writes a variant as text and reads it back: what an operator in a stored graph needs to be itself again in another process."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

from attn_compiler.algebra.expr import Expr, Sort
from attn_compiler.algebra.integers import IntegerSet
from attn_compiler.algebra.storage import Storage
from attn_compiler.algebra.variant import EmptyRows, Normalizer, Variant
from attn_compiler.errors import AlgebraError

_VERSION = 3


@lru_cache(maxsize=1024)
def write(variant: Variant) -> str:
    """The variant as one line of JSON. The recipes of derived tables are not part of it."""
    nodes: dict[Expr, int] = {}

    def number(root: Expr) -> int:
        for node in root.walk():
            nodes.setdefault(node, len(nodes))
        return nodes[root]

    parts = [("", variant), *((str(heads), group) for heads, group in variant.groups)]
    written = [
        [heads, one.empty_rows.value, one.normalizer.name, one.dropout, one.storage.words(), *map(number, _roots(one))]
        for heads, one in parts
    ]
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
    whole, *groups = (_variant(part, nodes) for part in written)
    named = tuple((IntegerSet.parse(part[0]), group) for part, group in zip(written[1:], groups, strict=True))
    return replace(whole, groups=named)


def _roots(variant: Variant) -> tuple[Expr, ...]:
    return variant.mask, variant.scale, variant.score, variant.normalizer.weight, variant.normalizer.output


def _variant(part: Sequence[object], nodes: Sequence[Expr]) -> Variant:
    _, empty_rows, name, dropout, storage, *roots = part
    mask, scale, score, weight, output = (nodes[root] for root in roots if isinstance(root, int))
    normalizer = Normalizer(str(name), weight, output)
    assert isinstance(storage, list)
    rate = float(str(dropout))
    return Variant(mask, EmptyRows(empty_rows), scale, score, normalizer, dropout=rate, storage=Storage.of(storage))
