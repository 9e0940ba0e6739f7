"""Launches a kernel on its own: what the engine works out for every call is written out for one shape."""

import torch
import triton
from forward import DIM, VALUE_DIM, forward

# <constants>
BATCH, HEADS, KV_HEADS, Q_LEN, K_LEN = 1, 8, 8, 4096, 4096
BLOCK_Q, BLOCK_K, WARPS, STAGES = 64, 64, 4, 2
MEMBERS = 8
SIZES = ()
DTYPE = torch.float32
# </constants>


def sequence(*parts):
    """Numbers that rise evenly, part by part: the first one, the step, how many."""
    return torch.cat([first + step * torch.arange(count) for first, step, count in parts])


def visits(device):
    """What is visited."""  # <meaning>
    numbers = []  # <visits>
    return tuple(x.to(torch.int32).contiguous().to(device) for x in numbers)


def attend(q, k, v, *tables):
    """What attention makes of [batch, heads, tokens, dim], and the log-sum-exp of each query."""
    out = q.new_empty((*q.shape[:3], v.shape[3]))
    totals = q.new_empty(q.shape[:3], dtype=torch.float32)
    # <codes>
    operands = [(x, *x.stride()[:3]) for x in (q, k, v, out)]
    read = tuple((table, tuple(table.shape), tuple(table.stride())) for table in tables)
    # <launches>
    forward[triton.cdiv(Q_LEN, BLOCK_Q), MEMBERS, len(q)](
        *operands, totals, None, visits(q.device), read, *SIZES, BLOCK_Q, BLOCK_K, num_warps=WARPS, num_stages=STAGES
    )
    # </launches>
    return out, totals


if __name__ == "__main__":
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":  # with TRITON_INTERPRET=1
        from attn_compiler.runtime.interpreter import mend

        mend()
    q, k, v, tables = None, None, None, ()  # <example>
    out, totals = attend(q, k, v, *tables)
    print(out, totals)
