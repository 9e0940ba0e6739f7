"""Asks the matcher about a model: what it finds in all of its graphs, and in the graphs inside of those."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import fx, nn

from attn_compiler.graph.capture import bodies, capture, capture_body
from attn_compiler.graph.match import Matches, match
from zoo.capture import Example, visit_graphs
from zoo.entry import Inputs


def find(
    model: nn.Module, inputs: Inputs, *, grad: bool = False, dynamic: bool | None = False, train: bool | None = None
) -> Matches:
    """Return every site and near-miss, matched while Dynamo's tracing context is alive, as in a real compilation."""
    found: list[Matches] = []

    def visit(gm: fx.GraphModule, example_inputs: Sequence[Example]) -> None:
        found.extend(_matches(capture(gm, example_inputs)))

    visit_graphs(model, inputs, visit, grad=grad, dynamic=dynamic, train=train)
    return Matches(
        tuple(site for matches in found for site in matches.sites),
        tuple(miss for matches in found for miss in matches.near_misses),
    )


def _matches(gm: fx.GraphModule) -> Iterator[Matches]:
    yield match(gm)
    for body in bodies(gm):
        yield from _matches(capture_body(body))
