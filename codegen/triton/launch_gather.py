"""Launches the kernels of linear attention on their own: q and k are features already, and what divides comes afterwards."""

import torch
import triton
from gather import DIM, SEGMENT, VALUE_DIM, VALUE_WIDTH, WIDTH, gather
from scan import scan
from states import states

# <constants>
BATCH, HEADS, KV_HEADS, Q_LEN, K_LEN = 1, 8, 8, 4096, 4096
OFFSET = 0
FADES, APART = False, False  # weights, and whether each feature does by itself
BLOCK_Q, BLOCK_K, SCANNED, WARPS, STAGES = 64, 64, 512, 4, 2
DTYPE = torch.float32
# </constants>


def halves(log):
    """A running log, [batch, heads, tokens] or [..., features] of float64, as a float, and far behind it what rounding left."""
    high = log.float()
    both = torch.stack((high, (log - high).float()))
    return (both, *both.stride()[1:4], high.numel())


def attend(q, k, v, at_query=None, at_key=None):
    """The sums of weight * v, and of weights: queries see keys up to their own place and OFFSET.

    q and k are features, of which q is scaled, and what divides these sums comes afterwards: PyTorch's operators do that.
    """
    heads = HEADS if FADES else KV_HEADS  # with states of their own
    last = (Q_LEN - 1) // BLOCK_Q * BLOCK_Q + OFFSET + 1
    count = min(max(last, 0), K_LEN) // SEGMENT
    out = q.new_empty((BATCH, HEADS, Q_LEN, VALUE_DIM.value), dtype=torch.float32)
    mass = q.new_empty((BATCH, HEADS, Q_LEN), dtype=torch.float32)
    held = q.new_empty((BATCH, heads, count, DIM.value * (VALUE_DIM.value + 1)), dtype=torch.float32)
    of_q, of_k, of_v, of_out = ((x, *x.stride()[:3]) for x in (q, k, v, out))
    logs = (halves(at_query), halves(at_key)) if FADES else (None, None)
    past = (None, None)  # a state of tokens before the first key, and the log at the last of them
    sharing = (1, HEADS // KV_HEADS, HEADS // KV_HEADS, HEADS // heads, 1)
    pieces, values = triton.cdiv(DIM.value, WIDTH.value), triton.cdiv(VALUE_DIM.value, VALUE_WIDTH.value)
    options = {"num_warps": WARPS, "num_stages": STAGES}
    if count:
        states[count * pieces * values, heads, BATCH](of_k, of_v, held, logs[1], sharing, count, BLOCK_K, **options)
    if count > 1:
        scan[triton.cdiv(held.shape[3], SCANNED), heads, BATCH](held, logs[1], sharing, count, SCANNED)
    gather[triton.cdiv(Q_LEN, BLOCK_Q) * values, HEADS, BATCH](
        of_q, of_k, of_v, of_out, mass, held, *logs, *past, sharing, Q_LEN, K_LEN, OFFSET, count, BLOCK_Q, BLOCK_K, **options
    )
    return out, mass


if __name__ == "__main__":
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":  # with TRITON_INTERPRET=1
        from attn_compiler.runtime.interpreter import mend

        mend()
    q = torch.randn(BATCH, HEADS, Q_LEN, DIM.value, dtype=DTYPE, device=device)
    k = torch.randn(BATCH, KV_HEADS, K_LEN, DIM.value, dtype=DTYPE, device=device)
    v = torch.randn(BATCH, KV_HEADS, K_LEN, VALUE_DIM.value, dtype=DTYPE, device=device)
    logs = [torch.arange(n, device=device).double().expand(BATCH, HEADS, -1) * -0.01 for n in (Q_LEN, K_LEN)]
    if APART:
        logs = [log[..., None].expand(-1, -1, -1, DIM.value) for log in logs]
    print(*attend(q, k, v, *(logs if FADES else ())))
