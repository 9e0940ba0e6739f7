"""Counts the attentions that Inductor's own pattern matcher fuses, without generating any code."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, fx, nn


def count_fused(model: nn.Module, inputs: Mapping[str, Tensor]) -> int:
    """Compile `model` for inference up to the point where Inductor would lower it; return how often its patterns fired."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.utils import counters
    from torch._functorch import config
    from torch._inductor.compile_fx import compile_fx

    def keep(graph: fx.GraphModule, _: Sequence[Tensor], **settings: object) -> Callable[..., object]:
        fused: Callable[..., object] = make_boxed_func(graph.forward)
        return fused

    def backend(graph: fx.GraphModule, example_inputs: Sequence[Tensor]) -> Callable[..., object]:
        compiled: Callable[..., object] = compile_fx(graph, example_inputs, inner_compile=keep)
        return compiled

    torch.compiler.reset()
    counters.clear()
    # A graph that comes out of the cache has been matched before, and counts nothing.
    with torch.no_grad(), config.patch(enable_autograd_cache=False):
        torch.compile(model, backend=backend, dynamic=False)(**inputs)
    return int(counters["inductor"]["fuse_attention"])
