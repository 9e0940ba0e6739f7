"""Names sites: the module path, the number of the layer, the line of the model's source."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from attn_compiler import torch_private as private

_KEY = re.compile(r"""\[['"]?([^'"\]]+)['"]?\]""")
_CALL = re.compile(r"@(\d+)$")
_NO_MODULES = ("", "_modules", "__dict__", "_orig_mod")
_SOURCE = re.compile(r'File "([^"]+)", line (\d+)')


def module_path(node: fx.Node) -> str:
    """The module that `node` was called in, as `model.layers.3.self_attn`; empty in a bare function."""
    stack = node.meta.get("nn_module_stack") or {}
    return _dotted(str(list(stack.values())[-1][0])) if stack else ""


def _dotted(path: str) -> str:
    parts = _KEY.sub(r".\1", path).split(".")
    own = parts[2:] if parts[0] in ("L", "G") else parts  # what Dynamo calls the model: a local or a global variable
    return ".".join(part for part in own if part not in _NO_MODULES)


def source_line(node: fx.Node) -> str:
    """File and line of the model's code that made `node`."""
    found = _SOURCE.findall(node.meta.get("stack_trace") or "")
    return f"{found[-1][0]}:{found[-1][1]}" if found else ""


@dataclass(frozen=True)
class Place:
    """Where a site stands: the path of its module, and how often the block around it had been called before."""

    path: str
    call: int = 0

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(self.path.split("."))

    @property
    def numbers(self) -> tuple[int, ...]:
        """The numbers in the path; a block that is called again and again counts like one more."""
        return (*(int(part) for part in self.parts if part.isdigit()), self.call)

    @property
    def shape(self) -> tuple[str, ...]:
        return tuple("*" if part.isdigit() else part for part in self.parts)

    def stack(self, number: int) -> tuple[str, ...]:
        """What comes before one of its numbers: an encoder and a decoder count apart."""
        numbered = [place for place, part in enumerate(self.parts) if part.isdigit()]
        return self.parts[: numbered[number]] if number < len(numbered) else self.parts


def place(node: fx.Node) -> Place:
    """Where `node` stands. A model that is called twice has the same layers twice; a block called twice is two layers."""
    stack: Mapping[str, tuple[object, object]] = node.meta.get("nn_module_stack") or {}
    called = [(_CALL.search(str(key)), _dotted(str(path))) for key, (path, _) in stack.items()]
    whole = module_path(node)
    again, outermost = next(((int(found[1]), path) for found, path in called if found), (0, ""))
    return Place(whole, again if _has_number(outermost) or not _has_number(whole) else 0)


def layer_numbers(places: Sequence[Place]) -> list[tuple[int, int] | tuple[None, None]]:
    """The layer that each site stands in, and how many layers its stack has.

    A path with several numbers (`encoder.layers.1.blocks.0`) counts by the one that varies among paths of the same shape;
    where several vary, such paths are counted through.
    """
    alike: dict[tuple[str, ...], set[tuple[int, ...]]] = defaultdict(set)
    for one in places:
        alike[one.shape].add(one.numbers)
    found = [_layer(one, sorted(alike[one.shape])) for one in places]
    last: dict[tuple[str, ...], int] = {}
    for layer, stack in filter(None, found):
        last[stack] = max(last.get(stack, 0), layer)
    return [(one[0], last[one[1]] + 1) if one else (None, None) for one in found]


def _layer(mine: Place, alike: list[tuple[int, ...]]) -> tuple[int, tuple[str, ...]] | None:
    """The number of a layer, and the stack that it counts in."""
    varying = [at for at, values in enumerate(zip(*alike, strict=True)) if len(set(values)) > 1]
    if len(varying) > 1:
        first = [at for at, part in enumerate(mine.shape) if part == "*"][varying[0]]
        return alike.index(mine.numbers), mine.shape[:first]
    if varying:
        return mine.numbers[varying[0]], mine.stack(varying[0])
    return (mine.numbers[0], mine.stack(0)) if _has_number(mine.path) else None


def _has_number(path: str) -> bool:
    return any(part.isdigit() for part in path.split("."))


def title(node: fx.Node) -> str:
    """What a model calls an input or parameter of its graph, or nothing: `position_ids`, `relative_attention_bias.weight`."""
    if not (name := private.source_name(node)):
        return private.argument_name(node) if node.op == "placeholder" else ""
    own = [word for word in re.findall(r"\w+", name) if word not in ("L", "G", "self", "_modules", "_parameters", "_buffers")]
    return ".".join(own[-2:] if own[-1:] in (["weight"], ["bias"]) else own[-1:])


def parameter_path(node: fx.Node) -> str:
    """What a parameter is called in the module whose frame its graph belongs to, or nothing: `layers.0.proj.weight`."""
    path = re.search(r"(\._(modules|parameters)\['[^']*'\])+$", private.source_name(node))
    return ".".join(re.findall(r"'([^']*)'", path.group())) if path else ""
