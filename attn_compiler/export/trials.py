"""Random inputs for a program: of the shapes it was traced with, and of others where these may change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import SymInt, Tensor, fx
from torch.export import ExportedProgram

from attn_compiler import torch_private as private

_FILL = -1e4  # a number as low as this is no random one: it hides something
LONG, MOST = 300, 2048  # tokens that are enough to see that blocks fit together; that a comparison takes at most


TRIALS = 2


def runs(
    program: ExportedProgram, module: fx.GraphModule, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Inputs by name for each comparison of a file with its program."""
    leaves, _ = private.tree_flatten((tuple(args), dict(kwargs)))
    names = [str(name) for name in program.graph_signature.user_inputs]
    accepted = [inputs for inputs in trials(program, leaves) if _takes(module, inputs)]
    return [dict(zip(names, inputs, strict=True)) for inputs in accepted[:TRIALS]]


def _takes(model: fx.GraphModule, inputs: Sequence[Any]) -> bool:
    """Whether inputs are such as the program was traced for: relations among sizes are guards, which stand in front."""
    given = dict(zip(model.graph.find_nodes(op="placeholder"), inputs, strict=True))
    for node in model.graph.find_nodes(op="call_module"):
        try:
            model.get_submodule(str(node.target))(*(given[x] for x in node.all_input_nodes))
        except AssertionError:
            return False
    return True


def trials(program: ExportedProgram, leaves: Sequence[Any]) -> list[list[Any]]:
    """The inputs of each comparison."""
    generator = torch.Generator().manual_seed(0)
    count = len(program.graph_signature.input_specs) - len(leaves)
    nodes = program.graph.find_nodes(op="placeholder")[count:]
    return [
        [
            _random(
                node, x, [sizes.get(str(size), int(given)) for size, given in zip(_sizes(node), x.shape, strict=True)], generator
            )
            if isinstance(x, Tensor)
            else x
            for node, x in zip(nodes, leaves, strict=True)
        ]
        for sizes in _changes(program, nodes, leaves)
    ]


def _sizes(node: fx.Node) -> Sequence[int | SymInt]:
    return node.meta["val"].shape  # type: ignore[no-any-return]


def _changes(program: ExportedProgram, nodes: Sequence[fx.Node], leaves: Sequence[Any]) -> list[dict[str, int]]:
    """What the sizes that may change are in each trial: not longer than they need be, then others, then as they were given."""
    found: dict[str, int] = {}
    tied: set[str] = set()
    for node, x in zip(nodes, leaves, strict=True):
        for size, given in zip(_sizes(node), x.shape, strict=True) if isinstance(x, Tensor) else ():
            if isinstance(size, SymInt):
                formula = private.formula(size)
                found[str(formula)] = int(given)
                tied |= set() if formula.is_symbol else {str(symbol) for symbol in formula.free_symbols}
    free = {name: size for name, size in found.items() if name not in tied and name.isidentifier()}
    ranges = {str(symbol): (int(limits.lower), limits.upper) for symbol, limits in program.range_constraints.items()}
    least = {name: ranges[name][0] if name in ranges else 0 for name in free}
    first = {name: max(min(size, LONG), least[name]) for name, size in free.items()}
    long = {name: max(min(size, MOST), least[name]) for name, size in free.items()}
    other = {name: size - 1 if size > max(2, least[name]) else size + 1 for name, size in long.items()}
    fits = all(other[name] <= ranges[name][1] for name in other if name in ranges)
    return [first, *([other] if other and fits else []), *([{}] if first != free else [])]


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
