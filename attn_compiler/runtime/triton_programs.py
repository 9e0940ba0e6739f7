"""The Triton kernels of a call as programs that run on their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch

from attn_compiler.algebra.feature import component
from attn_compiler.algebra.storage import PLAIN
from attn_compiler.algebra.variant import passed_over
from attn_compiler.errors import ShapeError
from attn_compiler.runtime import triton_decode, triton_kernels
from attn_compiler.runtime.kernels import Shape
from attn_compiler.runtime.triton_launch import sizes
from attn_compiler.runtime.triton_orders import cuts
from attn_compiler.targets.cpp.decode import MOST_QUERIES
from attn_compiler.targets.linear import Linear, linear
from attn_compiler.targets.operands import head_groups
from attn_compiler.targets.triton.blocks import Blocks, candidates
from attn_compiler.targets.triton.clip import ALIKE, TILES, clipping
from attn_compiler.targets.triton.coded import encoder
from attn_compiler.targets.triton.coded import tables as tables_of_codes
from attn_compiler.targets.triton.launch import program, program_clipped, program_for_few, program_of_states
from attn_compiler.targets.triton.precision import TF32, in_memory
from attn_compiler.targets.triton.skeleton import joined
from attn_compiler.targets.triton.states import KERNELS, SCANNED, SEGMENT, Fades, is_apart, source

Programs = tuple[tuple[tuple[int, ...], str], ...]  # and the heads that each is for


def programs(shape: Shape) -> Programs:
    """The kernels that run a call."""
    if any(part.order is not None for part in shape.variant.parts()):
        raise ShapeError("a program of its own cuts blocks of tokens that share scales as they come: leave the `order` out")
    found = gathered(shape)
    if found is not None:
        return ((tuple(range(shape.heads)), _of_states(shape, found)),)
    whole = any(part.dropout or part.storage != PLAIN for part in shape.variant.parts())
    return _for_many(shape) if shape.q_len > MOST_QUERIES or whole else _for_few(shape)


def gathered(shape: Shape) -> Linear | None:
    """What makes a call linear whose keys are added up to states."""
    if shape.variant.groups or passed_over(shape.variant, ("feature", "gates", "seen", "output")):
        return None
    return linear(shape.variant)


def _of_states(shape: Shape, found: Linear) -> str:
    dtype = TF32 if shape.dtype == "float16" else shape.dtype
    fades: Fades = "" if found.fades is None else "rows" if found.fades.mentions(component) else "whole"
    blocks, *_ = candidates("gather", dtype, shape.dim, apart=is_apart(fades))
    sizes = shape.variant.feature.width(shape.dim), shape.value_dim
    kernels = [source(one, *sizes, dtype, SEGMENT, blocks.width, fades=fades) for one in KERNELS]
    own = {
        "OFFSET": shape.k_len if found.behind is None else shape.first_query - shape.first_key - found.behind,
        "FADES": bool(fades),
        "APART": is_apart(fades),
        "SCANNED": SCANNED,
    }
    constants = {**_constants(replace(shape, dtype=dtype), blocks), **own}
    del constants["SIZES"]
    return program_of_states(kernels, constants)


def _for_many(shape: Shape) -> Programs:
    groups = range(len(head_groups(shape.variant, shape.heads)))
    cut = [cuts(shape, "forward", group=group)[0] for group in groups]  # the likeliest: no device has been asked
    found = [triton_kernels.kernel(shape, group, blocks) for group, blocks in zip(groups, cut, strict=True)]
    return tuple((one.members, _alone(one, shape, blocks)) for one, blocks in zip(found, cut, strict=True))


def _alone(one: triton_kernels.Kernel, shape: Shape, blocks: Blocks) -> str:
    visited, own = one.visited, {"MEMBERS": len(one.members)}
    text = joined(one.text, encoder()) if tables_of_codes(one.spec.variant) else one.text
    if visited.tasks is None:
        return program(text, one.spec, _constants(shape, blocks, **own), visited.arrays)
    arrays = {**visited.arrays, **dict(zip(("heads_of", "rows_of", "schedules"), visited.tasks, strict=True))}
    own |= {"TILES": TILES, "ORDERED": visited.iteration.ordered}
    own |= dict(zip(ALIKE, visited.blocks or (), strict=bool(visited.blocks)))
    kernels = text, clipping(one.spec, visited.shown)
    return program_clipped(kernels, one.spec, _constants(shape, blocks, **own), arrays)


def _for_few(shape: Shape) -> Programs:
    found = []
    for one in triton_decode.launches(shape):
        groups = triton_decode.groups_of(one, shape.q_len)
        blocks = replace(cuts(shape, "decode", group=one.group)[0], queries=triton_decode.rows_of(one, shape.q_len))
        count = triton_decode.slices(
            one.reach, shape.q_len, shape.k_len, blocks.keys, shape.batch * groups.count, torch.device("cpu")
        )
        own = {"MEMBERS": len(one.members), "GROUPS": groups.count, "SLICES": count, "PARTS": triton_decode.PARTS}
        visits = dict(zip(("members", "starts", "owners"), map(np.array, groups.numbers), strict=True))
        kernels = triton_decode.sources(one, everything=one.fills)
        found.append((one.members, program_for_few(kernels, one.spec, _constants(shape, blocks, **own), visits)))
    return tuple(found)


def _constants(shape: Shape, blocks: Blocks, **own: int) -> Mapping[str, object]:
    return {
        "BATCH, HEADS, KV_HEADS, Q_LEN, K_LEN": f"{shape.batch}, {shape.heads}, {shape.kv_heads}, {shape.q_len}, {shape.k_len}",
        "BLOCK_Q, BLOCK_K, WARPS, STAGES": f"{blocks.queries}, {blocks.keys}, {blocks.warps}, {blocks.stages}",
        "SIZES": f"{sizes(shape)}  # heads, key heads, queries, keys, layer, layers, first positions of queries and keys",
        "DTYPE": f"torch.{in_memory(shape.dtype)}",
        **own,
    }
