"""Times what runs on a GPU, one round of all after the other, and says when there is no time left."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

Run = Callable[[], object]
CLEARED = 1 << 30  # bytes that are written before each run: they empty the cache, and keep the device busy during the launch


@dataclass(frozen=True)
class Clock:
    """How long things take on a device; on a CPU numbers say nothing, but everything runs."""

    device: str
    rounds: int
    end: float  # of all that is measured, as `time.monotonic` counts

    def has(self, seconds: float) -> bool:
        """Whether so much time is left."""
        return time.monotonic() + seconds < self.end

    def interleaved(self, runs: Mapping[str, Run]) -> dict[str, float]:
        """The median milliseconds of each, one round of all after the other."""
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(self.rounds):
            for name, run in runs.items():
                times[name].append(self.once(run))
        return {name: statistics.median(found) for name, found in times.items()}

    def once(self, run: Run) -> float:
        if self.device == "cpu":
            start = time.perf_counter()
            run()
            return (time.perf_counter() - start) * 1e3
        self._cleared.zero_()
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        run()
        after.record()
        after.synchronize()
        return before.elapsed_time(after)

    def ceilings(self) -> dict[str, float]:
        """What the device does where nothing is in the way: TFLOP/s of a product, GB/s of a copy (read and written)."""
        if self.device == "cpu":
            return {}
        a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device=self.device) for _ in range(2))
        c, d = (torch.empty(1 << 31, dtype=torch.int8, device=self.device) for _ in range(2))
        product, copy = (min(self.once(run) for _ in range(20)) for run in (lambda: a @ b, lambda: c.copy_(d)))
        return {"matmul": 2 * 8192**3 / product / 1e9, "copy": 2 * (1 << 31) / copy / 1e6}

    @cached_property
    def _cleared(self) -> Tensor:
        return torch.empty(CLEARED, dtype=torch.int8, device=self.device)
