"""What every launch of a Triton kernel needs: the kernel loaded, its arguments as Triton takes them, the right device."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attn_compiler.planning.runs import Integers
from attn_compiler.runtime import compiler, interpreter
from attn_compiler.runtime.kernels import Shape


def call(of: Tensor, kernel: Any, grid: tuple[int, ...], arguments: Sequence[object], options: Mapping[str, int]) -> None:
    """Launch a kernel on the device of a tensor: Triton itself would take the current one."""
    with torch.cuda.device_of(of), interpreter.quiet():  # type: ignore[no-untyped-call]
        kernel[grid](*arguments, **options)


def sizes(shape: Shape) -> tuple[int, ...]:
    """What kernels know of the size of a call."""
    counts = (shape.heads, shape.kv_heads, shape.q_len, shape.k_len, shape.layer, shape.layers)
    return (*counts, shape.first_query, shape.first_key)


def operand(x: Tensor) -> tuple[object, ...]:
    """A pointer and the strides of batch, heads and tokens."""
    return (x, *x.stride()[:3])


def table(x: Tensor) -> tuple[object, ...]:
    """A pointer, sizes and strides."""
    return x, tuple(x.shape), tuple(x.stride())


def on_device(arrays: Iterable[Integers], device: torch.device) -> tuple[Tensor, ...]:
    """Arrays as kernels read them."""
    return tuple(torch.from_numpy(np.ascontiguousarray(x, np.int32)).to(device) for x in arrays)


@lru_cache(maxsize=256)
def load(text: str) -> Any:
    """The module that a text is: Triton compiles functions of files."""
    if interpreter.is_interpreting():
        interpreter.mend()
    path = compiler.module(text)
    spec = importlib.util.spec_from_file_location(f"attn_kernel_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
