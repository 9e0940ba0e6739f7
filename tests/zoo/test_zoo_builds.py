"""Every model of the zoo builds, runs, and computes finite numbers."""

from __future__ import annotations

import pytest
import torch
from torch.utils import _pytree as pytree

from zoo.capture import capture_dynamo
from zoo.catalogue import FAMILIES, ZOO

CASES = [
    pytest.param(name, implementation, id=f"{name}-{implementation}")
    for name, entry in ZOO.items()
    for implementation in entry.implementations
]
every_model = pytest.mark.parametrize(("name", "implementation"), CASES)


def _floats(output: object) -> list[torch.Tensor]:
    leaves = pytree.tree_leaves(dict(output) if hasattr(output, "keys") else output)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]


@every_model
def test_a_model_of_the_zoo_runs_and_stays_finite(name: str, implementation: str) -> None:
    model, inputs = ZOO[name].make(implementation)
    with torch.no_grad():
        numbers = _floats(model(**inputs))
    assert numbers
    assert all(x.isfinite().all() for x in numbers)


@pytest.mark.parametrize("name", ["llama", "nanogpt"])
def test_a_model_is_made_of_the_same_numbers_every_time(name: str) -> None:
    entry = ZOO[name]
    (first, inputs), (second, same_inputs) = (entry.make(entry.implementations[0]) for _ in range(2))
    pairs = zip((*first.parameters(), *inputs.values()), (*second.parameters(), *same_inputs.values()), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_no_parameter_is_left_at_zero() -> None:
    model, _ = ZOO["gpt2"].make("eager")
    assert all((parameter != 0).any() for parameter in model.parameters())


def test_names_are_unique() -> None:
    assert len(ZOO) == sum(len(entries) for entries in FAMILIES.values())


@pytest.mark.full
@every_model
def test_dynamo_captures_every_model(name: str, implementation: str) -> None:
    graphs = capture_dynamo(*ZOO[name].make(implementation))
    assert any(node.op in {"call_function", "call_method"} for graph, _ in graphs for node in graph.graph.nodes)


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_captured_graph_computes_what_the_model_computes(dynamic: bool) -> None:
    model, inputs = ZOO["nanogpt"].make("torch")
    [(graph, example_inputs)] = capture_dynamo(model, inputs, dynamic=dynamic)
    with torch.no_grad():
        [output] = graph(*(x if isinstance(x, torch.Tensor) else int(x) for x in example_inputs))
        torch.testing.assert_close(output, model(**inputs), rtol=0, atol=0)
