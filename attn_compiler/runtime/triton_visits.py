"""What a Triton kernel visits, on the device: known ahead, or cut to what the tables of a call show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from attn_compiler.runtime.triton_launch import call, load, on_device
from attn_compiler.runtime.visits import Visited
from attn_compiler.targets.cpp.spec import Spec
from attn_compiler.targets.triton.blocks import Blocks
from attn_compiler.targets.triton.clip import ALIKE, TILES, clipping

WARPS = 4


@dataclass(frozen=True, eq=False)
class Visits:
    """The arrays of one launch by name, and the kernel that cuts them, if any."""

    arrays: Mapping[str, Tensor]
    kernel: Any | None = None
    tiles: int = 0  # of a schedule
    others: int = 0  # that each of them may meet, where those it does are listed
    tasks: tuple[Tensor, ...] = ()
    orders: tuple[Tensor | None, ...] = ()
    options: Mapping[str, int] = field(default_factory=dict)

    def of_call(self, of: Tensor, tables: object, sizes: Sequence[int]) -> tuple[Tensor, ...]:
        """The arrays of one call, in the order in which kernels take them. `of` is one of its operands."""
        if self.kernel is None:
            return tuple(self.arrays.values())
        spans, tiles = self.arrays["met"], (len(self.tasks[0]), self.tiles)
        stretches = (1, 2) if self.others else spans.shape[1:]
        found = {"met": spans.new_empty((*tiles, 2, *stretches))}
        found |= {"listed": spans.new_empty((*tiles, self.others))} if self.others else {}
        call(of, self.kernel, tiles[::-1], (spans, *found.values(), self.tasks, self.orders, tables, *sizes), self.options)
        return tuple({**self.arrays, **found}.values())


def visits_of(spec: Spec, found: Visited, blocks: Blocks, device: torch.device, *, by_key: bool = False) -> Visits:
    """What a kernel visits, put on a device."""
    arrays = dict(zip(found.arrays, on_device(found.arrays.values(), device), strict=True))
    if found.tasks is None:
        return Visits(arrays)
    module = load(clipping(spec, found.shown, by_key=by_key))
    options = {**blocks.sizes(), "SPANS": found.arrays["met"].shape[1], "TILES": TILES, "num_warps": WARPS}
    orders = tuple(arrays[name] if found.iteration.ordered else None for name in ("q_order", "k_order"))
    tiles = len(found.arrays["met"]) // (1 + int(found.tasks[2].max()))
    on_its_way = Visits(arrays, None, tiles, 0, on_device(found.tasks, device), orders, options)
    if found.blocks is None:
        return replace(on_its_way, kernel=module.clip)
    alike = dict(zip(ALIKE, found.blocks, strict=True))
    return replace(on_its_way, kernel=module.sift, others=found.others, options=options | alike)
