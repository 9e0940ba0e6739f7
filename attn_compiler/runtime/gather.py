"""The operator that adds keys up to states by generated kernels; its gradients are itself, so there are as many as one likes.

With weight = left * (q · k), where `left` is what a decay leaves of a key, the gradient of a weight is above · v + of_mass. So
each gradient gathers by weights that are products again: with [above, of_mass] and [v, 1] in the places of q and k, and with
queries in the places of keys, which then are met from the other side. A state of earlier tokens is one more product.

Logs are [batch, heads, tokens]; [..., features] where each row of a state fades by itself, and [..., 1, value dim] where each
column does, which leaves no sums of weights. The gradients of q and k where rows fade are gathered where columns do, and the
other way round.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from attn_compiler.errors import ShapeError
from attn_compiler.runtime.states import Call, in_rows
from attn_compiler.runtime.states import gather as run
from attn_compiler.runtime.triton_launch import asked
from attn_compiler.runtime.triton_states import gather as run_on_triton
from attn_compiler.targets.fading import Fading, Logs, left_of
from attn_compiler.targets.gathered import Count, Gather
from attn_compiler.targets.past import Earlier
from attn_compiler.targets.products import per_kv_head
from attn_compiler.targets.triton.precision import TF32

CPP = "cpp"  # who gathers; else it is Triton, and this is the dtype that its products are as exact as

_library = torch.library.Library("attn_compiler", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "gather(Tensor q, Tensor k, Tensor v, Tensor[] logs, SymInt offset, bool reverse, str by, "
    "Tensor? past=None, Tensor? before=None) -> (Tensor, Tensor)"
)


def _by_kernel(
    q: Tensor, k: Tensor, v: Tensor, logs: Logs | None, offset: Count | None, past: Earlier | None = None, *, by: str
) -> tuple[Tensor, Tensor]:
    if by == "bfloat16":
        q, k, v = (x.to(torch.bfloat16) for x in (q, k, v))
    last, state = k.shape[2] if offset is None else offset, (None, None) if past is None else past
    acc, mass = torch.ops.attn_compiler.gather(q, k, v, list(logs or ()), last, False, by, *state)
    return acc, mass[..., None]


BY_KERNEL = Gather(partial(_by_kernel, by=CPP), dynamic=True, gates=True)


@cache
def by_triton(dtype: torch.dtype) -> Gather:
    """Gather on Triton, where operands of a dtype may be multiplied no less exactly than such numbers are."""
    by = {torch.float16: TF32, torch.bfloat16: "bfloat16"}.get(dtype, "float32")
    run = partial(_by_kernel, by=by)
    # Its tiles of queries meet late keys one by one, however few they are.
    return Gather(run, dynamic=True, few=True, gates=True, behind=run)


def _gather(
    q: Tensor, k: Tensor, v: Tensor, logs: Sequence[Tensor], offset: int, reverse: bool, by: str,
    past: Tensor | None = None, before: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if past is not None and (reverse or by == CPP):
        raise ShapeError("a state of earlier tokens is met by Triton's kernels, forwards")
    out, mass = _empty(q, k, v, by)
    if not (out.numel() and q.numel() and (k.numel() or past is not None)):
        return out.zero_(), mass.zero_()
    q, k, v = map(in_rows, (q, k, v))
    given = (in_rows(logs[0]), in_rows(logs[1])) if logs else None
    state = None if past is None else Earlier(in_rows(past.float()), before)
    told = Call(q, k, v, out, mass.zero_() if Fading.of(logs) is Fading.COLUMNS else mass, given, None, offset, reverse, state)
    # Backwards the kernel counts queries from the last one: so do their masses.
    run(told) if by == CPP else run_on_triton(told, asked(by, q.device))
    return out, mass.flip(-1) if reverse else mass


def _empty(q: Tensor, k: Tensor, v: Tensor, by: str) -> tuple[Tensor, Tensor]:
    """Room for the sums, laid out as models want them: they transpose heads and tokens, which then costs nothing."""
    dtype = q.dtype if by == CPP else torch.float32
    batch, heads, q_len = q.shape[0], max(q.shape[1], k.shape[1]), q.shape[2]
    out = q.new_empty((batch, q_len, heads, v.shape[3]), dtype=dtype).transpose(1, 2)
    return out, q.new_empty((batch, heads, q_len), dtype=torch.float32)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, logs, ctx.offset, ctx.reverse, ctx.by, *state = inputs
    ctx.count, state = len(logs), [x for x in state if x is not None]
    ctx.save_for_backward(q, k, v, *logs, *state)


def _differentiate(ctx: Any, above: Tensor, of_mass: Tensor) -> tuple[object, ...]:
    q, k, v, *others = ctx.saved_tensors
    logs, state = others[: ctx.count], others[ctx.count :]
    gather = torch.ops.attn_compiler.gather
    above, of_mass = above.to(q.dtype), of_mass.to(q.dtype)
    from_query, from_key = (above, v) if Fading.of(logs) is Fading.COLUMNS else _weighed(above, of_mass, v, ctx.by)
    here, there, turned = (ctx.offset, ctx.reverse, ctx.by), (-ctx.offset, not ctx.reverse, ctx.by), list(map(_turned, logs))
    of_q = gather(from_query, from_key, k, turned, *here)[0]
    of_k = gather(from_key, from_query, q, turned[::-1], *there)[0]
    of_v = gather(k, q, above, logs[::-1], *there)[0]
    of_state: list[Tensor | None] = [None, None]
    if state:
        met, *of_state = _of_state(torch.cat([above, of_mass[..., None]], dim=-1), q, logs, *state)
        of_q = of_q + met
    of_logs: list[Tensor | None] = [None for _ in logs]
    if any(ctx.needs_input_grad[3] or ()):  # a weight times its gradient is what both its logs ask for
        x, of_x, y, of_y = q, of_q, k, of_k
        if Fading.of(logs) is Fading.COLUMNS:
            x, of_x, y, of_y = gather(q, k, v, logs, *here)[0], above, v, of_v
        of_logs = [_along(x, of_x, logs[0], ctx.reverse), _along(y, of_y, logs[1], not ctx.reverse)]
    found = _summed(of_q, q), _summed(of_k, k), _summed(of_v, v), of_logs, None, None, None, *of_state
    return found[: len(ctx.needs_input_grad)]  # what stands for nothing at the end of a call is left out


def _of_state(
    above: Tensor, q: Tensor, logs: Sequence[Tensor], past: Tensor, before: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients of q, of a state and of the log at its last token that what was gathered from it asks for."""
    above, shared = above.to(past.dtype), q.to(past.dtype).repeat_interleave(above.shape[1] // q.shape[1], dim=1)
    of_q = per_kv_head(above, past.mT)
    if before is not None:
        left = left_of(logs[0], before, of_q)
        of_q, shared = of_q * left, shared * left
    of_past = _summed(shared.mT @ above, past)
    return of_q, of_past, None if before is None else _along(q, of_q, before, negative=True).sum(dim=2, keepdim=True)


def _weighed(above: Tensor, of_mass: Tensor, v: Tensor, by: str) -> tuple[Tensor, Tensor]:
    """The vectors of a query and of a key whose product is the gradient of the weight between them."""
    return _beside(above, of_mass[..., None], by), _beside(v, v.new_ones((*v.shape[:-1], 1)), by)


def _beside(x: Tensor, one: Tensor, by: str) -> Tensor:
    """Vectors with one more number; in Triton rows stay as wide as memory is read."""
    return torch.cat([x, one, *([] if by == CPP else [x.new_zeros((*x.shape[:-1], -(x.shape[-1] + 1) % 16))])], dim=-1)


def _turned(log: Tensor) -> Tensor:
    """The log of a state whose rows and columns change places."""
    return log if log.ndim == Fading.TOGETHER else log[:, :, :, None] if log.ndim == Fading.ROWS else log[:, :, :, 0]


def _along(x: Tensor, of_x: Tensor, log: Tensor, negative: bool) -> Tensor:
    """The products of vectors and their gradients, or of each of their numbers: what a log like this one asks for."""
    along = x.repeat_interleave(of_x.shape[1] // x.shape[1], dim=1) * of_x
    along = along.sum(dim=-1) if log.ndim == Fading.TOGETHER else along if log.ndim == Fading.ROWS else along[:, :, :, None]
    return (-along if negative else along).double()


def _summed(x: Tensor, like: Tensor) -> Tensor:
    """Sums over the heads that share one of an operand."""
    heads, sharing = like.shape[1], x.shape[1] // like.shape[1]
    return (x if sharing == 1 else x.reshape(x.shape[0], heads, sharing, *x.shape[2:]).sum(dim=2)).to(like.dtype)


for _device in ("CPU", "CUDA"):
    _library.impl("gather", _gather, _device)  # type: ignore[no-untyped-call]
torch.library.register_fake("attn_compiler::gather", lambda q, k, v, _0, _1, _2, by, *_: _empty(q, k, v, by), lib=_library)
torch.library.register_autograd("attn_compiler::gather", _differentiate, setup_context=_remember, lib=_library)
