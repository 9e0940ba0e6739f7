"""What every launch of a Triton kernel needs: the kernel loaded, its arguments as Triton takes them, the right device."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import copy_context
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attn_compiler.planning.runs import Integers
from attn_compiler.runtime import compiler, interpreter
from attn_compiler.runtime.kernels import Shape
from attn_compiler.targets.triton.precision import TF32


def call(of: Tensor, kernel: Any, grid: tuple[int, ...], arguments: Sequence[object], options: Mapping[str, int]) -> None:
    """Launch a kernel on the device of a tensor."""
    with beside(of):
        copy_context().run(_start, of, partial(kernel[grid], *arguments, **options))


@contextmanager
def beside(of: Tensor) -> Iterator[None]:
    """Launch what is launched on the device of a tensor: Triton itself would take the current one."""
    with torch.cuda.device_of(of), interpreter.quiet():  # type: ignore[no-untyped-call]
        yield


def _start(of: Tensor, launch: Callable[[], object]) -> None:
    """Launch a kernel with memory for the descriptors that it makes; the allocator of other kernels stays what it is."""
    from triton import set_allocator

    set_allocator(lambda size, alignment, stream: of.new_empty(size, dtype=torch.int8))
    launch()


def can_be_described(x: Tensor) -> bool:
    """Whether what copies whole tiles takes the rows of a tensor: they start at multiples of 16 bytes, and do not overlap."""
    starts = (x.data_ptr(), *(stride * x.element_size() for stride in x.stride()[:3]))
    return all(start % 16 == 0 for start in starts) and x.stride(2) >= x.shape[3]


def in_words(x: Tensor) -> Tensor:
    """Rows of bytes that start at whole words where they are whole words long, as kernels take it."""
    starts = (x.data_ptr(), *x.stride()[:3])
    fits = x.dtype != torch.uint8 or x.shape[3] % 4 or all(start % 4 == 0 for start in starts)
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def sizes(shape: Shape) -> tuple[int, ...]:
    """What kernels know of the size of a call."""
    counts = (shape.heads, shape.kv_heads, shape.q_len, shape.k_len, shape.layer, shape.layers)
    return (*counts, shape.first_query, shape.first_key)


def asked(dtype: str, device: torch.device | None = None) -> str:
    """As what a kernel multiplies numbers of a dtype: float32 as TF32 where PyTorch is asked for that and a device knows it.

    Asked at every call: a compiled graph obeys the switch as it is when the graph runs.
    """
    if dtype != "float32" or torch.backends.cuda.matmul.fp32_precision != "tf32":
        return dtype
    return TF32 if device is None or _knows_tf32(device) else dtype


@cache
def _knows_tf32(device: torch.device) -> bool:
    """Of AMD's devices only one does, by Triton."""
    return torch.version.hip is None or torch.cuda.get_device_properties(device).gcnArchName.startswith("gfx942")


def operand(x: Tensor) -> tuple[object, ...]:
    """A pointer and the strides of batch, heads and tokens."""
    return (x, *x.stride()[:3])


def table(x: Tensor) -> tuple[object, ...]:
    """A pointer, sizes and strides."""
    return x, tuple(x.shape), tuple(x.stride())


def on_device(arrays: Iterable[Integers], device: torch.device) -> tuple[Tensor, ...]:
    """Arrays as kernels read them, the same ones once for all."""
    return tuple(_placed(np.ascontiguousarray(x, np.int32).tobytes(), x.shape, device) for x in arrays)


# A CUDA graph reads what its kernels were given for as long as it is played, and another stream may be reading still:
# nothing of it may be let go, whatever the caches of launches forget.
@cache
def _placed(numbers: bytes, shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.from_numpy(np.frombuffer(numbers, np.int32).reshape(shape).copy()).to(device)


@cache
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
