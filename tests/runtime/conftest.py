"""What tests of generated kernels share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Triton kernels of small tiles in the interpreter, so that short sequences have many of them."""
    from attn_compiler.runtime import triton_gradients, triton_kernels, tuning
    from attn_compiler.targets.triton.blocks import Blocks

    def forget() -> None:
        triton_kernels.launches.cache_clear()
        triton_gradients._pairs.cache_clear()

    monkeypatch.setattr(tuning, "INTERPRETED", Blocks(16, 16))
    forget()
    yield
    forget()
