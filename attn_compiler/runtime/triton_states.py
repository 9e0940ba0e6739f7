"""Runs the Triton kernels of linear attention: keys become a state for each segment, which queries meet beside later keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial

import torch
from torch import Tensor

from attn_compiler.runtime.ahead import Order
from attn_compiler.runtime.kernels import Shape
from attn_compiler.runtime.states import Call
from attn_compiler.runtime.triton_launch import call, load, operand
from attn_compiler.runtime.triton_orders import text
from attn_compiler.runtime.tuning import chosen
from attn_compiler.targets.cpp.spec import Stored
from attn_compiler.targets.cpp.states import GATHERED
from attn_compiler.targets.past import Earlier
from attn_compiler.targets.triton import states
from attn_compiler.targets.triton.blocks import Blocks, Kind

_LOGS = ("at_query", "at_key", "before")


def gather(told: Call, dtype: str) -> None:
    """Fill `out` and `mass` with the sums of a call, whose operands are multiplied as numbers of `dtype`."""
    shape = likely(told, dtype)
    blocks = blocks_of(_meeting(told), shape, told.q.device)
    run = Run(told, shape, blocks.queries)
    if run.count:
        run.add_up(blocks_of("states", shape, told.q.device))
    if run.count > 1:
        run.scan()
    run.meet(blocks)


def _meeting(told: Call) -> Kind:
    """The kernel in which queries meet states."""
    return "gather" if told.past is None else "step"


@dataclass(frozen=True, eq=False)
class Run:
    """The launches of one call, whose queries are cut into tiles of `queries`."""

    told: Call
    shape: Shape
    queries: int

    @cached_property
    def count(self) -> int:
        """How many states of each head are met: one after each segment that all of the last tile see."""
        q_len, k_len = self.told.q.shape[2], self.told.k.shape[2]
        first = (q_len - 1) // self.queries * self.queries
        return min(max(first + self.told.ahead + 1, 0), k_len) // states.SEGMENT

    @cached_property
    def held(self) -> Tensor:
        """Room for the states: heads that share their keys and values have them together, unless decays differ."""
        k, v, logs = self.told.k, self.told.v, self.told.logs
        apart = logs is not None and logs[1].stride(1) != 0
        heads = self.told.out.shape[1] if apart else max(k.shape[1], v.shape[1])
        return k.new_empty((k.shape[0], heads, self.count, k.shape[3] * (v.shape[3] + 1)), dtype=torch.float32)

    def add_up(self, blocks: Blocks) -> None:
        """Let the keys of each segment become a state."""
        k, v = self.told.k, self.told.v
        of_key, of_value = states.widths(k.shape[3], v.shape[3], blocks.width, fading(self.told))
        pieces = -(-k.shape[3] // of_key) * -(-v.shape[3] // of_value)
        given = (*map(self._operand, (k, v)), self.held, self._logs[1], self._sharing, self.count)
        self._start("states", blocks, (self.count * pieces, self.held.shape[1]), given, {"BLOCK_K": blocks.keys})

    def scan(self) -> None:
        """Let each state have what is left of those before it."""
        given = (self.held, self._logs[1], self._sharing, self.count)
        grid = -(-self.held.shape[3] // states.SCANNED), self.held.shape[1]
        self._start("scan", Blocks(), grid, given, {"NUMBERS": states.SCANNED})

    def meet(self, blocks: Blocks) -> None:
        """Let queries meet the states, and the keys behind them."""
        told, (q_len, k_len) = self.told, (self.told.q.shape[2], self.told.k.shape[2])
        operands = [self._operand(x) for x in (told.q, told.k, told.v, told.out)]
        given = (*operands, told.mass, self.held, *self._logs, *self._past, self._sharing, q_len, k_len, told.ahead, self.count)
        _, of_value = states.widths(told.k.shape[3], told.v.shape[3], blocks.width, fading(told))
        grid = -(-q_len // blocks.queries) * -(-told.v.shape[3] // of_value), told.out.shape[1]
        self._start(_meeting(told), blocks, grid, given, blocks.sizes())

    def _start(
        self, kernel: Kind, blocks: Blocks, grid: tuple[int, int], given: tuple[object, ...], sizes: Mapping[str, int]
    ) -> None:
        loaded = load(text(self.shape, kernel, blocks, 0))
        options = {**sizes, "num_warps": blocks.warps, "num_stages": blocks.stages}
        call(self.told.q, getattr(loaded, states.FILES[kernel]), (*grid, self.told.out.shape[0]), given, options)

    def _operand(self, x: Tensor) -> tuple[object, ...]:
        """A pointer and strides, from the last token on where tokens are counted from there."""
        if not self.told.reverse:
            return operand(x)
        batch, heads, token = x.stride()[:3]
        return x[:, :, -1:], batch, heads, -token

    @cached_property
    def _logs(self) -> tuple[tuple[object, ...] | None, ...]:
        """The running logs as floats, and how far behind each of them stands what rounding left of it."""
        return tuple(map(self._halves, self.told.logs)) if self.told.logs else (None, None)

    def _halves(self, log: Tensor) -> tuple[object, ...]:
        log = log.flatten(3) if log.ndim > 4 else log
        high = log.float()
        low = torch.where(high.isinf(), 0.0, log - high)
        halves = torch.stack((high, low.float())) * (-1.0 if self.told.reverse else 1.0)
        return (*self._operand(halves[0]), high.numel())

    @property
    def _past(self) -> tuple[tuple[object, ...] | None, ...]:
        """The state of earlier tokens, and the running log at the last of them."""
        past = self.told.past
        if past is None:
            return None, None
        return operand(past.sums), None if past.log is None else self._halves(past.log)

    @property
    def _sharing(self) -> tuple[int, ...]:
        """How many heads share one of q, of k, of v, a state, and one of the past."""
        told, past = self.told, self.told.past
        shared = (told.q, told.k, told.v, self.held, told.out if past is None else past.sums)
        return tuple(told.out.shape[1] // x.shape[1] for x in shared)


def likely(told: Call, dtype: str) -> Shape:
    """What calls have in common whose kernels are cut alike: their lengths are of one magnitude."""
    (_, _, q_len, dim), (_, _, k_len, value_dim) = told.q.shape, told.v.shape
    fades = fading(told)
    names = (fades,) if fades else ()
    heads = told.out.shape[1], max(told.k.shape[1], told.v.shape[1])
    lengths = 1 << q_len.bit_length(), 1 << k_len.bit_length()
    stored = (Stored("float64", 4 if states.is_apart(fades) else 3),) * len(names)
    return Shape(
        GATHERED, names, stored, True, True, 1, *heads, *lengths, dim, value_dim, dtype, 0, 1, 0, 0, (None,) * len(names)
    )  # fmt: skip


def fading(told: Call) -> states.Fades:
    """What of a state the running logs of a call are those of."""
    if told.logs is None:
        return ""
    of_axes: Mapping[int, states.Fades] = {3: "whole", 4: "rows", 5: "columns"}
    return of_axes[told.logs[0].ndim]


def order(kind: Kind, dim: int, dtype: str, machine: str, blocks: Blocks, fades: states.Fades = "whole") -> Order:
    """A kernel of a call with a decay, as `ahead` takes it."""
    text = states.source(kind, dim, dim, dtype, states.SEGMENT, blocks.width, fades=fades)
    return Order(text, dtype, (), machine, blocks, rows=_LOGS if states.is_apart(fades) else ())


@lru_cache(maxsize=128)
def blocks_of(kind: Kind, shape: Shape, device: torch.device) -> Blocks:
    """How a kernel is cut."""
    return chosen(kind, shape, 0, device, partial(_attempt, kind, shape, device))


def _attempt(kind: Kind, shape: Shape, device: torch.device, blocks: Blocks) -> Callable[[], None]:
    """Launch a kernel on numbers of its own."""
    dtype = torch.bfloat16 if shape.dtype == "bfloat16" else torch.float32

    def drawn(heads: int, tokens: int, dim: int) -> Tensor:
        return torch.randn(1, heads, tokens, dim, dtype=dtype, device=device)

    q, k = drawn(shape.heads, shape.q_len, shape.dim), drawn(shape.kv_heads, shape.k_len, shape.dim)
    v, out = drawn(shape.kv_heads, shape.k_len, shape.value_dim), drawn(shape.heads, shape.q_len, shape.value_dim).float()
    fades = states.named(shape.names)
    numbers = {"rows": (shape.dim,), "columns": (1, shape.value_dim)}.get(fades, ())
    at_q, at_k = (torch.zeros(1, shape.heads, x.shape[2], *numbers, dtype=torch.float64, device=device) for x in (q, k))
    sums, logs = torch.zeros(1, shape.kv_heads, shape.dim, shape.value_dim + 1, device=device), (at_q, at_k) if fades else None
    past = Earlier(sums, at_k[:, :, :1] if fades else None) if kind == "step" else None
    told = Call(q, k, v, out, out[..., 0].clone(), logs, None, shape.k_len - shape.q_len, past=past)
    run = Run(told, shape, blocks.queries)
    return partial(run.add_up if kind == "states" else run.meet, blocks)
