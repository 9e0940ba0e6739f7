"""How a Triton kernel is cut on a device: of what compiles well for it ahead of time, what is fastest there; kept on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from importlib.metadata import version

import torch
from torch import Tensor

from attn_compiler.runtime.ahead import Compiled, Order, compile_each, is_sound
from attn_compiler.runtime.kernels import Shape
from attn_compiler.runtime.machine import known
from attn_compiler.runtime.triton_orders import cuts, order, suits
from attn_compiler.targets.triton.blocks import Blocks, Kind
from attn_compiler.targets.triton.precision import in_memory

INTERPRETED = (Blocks(),)  # the interpreter runs whatever it is given
ROUNDS = 5

Attempt = Callable[[Blocks], Callable[[], None]]  # makes a launch of a kernel that is cut so


def chosen(
    kind: Kind,
    shape: Shape,
    group: int,
    device: torch.device,
    attempt: Attempt,
    *,
    queries: int | None = None,
    describable: bool = False,
    wanted: Collection[str] = (),
) -> Blocks:
    """How the kernel for one of a call's groups of heads is cut on a device; measured once for lengths of the same magnitude.

    `queries` is how many rows a tile has where that is no choice, `describable` whether operands can be copied tile by tile;
    `wanted` are the tables that want gradients.
    """
    on_device = device.type == "cuda"
    machine = machine_of(device) if on_device else ""
    some = cuts(shape, kind, machine, group) if on_device else INTERPRETED
    some = tuple(replace(x, queries=queries or x.queries) for x in some if not x.specialized or describable)
    some = tuple(blocks for blocks in some if suits(shape, blocks, group))
    if not on_device or torch.cuda.is_current_stream_capturing():  # nothing can be measured now
        return some[0]
    orders = [order(shape, kind, blocks, machine, group, wanted) for blocks in some]
    return some[int(known(question(kind, shape, orders, device), lambda: best(orders, lambda n: milliseconds(attempt(some[n])))))]


def best(orders: Sequence[Order], time: Callable[[int], float]) -> int:
    """The number of the fastest order among those that are sound; where none is, among those that compile and fit."""
    found = compile_each(orders)
    compiled = [(n, one, orders[n]) for n, one in enumerate(found) if isinstance(one, Compiled) and one.fits(orders[n].machine)]
    sound = [n for n, one, given in compiled if is_sound(one, given)]
    left = sound or [n for n, *_ in compiled] or [0]
    return left[0] if len(left) == 1 else min(left, key=time)


def question(kind: Kind, shape: Shape, orders: Sequence[Order], device: torch.device) -> str:
    """What is asked: the kernel by its text, the magnitude of its lengths, the device, Triton's version."""
    kernels = hashlib.sha256("".join(f"{one.text}{one.blocks}" for one in orders).encode()).hexdigest()[:16]
    lengths = f"{shape.q_len.bit_length()} and {shape.k_len.bit_length()} bits of tokens"
    heads = f"{shape.heads} and {shape.kv_heads} heads of {shape.dtype}"
    name = torch.cuda.get_device_name(device)
    return f"tiles of {kind} {kernels}, {heads}, {lengths}, on {name} by Triton {version('triton')}"


def machine_of(device: torch.device) -> str:
    """What `ahead` calls a device."""
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def milliseconds(run: Callable[[], None]) -> float:
    """The shortest of some runs."""
    run()
    return min(_milliseconds(run) for _ in range(ROUNDS))


def _milliseconds(run: Callable[[], None]) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop))


def example(shape: Shape, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """Queries, keys, values, room for a result, and tables of one number each: an index outside is moved to the border."""
    dtype = getattr(torch, in_memory(shape.dtype))

    def drawn(heads: int, tokens: int, dim: int) -> Tensor:
        return torch.randn(shape.batch, heads, tokens, dim, dtype=dtype, device=device)

    q, k = drawn(shape.heads, shape.q_len, shape.dim), drawn(shape.kv_heads, shape.k_len, shape.dim)
    v, out = drawn(shape.kv_heads, shape.k_len, shape.value_dim), drawn(shape.heads, shape.q_len, shape.value_dim)
    return q, k, v, out, [torch.ones((1,) * x.axes, dtype=getattr(torch, x.dtype), device=device) for x in shape.stored]
