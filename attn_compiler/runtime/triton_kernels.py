"""Runs generated Triton kernels: what they visit is worked out once for all calls of the same shape, and kept on the device."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attn_compiler.algebra.variant import Variant
from attn_compiler.planning.runs import Integers
from attn_compiler.runtime import compiler, interpreter
from attn_compiler.runtime.kernels import Shape, spec_at
from attn_compiler.runtime.visits import met, walk
from attn_compiler.targets.cpp.spec import Spec
from attn_compiler.targets.operands import head_groups
from attn_compiler.targets.triton.source import Iteration, source


@dataclass(frozen=True)
class Blocks:
    """How a kernel is cut: queries and keys of a tile, warps that share it, and tiles that are loaded ahead."""

    queries: int = 64
    keys: int = 64
    warps: int = 4
    stages: int = 2

    def sizes(self) -> Mapping[str, int]:
        """What kernels call them."""
        return {"BLOCK_Q": self.queries, "BLOCK_K": self.keys}

    def options(self) -> Mapping[str, int]:
        """All that a launch says of them."""
        return {**self.sizes(), "num_warps": self.warps, "num_stages": self.stages}


def candidates(dtype: str, dim: int, *, amd: bool = False) -> tuple[Blocks, ...]:
    """What is worth trying on a GPU, the likeliest first."""
    if amd and dtype != "float32" and dim <= 128:
        return Blocks(128, 64, 4, 1), Blocks(64, 64, 4, 1), Blocks(64, 32, 4, 2)
    if dtype == "float32" or dim > 128:
        return Blocks(64, 32, 4, 2), Blocks(32, 32, 4, 2), Blocks(32, 16, 4, 1)
    return Blocks(128, 64, 8, 3), Blocks(128, 64, 4, 3), Blocks(64, 64, 4, 3), Blocks(64, 64, 4, 2)


@dataclass(frozen=True, eq=False)
class Kernel:
    """The kernel of some of the heads, and the arrays that say what it visits."""

    members: tuple[int, ...]
    spec: Spec
    text: str
    visits: Mapping[str, Integers]


@lru_cache(maxsize=128)
def kernels(shape: Shape, blocks: Blocks) -> tuple[Kernel, ...]:
    """The kernels of a call, its groups of heads one after the other."""
    return tuple(_kernel(shape, members, variant, blocks) for members, variant in head_groups(shape.variant, shape.heads))


def _kernel(shape: Shape, members: tuple[int, ...], variant: Variant, blocks: Blocks) -> Kernel:
    spec = spec_at(shape, variant)
    iteration, visits = visited(shape, members, variant, spec, (blocks.queries, blocks.keys))
    return Kernel(members, spec, source(spec, iteration), visits)


def visited(
    shape: Shape, members: Sequence[int], variant: Variant, spec: Spec, tile: tuple[int, int], *, by_key: bool = False
) -> tuple[Iteration, Mapping[str, Integers]]:
    """How a kernel goes over what its tiles of queries meet, or its tiles of keys, and the arrays that say so."""
    found = met(shape, members, variant.mask, spec.variant.mask, tile, by_key=by_key)
    steps = walk(found)
    orders = [np.zeros(1, np.int64) if x is None else x for x in (found.row_order, found.column_order)]
    arrays = (np.array(members), found.schedule_of, steps.numbers, steps.listed, *orders)
    names = ("members", "schedule_of", "met", "listed", *(("k_order", "q_order") if by_key else ("q_order", "k_order")))
    return Iteration(steps.stretches, found.row_order is not None), dict(zip(names, arrays, strict=True))


def on_device(arrays: Iterable[Integers], device: torch.device) -> tuple[Tensor, ...]:
    """Arrays as kernels read them."""
    return tuple(torch.from_numpy(np.ascontiguousarray(x, np.int32)).to(device) for x in arrays)


@dataclass(frozen=True, eq=False)
class Launch:
    """A kernel, loaded, with what it visits on the device."""

    kernel: Any
    visits: tuple[Tensor, ...]
    numbers: tuple[int, ...]  # the places of its tables among those of the call


@lru_cache(maxsize=128)
def launches(shape: Shape, blocks: Blocks, device: torch.device) -> tuple[Launch, ...]:
    """The launches of a call."""
    found = []
    for one in kernels(shape, blocks):
        numbers = tuple(shape.names.index(name) for name, _ in one.spec.tables)
        found.append(Launch(load(one.text).forward, on_device(one.visits.values(), device), numbers))
    return tuple(found)


def run(
    shape: Shape,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    totals: Tensor | None,
    tables: Sequence[Tensor],
    *,
    for_gradients: bool,
) -> None:
    """Fill `out` and `totals`: the log-sum-exp of each query, or its peak and its mass."""
    totals, kept = (None, totals) if for_gradients else (totals, None)
    blocks = Blocks()
    for one in launches(shape, blocks, q.device):
        grid = -(-shape.q_len // blocks.queries), len(one.visits[0]), shape.batch
        read = tuple(table(tables[n]) for n in one.numbers)
        operands = (operand(x) for x in (q, k, v, out))
        call(q, one.kernel, grid, (*operands, totals, kept, one.visits, read, *sizes(shape)), blocks.options())


def call(of: Tensor, kernel: Any, grid: tuple[int, ...], arguments: Sequence[object], options: Mapping[str, int]) -> None:
    """Launch a kernel on the device of a tensor: Triton itself would take the current one."""
    with torch.cuda.device_of(of), interpreter.quiet():  # type: ignore[no-untyped-call]
        kernel[grid](*arguments, **options)


def sizes(shape: Shape) -> tuple[int, ...]:
    """What kernels know of the size of a call."""
    counts = (shape.heads, shape.kv_heads, shape.q_len, shape.k_len, shape.layer, shape.layers)
    return (*counts, shape.first_query, shape.first_key)


def operand(x: Tensor) -> tuple[object, ...]:
    """A pointer and the strides of batch, heads and tokens."""
    return (x, *x.stride()[:3])


def table(x: Tensor) -> tuple[object, ...]:
    """A pointer, sizes and strides."""
    return x, tuple(x.shape), tuple(x.stride())


@lru_cache(maxsize=256)
def load(text: str) -> Any:
    """The module that a text is: Triton compiles functions of files."""
    if interpreter.is_interpreting():
        interpreter.mend()
    path = compiler.module(text)
    spec = importlib.util.spec_from_file_location(f"attn_kernel_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
