"""What is to be written to a file, however it came about."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from attn_compiler.export.program import Rewritten

Inputs = Mapping[str, Any]  # what a file is given, in the order in which its program takes it


@dataclass(frozen=True)
class Prepared:
    """A rewritten program, and how its file is told from others."""

    rewritten: Rewritten
    runs: Callable[[], Sequence[Inputs]]  # what the file is compared with its program on
    finish: Callable[[Any], None] = lambda model: None  # gives the inputs and outputs of the ONNX model other names
    beside: Mapping[str, str] = field(default_factory=dict)  # texts that stand beside the file, by their names
    caches: Mapping[str, str] = field(default_factory=dict)  # what each holds, in words
