"""What tests of generated kernels share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Triton kernels of small tiles in the interpreter, so that short sequences have many of them."""
    yield from _cut(monkeypatch, specialized=False)


@pytest.fixture
def specialized_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The same, in the form for Hopper wherever a call can take it."""
    yield from _cut(monkeypatch, specialized=True)


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the Triton kernels of attention and its gradients none runs, only those that tell them what to visit."""
    from attn_compiler.runtime import triton_gradients, triton_kernels

    for module in (triton_kernels, triton_gradients):
        monkeypatch.setattr(module, "call", lambda *_: None)


def _cut(monkeypatch: pytest.MonkeyPatch, *, specialized: bool) -> Iterator[None]:
    from attn_compiler.runtime import triton_gradients, triton_kernels, tuning
    from attn_compiler.targets.triton.blocks import Blocks

    def forget() -> None:
        triton_kernels.launches.cache_clear()
        triton_gradients._pairs.cache_clear()

    usual = Blocks(16, 16)
    monkeypatch.setattr(tuning, "INTERPRETED", (replace(usual, specialized=True), usual) if specialized else (usual,))
    forget()
    yield
    forget()
