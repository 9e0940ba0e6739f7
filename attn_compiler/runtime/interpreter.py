"""Triton's interpreter, which runs kernels on a CPU, mended: private names of Triton stand here and nowhere else."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from typing import Any

import numpy as np
import torch


def is_interpreting() -> bool:
    """Whether kernels are run by the interpreter: decided once, when Triton is first imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def quiet() -> AbstractContextManager[object]:
    """Let infinities cancel in silence, as on a GPU."""
    return np.errstate(all="ignore") if is_interpreting() else nullcontext()


@cache
def mend() -> None:
    """Let it multiply bfloat16 and TF32 and round as a GPU does, and count loops with any numpy."""
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    builder.create_dot = _dot
    cast = builder.cast_impl
    builder.cast_impl = lambda self, source, kind: _cast(cast, self, source, kind)
    other = builder.create_fp_to_fp
    builder.create_fp_to_fp = lambda self, source, kind, rounding: _cast(
        partial(other, rounding_mode=rounding), self, source, kind
    )
    patch = getattr(interpreter, "_patch_lang_tensor", None)
    if patch is not None:
        interpreter._patch_lang_tensor = lambda tensor, *scope: _countable(patch, tensor, *scope)


def _dot(self: Any, a: Any, b: Any, d: Any, precision: object, *_: object, **__: object) -> Any:
    """Products of bfloat16 and floats of a byte are those of numbers, where the interpreter takes bits; TF32 is cut off."""
    from triton._C.libtriton.ir import INPUT_PRECISION
    from triton.runtime.interpreter import TensorHandle

    x, y = (_numbers(part.data, part.dtype) for part in (a, b))
    if precision == INPUT_PRECISION.TF32 and x.dtype == np.float32:
        x, y = ((part.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32) for part in map(np.ascontiguousarray, (x, y)))
    kind = np.float32 if d.data.dtype.kind == "f" else d.data.dtype
    product = np.matmul(x.astype(kind, copy=False), y.astype(kind, copy=False), dtype=kind)
    return TensorHandle((product + d.data).astype(d.data.dtype), d.dtype.scalar)


def _numbers(stored: Any, kind: Any) -> Any:
    import triton.language as tl

    if kind.scalar == tl.bfloat16:
        return (stored.astype(np.uint32) << 16).view(np.float32)
    byte = _floats_of_a_byte().get(kind.scalar.name)
    return stored if byte is None else torch.from_numpy(np.ascontiguousarray(stored)).view(byte).float().numpy()


def _floats_of_a_byte() -> Mapping[str, torch.dtype]:
    return {"fp8e4nv": torch.float8_e4m3fn, "fp8e5": torch.float8_e5m2}


def _cast(cast: Any, builder: Any, source: Any, kind: Any) -> Any:
    """Numbers are rounded to the nearest bfloat16 or float of a byte, where the interpreter takes or cuts off their bits."""
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    byte = _floats_of_a_byte()
    if source.dtype.scalar.name in byte and kind.scalar == tl.float32:
        return TensorHandle(_numbers(source.data, source.dtype), tl.float32)
    if kind.scalar.name in byte and source.dtype.scalar == tl.float32:
        rounded = torch.from_numpy(np.ascontiguousarray(source.data, dtype=np.float32)).to(byte[kind.scalar.name])
        return TensorHandle(rounded.view(torch.uint8).numpy().reshape(source.data.shape), kind.scalar)
    if kind.scalar != tl.bfloat16 or not (source.dtype.scalar == tl.float32 or source.dtype.scalar.is_int()):
        return cast(builder, source, kind)
    bits = np.ascontiguousarray(source.data, dtype=np.float32).view(np.uint32)
    nearest = ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype(np.uint16)
    nearest = np.where(np.isnan(source.data), np.uint16(0x7FC0), nearest)
    return TensorHandle(nearest.reshape(source.data.shape), tl.bfloat16)


def _countable(patch: Any, tensor: Any, *scope: Any) -> Any:
    """Since 2.4, numpy makes no integer of an array with an axis, which bounds of loops are."""
    found = patch(tensor, *scope)

    def index(self: Any) -> int:
        return int(np.asarray(self.handle.data).reshape(-1)[0])

    if scope and hasattr(scope[0], "set_attr"):
        scope[0].set_attr(tensor, "__index__", index)
    else:
        tensor.__index__ = index
    return found
