"""Takes the graphs that Dynamo makes of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, fx, nn

from zoo.entry import Inputs

Example = Tensor | int | torch.SymInt
Graph = tuple[fx.GraphModule, list[Example]]
Visit = Callable[[fx.GraphModule, Sequence[Example]], Callable[..., object] | None]


def visit_graphs(
    model: nn.Module,
    inputs: Inputs,
    visit: Visit,
    *,
    grad: bool = False,
    dynamic: bool | None = False,
    train: bool | None = None,
    again: Iterable[Inputs] = (),
) -> object:
    """Run `model` compiled, handing every graph to `visit` while Dynamo's tracing context is alive; return the output.

    What `visit` returns, if anything, runs in the graph's place; `again` are inputs for further runs of the same, asked
    for when the run before is over.
    """

    def backend(graph: fx.GraphModule, example_inputs: Sequence[Example]) -> Callable[..., object]:
        return visit(graph, example_inputs) or graph.forward

    if train is not None:
        model.train(train)
    torch.compiler.reset()
    with torch.set_grad_enabled(grad):
        compiled = torch.compile(model, backend=backend, dynamic=dynamic)
        out = compiled(**inputs)
        for other in again:
            out = compiled(**other)
        return out


def capture_dynamo(
    model: nn.Module,
    inputs: Inputs,
    *,
    grad: bool = False,
    dynamic: bool | None = False,
    train: bool | None = None,
) -> list[Graph]:
    """Return every graph that Dynamo makes of `model`, with the inputs it was made for."""
    graphs: list[Graph] = []

    def record(graph: fx.GraphModule, example_inputs: Sequence[Example]) -> None:
        graphs.append((graph, list(example_inputs)))

    visit_graphs(model, inputs, record, grad=grad, dynamic=dynamic, train=train)
    return graphs
