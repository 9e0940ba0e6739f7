"""Capture keeps a model's meaning, and what AOTAutograd makes of it, while every node becomes an ATen call with a known value."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func as boxed
from torch import fx, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

from attn_compiler.graph.capture import bodies, capture, capture_body, drop_dead_code
from attn_compiler.torch_private import forget_values, inductor


class Attention(nn.Module):
    def __init__(self, core: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 96)
        self.core = core

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).view(x.shape[0], x.shape[1], 3, 2, 16).permute(2, 0, 3, 1, 4).unbind(0)
        return self.core(q, k, v).transpose(1, 2).flatten(2)


def eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    hidden = torch.triu(torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool), 1)
    return (q @ k.mT * 0.25).masked_fill(hidden, -torch.inf).softmax(-1) @ v


def in_place(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    score = q @ k.mT
    score.mul_(0.25)
    return score.softmax(-1) @ v


def vmapped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    i = torch.arange(q.shape[-2])
    visible = torch.vmap(torch.vmap(lambda a, b: a >= b, (None, 0)), (0, None))(i, i)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible)


def literal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (q @ k.mT * torch.tensor([0.5, 0.25]).view(1, 2, 1, 1)).softmax(-1) @ v


def checkpointed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    from torch.utils.checkpoint import checkpoint

    result: torch.Tensor = checkpoint(eager, q, k, v, use_reentrant=False)
    return result


def captured_by(model: nn.Module, *args: Any, dynamic: bool | None = None, **kwargs: Any) -> tuple[fx.GraphModule, Any]:
    """Compile `model` with a backend that runs the captured graph; return that graph and the output."""
    torch._dynamo.reset()
    seen: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        seen.append(capture(gm, example_inputs))
        return seen[-1].forward

    out = torch.compile(model, backend=backend, dynamic=dynamic)(*args, **kwargs)
    assert len(seen) == 1
    return seen[0], out


@pytest.mark.parametrize("core", [eager, in_place, vmapped, literal, checkpointed], ids=lambda f: f.__name__)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_a_captured_graph_gives_what_the_model_gives(core: Callable[..., torch.Tensor], dynamic: bool) -> None:
    torch.manual_seed(0)
    model, x = Attention(core), torch.randn(2, 12, 32)
    gm, out = captured_by(model, x, dynamic=dynamic)
    assert torch.equal(out, model(x))
    assert all("val" in node.meta for node in gm.graph.nodes if node.op == "placeholder")


@pytest.mark.parametrize("core", [eager, in_place, literal, checkpointed], ids=lambda f: f.__name__)
def test_gradients_flow_through_a_captured_graph(core: Callable[..., torch.Tensor]) -> None:
    torch.manual_seed(0)
    model, x = Attention(core), torch.randn(2, 12, 32)
    model(x).square().sum().backward()
    expected = model.qkv.weight.grad
    model.zero_grad()
    _, out = captured_by(model, x)
    out.square().sum().backward()
    assert expected is not None
    assert torch.equal(model.qkv.weight.grad, expected)


def test_in_place_operations_survive_although_nobody_reads_their_result() -> None:
    gm, _ = captured_by(Attention(in_place), torch.randn(2, 12, 32))
    assert torch.ops.aten.mul_.Tensor in {node.target for node in gm.graph.nodes}


def test_provenance_names_the_module_of_every_call() -> None:
    model = nn.Sequential(Attention(eager), Attention(eager))
    gm, _ = captured_by(model, torch.randn(2, 12, 32))
    softmaxes = [node for node in gm.graph.nodes if "softmax" in str(node.target)]
    assert len({str(node.meta["nn_module_stack"]) for node in softmaxes}) == 2


def test_the_fast_path_of_an_encoder_layer_is_opened() -> None:
    layer = nn.TransformerEncoderLayer(32, 2, 48, batch_first=True).eval()
    x, padding = torch.randn(2, 12, 32), torch.zeros(2, 12, dtype=torch.bool)
    padding[0, 9:] = True
    with torch.no_grad():
        gm, out = captured_by(layer, x, src_key_padding_mask=padding)
        expected = layer(x, src_key_padding_mask=padding)
    assert any("scaled_dot_product_attention" in str(node.target) for node in gm.graph.nodes)
    torch.testing.assert_close(out[~padding], expected[~padding])


def test_autocast_regions_keep_their_precision() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Attention(eager)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return self.inner(x)

    model, x = Mixed(), torch.randn(2, 12, 32)
    _, out = captured_by(model, x)
    assert out.dtype is torch.bfloat16
    assert torch.equal(out, model(x))


def test_a_dynamic_length_does_not_recompile() -> None:
    counter = CompileCounterWithBackend("eager")

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        counter.frame_count += 1
        return capture(gm, example_inputs).forward

    torch._dynamo.reset()
    model = Attention(eager)
    compiled = torch.compile(model, backend=backend, dynamic=True)
    for length in (12, 17, 31):
        x = torch.randn(2, length, 32)
        assert torch.equal(compiled(x), model(x))
    assert counter.frame_count == 1


def test_the_body_of_a_checkpoint_is_captured_with_its_operands() -> None:
    gm, _ = captured_by(Attention(checkpointed), torch.randn(2, 12, 32))
    (body,) = bodies(gm)
    inner = capture_body(body)
    assert any("softmax" in str(node.target) for node in inner.graph.nodes)
    placeholders = [node for node in inner.graph.nodes if node.op == "placeholder"]
    assert [node.meta["val"].shape for node in placeholders] == [operand.meta["val"].shape for operand in body.operands]


def test_an_exported_graph_is_taken_as_it_is() -> None:
    program = torch.export.export(Attention(eager), (torch.randn(2, 12, 32),))
    assert capture(program.graph_module) is program.graph_module


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch's own, while Inductor is imported
@pytest.mark.parametrize("core", [eager, literal, vmapped], ids=lambda f: f.__name__)
@pytest.mark.parametrize("train", [False, True], ids=["infer", "train"])
def test_aot_autograd_makes_the_same_graph_with_and_without_the_retrace(core: Callable[..., torch.Tensor], train: bool) -> None:
    model, x = Attention(core), torch.randn(2, 12, 32)
    graphs: list[collections.Counter[str]] = []

    def inner(gm: fx.GraphModule, example_inputs: list[Any], **_: Any) -> Callable[..., Any]:
        graphs.append(collections.Counter(str(node.target) for node in gm.graph.nodes if node.op == "call_function"))
        return boxed(gm.forward)

    def plain(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        return inductor()(gm, example_inputs, inner_compile=inner)  # type: ignore[no-any-return]

    def retraced(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        captured = capture(gm, example_inputs)
        forget_values(captured)
        return plain(captured, example_inputs)

    for backend in (plain, retraced):
        torch._dynamo.reset()
        with torch.set_grad_enabled(train), torch._functorch.config.patch(enable_autograd_cache=False):
            torch.compile(model, backend=backend)(x)
    assert len(graphs) % 2 == 0
    half = len(graphs) // 2
    assert graphs[:half] == graphs[half:]


@pytest.mark.parametrize(("train", "stays"), [(True, True), (False, False)])
def test_a_dropout_that_nobody_reads_stays_only_where_it_draws(train: bool, stays: bool) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.call_function(torch.ops.aten.dropout.default, (x, 0.5, train))
    graph.output(x)
    gm = fx.GraphModule({}, graph)
    drop_dead_code(gm)
    assert bool(graph.find_nodes(op="call_function", target=torch.ops.aten.dropout.default)) is stays
