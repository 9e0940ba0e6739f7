"""How long it takes to read what one token meets, window 1024 of 32,768 keys, beside attending to it: what memory allows.

    python benchmarks/reading.py

Before each measurement SDPA reads all 32,768 keys, so that nothing of the window is left in a cache.
"""

from __future__ import annotations

import ctypes
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

HEADS, KEYS, DIM, WINDOW, ROUNDS = 8, 32768, 64, 1024, 60
AHEAD = 1024  # floats from which memory is asked for: the best of several that were tried
SOURCE = f"""
typedef float vector __attribute__((vector_size(64)));
float read_all(const float* k, const float* v, long stride, long count) {{
  vector sums[8] = {{}};
  for (int h = 0; h < {HEADS}; h++)
    for (long n = 0; n < count; n += 64)
      for (int m = 0; m < 4; m++) {{
        const float *x = k + h * stride + n + 16 * m, *y = v + h * stride + n + 16 * m;
        __builtin_prefetch(x + {AHEAD}), __builtin_prefetch(y + {AHEAD});
        sums[m] += *(const vector*)x, sums[4 + m] += *(const vector*)y;
      }}
  for (int m = 1; m < 8; m++) sums[0] += sums[m];
  return sums[0][0];
}}
"""


def reader(k: torch.Tensor, v: torch.Tensor, folder: Path) -> Callable[[], object]:
    """Sums up the latest keys and values of each head."""
    (folder / "read.c").write_text(SOURCE)
    flags = ["-O3", "-march=native", "-shared", "-fPIC", "-o", str(folder / "read.so")]
    subprocess.run(["cc", *flags, str(folder / "read.c")], check=True)
    read = ctypes.CDLL(str(folder / "read.so")).read_all
    read.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_long, ctypes.c_long]
    first = (KEYS - WINDOW) * DIM * 4
    return partial(read, k.data_ptr() + first, v.data_ptr() + first, KEYS * DIM, WINDOW * DIM)


def milliseconds(run: Callable[[], object]) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def main() -> None:
    torch.set_num_threads(1)
    q, (k, v) = torch.randn(1, HEADS, 1, DIM), torch.randn(2, 1, HEADS, KEYS, DIM)
    attend = partial(F.scaled_dot_product_attention, q, k, v)
    with tempfile.TemporaryDirectory() as folder:
        read = reader(k, v, Path(folder))
        rounds = [(milliseconds(attend), milliseconds(read), milliseconds(read)) for _ in range(ROUNDS)]
    names = ("SDPA, all keys", "reading the window from memory", "reading it again, from a cache")
    whole = statistics.median(x[0] for x in rounds)
    for name, times in zip(names, zip(*rounds, strict=True), strict=True):
        print(f"{name:<32} {statistics.median(times):7.3f} ms  {whole / statistics.median(times):6.1f}x")


if __name__ == "__main__":
    main()
