"""What stands around a Triton kernel: compiled and exported graphs, the device that it runs on, graphs that are played again."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import attn_compiler as attn
from attn_compiler.runtime import triton_kernels, triton_launch
from attn_compiler.runtime.triton_launch import call, on_device

pytest.importorskip("triton")

HERE = torch.device("cpu")


def windowed(x: Tensor) -> Tensor:
    out = attn.attend(x, x, x, "causal & window(8)", target="triton")
    assert isinstance(out, Tensor)
    return out.sin()


class Windowed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return windowed(x)


def test_a_kernel_is_one_operator_in_a_compiled_graph() -> None:
    torch.compiler.reset()
    x = torch.randn(1, 2, 20, 16, requires_grad=True)
    compiled = torch.compile(windowed, backend="aot_eager", fullgraph=True)
    of_compiled, of_call = (torch.autograd.grad(run(x).sum(), x)[0] for run in (compiled, windowed))
    assert torch.equal(of_compiled, of_call)


def test_a_kernel_is_one_operator_in_an_exported_graph() -> None:
    x = torch.randn(1, 2, 20, 16)
    program = torch.export.export(Windowed(), (x,))
    assert [str(node.target) for node in program.graph.nodes].count("attn_compiler.attend.default") == 1
    assert torch.equal(program.module()(x), windowed(x))


def test_a_kernel_is_launched_on_the_device_of_its_operands(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []

    class DeviceOf:
        def __init__(self, of: Tensor) -> None:
            self.of = of

        def __enter__(self) -> None:
            seen.append(self.of)

        def __exit__(self, *_: object) -> None:
            seen.append("left")

    monkeypatch.setattr(triton_launch.torch.cuda, "device_of", DeviceOf)
    x = torch.ones(1)
    call(x, {(1,): lambda *_, **__: seen.append("launched")}, (1,), (), {})
    assert seen[0] is x
    assert seen[1:] == ["launched", "left"]


def test_the_allocator_of_other_kernels_stays_what_it_is() -> None:
    from triton.runtime import _allocation

    before, seen = _allocation._allocator.get(), []
    kernel = {(1,): lambda *_, **__: seen.append(_allocation._allocator.get()(64, 128, None))}
    call(torch.ones(1), kernel, (1,), (), {})
    assert seen[0].numel() == 64
    assert _allocation._allocator.get() is before


def test_nothing_that_a_captured_graph_reads_is_let_go() -> None:
    """However many other shapes are met later: whoever plays the graph again still reads what was put on the device."""
    windowed(torch.randn(1, 2, 20, 16))
    before = [x.data_ptr() for x in on_device([np.arange(5)], HERE)]
    triton_kernels.launches.cache_clear()
    gc.collect()
    held = torch.zeros(5, dtype=torch.int32)  # what would take its place
    after = on_device([np.arange(5)], HERE)
    assert [x.data_ptr() for x in after] == before != [held.data_ptr()]
    assert on_device([np.arange(6)], HERE)[0].data_ptr() not in before
