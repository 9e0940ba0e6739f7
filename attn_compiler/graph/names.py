"""Names sites: the module path, the number of the layer, the line of the model's source."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence

from torch import fx

_KEY = re.compile(r"""\[['"]?([^'"\]]+)['"]?\]""")
_SOURCE = re.compile(r'File "([^"]+)", line (\d+)')


def module_path(node: fx.Node) -> str:
    """The module that `node` was called in, as `model.layers.3.self_attn`; empty in a bare function."""
    stack = node.meta.get("nn_module_stack") or {}
    path = str(list(stack.values())[-1][0]) if stack else ""
    parts = _KEY.sub(r".\1", path).split(".")
    own = parts[2:] if parts[0] in ("L", "G") else parts  # what Dynamo calls the model: a local or a global variable
    return ".".join(part for part in own if part not in ("", "_modules", "_orig_mod"))


def source_line(node: fx.Node) -> str:
    """File and line of the model's code that made `node`."""
    found = _SOURCE.findall(node.meta.get("stack_trace") or "")
    return f"{found[-1][0]}:{found[-1][1]}" if found else ""


def layer_numbers(names: Sequence[str]) -> list[int | None]:
    """The layer that each name stands in.

    A path with several numbers (`encoder.layers.1.blocks.0`) counts by the one that varies among paths of the same shape;
    where several vary, such paths are counted through.
    """
    alike: dict[str, set[tuple[int, ...]]] = defaultdict(set)
    for name in names:
        alike[_shape(name)].add(_numbers(name))
    return [_layer(_numbers(name), sorted(alike[_shape(name)])) for name in names]


def _layer(mine: tuple[int, ...], alike: list[tuple[int, ...]]) -> int | None:
    if not mine:
        return None
    varying = [place for place, values in enumerate(zip(*alike, strict=True)) if len(set(values)) > 1]
    if len(varying) > 1:
        return alike.index(mine)
    return mine[varying[0]] if varying else mine[0]


def _numbers(name: str) -> tuple[int, ...]:
    return tuple(int(part) for part in name.split(".") if part.isdigit())


def _shape(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
