"""Folds caches into the attentions that read them, so that each holds no more than later calls see."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, fx

from attn_compiler.export.called import EXPORTED, WITH_CACHE
from attn_compiler.graph.axes import rearranges, source
from attn_compiler.graph.calls import call, equal, is_tensor, shape, value
from attn_compiler.planning.kept import Kept
from attn_compiler.targets.exported import SCALES, Call
from attn_compiler.targets.onnx.codes import codes_of
from attn_compiler.targets.rows import without_cache

_MOVES = ("transpose", "transpose_last", "transpose_all", "permute", "movedim")


Scales = Mapping[str, Sequence[fx.Node]]  # of the caches that hold codes, by the names of their attentions


def fold(graph: fx.Graph, needs: Mapping[str, Kept], scales: Scales) -> dict[str, list[str]]:
    """Let each attention that is named keep what it needs of its cache, if nobody else reads that; the inputs of those."""
    folded = {}
    for node in graph.find_nodes(op="call_function", target=EXPORTED):
        what = Call.read(node.args[1])
        caches = [cache_of(node, x) for x in node.args[0][1:3]]
        need = needs.get(what.name)
        if need is not None and what.ends_together and None not in caches:
            own = [x for x in caches if x]
            _fold(graph, node, own, replace(what, held=(need.first, need.latest)), scales.get(what.name, ()))
            folded[what.name] = [str(call(x)["tensors"][0]) for x in own]
    graph.eliminate_dead_code()
    return folded


def _fold(graph: fx.Graph, node: fx.Node, caches: Sequence[fx.Node], what: Call, scales: Sequence[fx.Node]) -> None:
    q, _, _, *tables = call(node)["operands"]
    past, new = zip(*(call(x)["tensors"] for x in caches), strict=True)
    if scales:
        codes = codes_of(what.variant)
        what = replace(what, variant=without_cache(what.variant), tables=(*what.tables, *SCALES), codes=codes.bits)
        tables = [*tables, *scales]
        for x in (*past, *caches):
            *sizes, dim = x.meta["val"].shape
            x.meta["val"] = x.meta["val"].new_empty((*sizes, codes.width(dim)), dtype=codes.dtype)
    values = [node.meta["val"], *(x.meta["val"] for x in caches)]
    stand_in(graph, (node, *caches), WITH_CACHE, ([q, *new, *past, *tables], what.write()), values)


def stand_in(
    graph: fx.Graph, replaced: Sequence[fx.Node], target: Any, arguments: tuple[Any, ...], values: Sequence[Tensor]
) -> None:
    """Let one operator give what an attention gave, and hand on something in the place of each cache: `values`, as traced."""
    node, *caches = replaced
    with graph.inserting_before(node):
        made = graph.call_function(target, arguments)
        made.meta = {**node.meta, "val": tuple(values)}
        parts = [graph.call_function(operator.getitem, (made, place)) for place in range(len(values))]
    for part, x in zip(parts, values, strict=True):
        part.meta = {**node.meta, "val": x}
    node.replace_all_uses_with(parts[0])
    for cache, part in zip(caches, parts[1:], strict=True):
        cache.replace_all_uses_with(part, delete_user_cb=lambda user: user.op == "output")
    graph.erase_node(node)


def cache_of(reader: fx.Node, x: fx.Node) -> fx.Node | None:
    """What an input of the program holds and new tokens behind it, if `x` is that, and if `reader` alone reads either."""
    cache = x
    while is_tensor(cache) and _is_view(cache):
        cache = source(cache)
    read = call(cache)
    if read.op != "cat" or len(read["tensors"]) != 2 or read["dim"] % len(shape(cache)) != 2:
        return None
    past, _ = read["tensors"]
    same = len(shape(x)) == len(shape(cache)) and all(map(equal, shape(x), shape(cache)))
    lengths = (shape(past)[2], shape(cache)[2])
    alone = past.op == "placeholder" and {*_readers(past, lengths)} == {cache}
    results = [user for user in cache.users if user.op == "output"]
    readers = [*_readers(cache, lengths)]
    handed_on = [user for user in readers if user.op == "output"] == results != []
    return cache if same and alone and handed_on and {*readers} == {reader, *results} else None


def _is_view(node: fx.Node) -> bool:
    """Whether `node` holds the numbers of its source in the same order."""
    if call(node).op == "expand":
        return len(shape(node)) == len(shape(source(node))) and all(map(equal, shape(node), shape(source(node))))
    return rearranges(node) and call(node).op not in _MOVES


def _readers(node: fx.Node, lengths: tuple[object, ...]) -> Iterator[fx.Node]:
    """Who reads a tensor, or how many tokens it has."""
    for user in node.users:
        counts = call(user).op == "sym_size"
        if counts and not any(equal(value(user), length) for length in lengths):  # type: ignore[arg-type]
            continue
        if counts or (is_tensor(user) and _is_view(user)):
            yield from _readers(user, lengths)
        else:
            yield user
