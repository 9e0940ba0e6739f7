"""The operator that adds keys up to states in generated C++; its gradients are itself, so there are as many as one likes.

With weight = left * (q · k), where `left` is what a decay leaves of a key, the gradient of a weight is above · v + of_mass. So
each gradient gathers by weights that are products again: with [above, of_mass] and [v, 1] in the places of q and k, and with
queries in the places of keys, which then are met from the other side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attn_compiler.runtime.states import Call
from attn_compiler.runtime.states import gather as run
from attn_compiler.targets.fading import Logs
from attn_compiler.targets.gathered import Count, Gather

_library = torch.library.Library("attn_compiler", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "gather(Tensor q, Tensor k, Tensor v, Tensor[] logs, SymInt offset, bool reverse) -> (Tensor, Tensor)"
)


def _by_kernel(q: Tensor, k: Tensor, v: Tensor, logs: Logs | None, offset: Count | None) -> tuple[Tensor, Tensor]:
    acc, mass = torch.ops.attn_compiler.gather(q, k, v, list(logs or ()), k.shape[2] if offset is None else offset, False)
    return acc, mass[..., None]


BY_KERNEL = Gather(_by_kernel, dynamic=True)


def _gather(q: Tensor, k: Tensor, v: Tensor, logs: Sequence[Tensor], offset: int, reverse: bool) -> tuple[Tensor, Tensor]:
    out, mass = _empty(q, k, v)
    if not (out.numel() and k.numel() and q.numel()):
        return out.zero_(), mass.zero_()
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    given = (logs[0], logs[1]) if logs else None
    # Backwards the kernel counts queries from the last one: so do their masses.
    run(Call(q, k, v, out, mass, given, None, offset, reverse))
    return out, mass.flip(-1) if reverse else mass


def _empty(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Room for the sums, laid out as models want them: they transpose heads and tokens, which then costs nothing."""
    batch, heads, q_len = q.shape[0], max(q.shape[1], k.shape[1]), q.shape[2]
    out = q.new_empty((batch, q_len, heads, v.shape[3])).transpose(1, 2)
    return out, q.new_empty((batch, heads, q_len), dtype=torch.float32)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, logs, ctx.offset, ctx.reverse = inputs
    ctx.save_for_backward(q, k, v, *logs)


def _differentiate(ctx: Any, above: Tensor, of_mass: Tensor) -> tuple[object, ...]:
    q, k, v, *logs = ctx.saved_tensors
    gather = torch.ops.attn_compiler.gather
    from_query, from_key = torch.cat([above, of_mass[..., None]], dim=-1), torch.cat([v, v.new_ones((*v.shape[:-1], 1))], dim=-1)
    here, there = (logs, ctx.offset, ctx.reverse), (logs[::-1], -ctx.offset, not ctx.reverse)
    of_q = gather(from_query, from_key, k, *here)[0]
    of_k = gather(from_key, from_query, q, *there)[0]
    of_v = gather(k, q, above, *there)[0]
    of_logs: list[Tensor | None] = [None for _ in logs]
    if any(ctx.needs_input_grad[3] or ()):  # a weight times its gradient is what both its logs ask for
        of_logs = [_along(q, of_q, ctx.reverse), _along(k, of_k, not ctx.reverse)]
    return _summed(of_q, q), _summed(of_k, k), _summed(of_v, v), of_logs, None, None


def _along(x: Tensor, of_x: Tensor, negative: bool) -> Tensor:
    """The products of vectors and their gradients, [batch, heads, tokens]."""
    shared = x.repeat_interleave(of_x.shape[1] // x.shape[1], dim=1)
    along = (shared * of_x).sum(dim=-1).double()
    return -along if negative else along


def _summed(x: Tensor, like: Tensor) -> Tensor:
    """Sums over the heads that share one of an operand."""
    heads, sharing = like.shape[1], x.shape[1] // like.shape[1]
    return x if sharing == 1 else x.reshape(x.shape[0], heads, sharing, *x.shape[2:]).sum(dim=2)


_library.impl("gather", _gather, "CPU")  # type: ignore[no-untyped-call]
torch.library.register_fake("attn_compiler::gather", lambda q, k, v, logs, offset, reverse: _empty(q, k, v), lib=_library)
torch.library.register_autograd("attn_compiler::gather", _differentiate, setup_context=_remember, lib=_library)
