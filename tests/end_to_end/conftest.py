"""What every end to end test starts from: nothing compiled yet, and, where asked for, a code generator that costs no time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from attn_compiler.graph import torch_private as private


@pytest.fixture(autouse=True)
def _nothing_is_compiled_yet() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """AOTAutograd as always, but its graphs run operator by operator: what we do to a graph is all that is tested."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._dynamo.backends.debugging import boxed_nop

    def compile_fx(gm, inputs, config_patches=None):  # type: ignore[no-untyped-def]
        return aot_autograd(fw_compiler=boxed_nop)(gm, inputs)

    monkeypatch.setattr(private, "inductor", lambda: compile_fx)
