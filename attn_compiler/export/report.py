"""What became of a model that was exported."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from attn_compiler.planning.report import Report
from attn_compiler.targets.onnx.choice import STRATEGIES


@dataclass(frozen=True)
class Checked:
    """One comparison of the file with the rewritten model in PyTorch."""

    by: str  # who ran the file
    shapes: str  # of the inputs
    error: float  # the largest difference
    largest: float  # the largest magnitude among the results

    def __str__(self) -> str:
        return f"{self.shapes}: differs by {self.error:.2g} at most, results go up to {self.largest:.2g}"


@dataclass(frozen=True)
class ExportReport:
    """What was decided for each attention, and how far the file computes what the rewritten model does."""

    path: Path
    report: Report
    strategies: Mapping[str, str]  # which body each rewritten attention got, by the name of its function
    checks: tuple[Checked, ...]
    bytes: int
    caches: Mapping[str, str] = field(default_factory=dict)  # what decoding holds on to, by the name of the cache
    notes: tuple[str, ...] = ()  # what else is to be known of the file

    def record(self) -> dict[str, object]:
        """All of it for programs."""
        return {
            "path": str(self.path),
            "bytes": self.bytes,
            "strategies": dict(self.strategies),
            "caches": dict(self.caches),
            "checks": [vars(check) for check in self.checks],
            "notes": list(self.notes),
            "report": json.loads(self.report.to_json()),
        }

    def __str__(self) -> str:
        written = f"written to {self.path} ({self.bytes / 1e6:.1f} MB)"
        counted = Counter(self.strategies.values())
        bodies = (f"{count} of its functions: {STRATEGIES[name]}" for name, count in counted.items())
        held = (f"{count} of its caches hold {what}" for what, count in Counter(self.caches.values()).items())
        checks = [f"checked in {check.by}, {check}" for check in self.checks] or ["not compared with the rewritten model"]
        return "\n".join([str(self.report), "", written, *bodies, *held, *checks, *self.notes])
