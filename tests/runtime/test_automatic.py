"""The target of a call that names none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import attn_compiler as attn
from attn_compiler.algebra.expr import k, q
from attn_compiler.algebra.variant import Variant
from attn_compiler.runtime.automatic import automatic
from attn_compiler.runtime.compiler import why_not
from attn_compiler.targets.operands import Operands
from attn_compiler.testing import assert_within_budget

WINDOW = Variant((k <= q) & (q - k < 8))
compiled_here = pytest.mark.skipif(why_not() is not None, reason="no compiler on this machine")


def operands(length: int, dtype: torch.dtype = torch.float32, *, differentiated: bool = False) -> Operands:
    drawn = torch.randn(3, 1, 2, length, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    return Operands(*drawn, {}, 0, 0, (0, 1), 2, 2, 0, 1, differentiated=differentiated)


@compiled_here
def test_a_mask_that_pytorch_has_no_operator_for_runs_on_a_generated_kernel() -> None:
    assert automatic(operands(64), WINDOW).name == "cpp"


def test_what_no_kernel_takes_runs_on_pytorch() -> None:
    assert automatic(operands(64, torch.float64), WINDOW).name == "torch"


def test_a_kernel_that_does_not_pay_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attn_compiler.runtime.cpp.faster", lambda *_: 0.5)
    monkeypatch.setattr("attn_compiler.runtime.cpp._dense_gain", lambda *_: 0.5)
    assert automatic(operands(65), Variant()).name == "torch"


class Windowed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        out = attn.attend(x, x, x, WINDOW)
        assert isinstance(out, Tensor)
        return out


def test_a_call_that_is_traced_runs_on_pytorch() -> None:
    x = operands(40).q
    program = torch.export.export(Windowed(), (x,))
    assert not any("attn_compiler" in str(node.target) for node in program.graph.nodes)
    exact, plain = (attn.attend(y, y, y, WINDOW, target=name) for y, name in ((x.double(), "reference"), (x, "torch")))
    assert_within_budget(program.module()(x), exact, plain)


def windowed(x: Tensor) -> Tensor:
    out = attn.attend(x, x, x, "causal & window(8)", bias=None)
    assert isinstance(out, Tensor)
    return out.sin()


@pytest.mark.parametrize("backend", ["aot_eager", "attn"])
def test_a_call_in_a_compiled_model_is_part_of_its_graph(backend: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(windowed, backend=backend, fullgraph=True, dynamic=True)
    for length in (40, 53):
        x = operands(length).q.requires_grad_()
        of_compiled, of_call = (torch.autograd.grad(run(x).sum(), x)[0] for run in (compiled, windowed))
        exact = torch.autograd.grad(windowed(wide := x.detach().double().requires_grad_()).sum(), wide)[0]
        assert_within_budget(of_compiled, exact, of_call)


def test_around_a_call_with_an_object_the_graph_breaks(recwarn: pytest.WarningsRecorder) -> None:
    torch.compiler.reset()
    x = operands(40).q
    compiled = torch.compile(lambda y: attn.attend(y, y, y, WINDOW) * 2, backend="aot_eager")
    assert torch.equal(compiled(x), attn.attend(x, x, x, WINDOW) * 2)
    assert not recwarn.list
