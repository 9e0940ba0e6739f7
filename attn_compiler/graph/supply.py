"""Brings the tables that a policy names into a graph: inputs that are there already, or tensors given as further inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from attn_compiler import torch_private as private
from attn_compiler.errors import TableError, did_you_mean
from attn_compiler.planning.sources import Source


@dataclass
class Supply:
    """The tables of one graph. `extra` are the tensors behind the inputs that were added, in their order."""

    graph: fx.GraphModule
    sources: Mapping[str, Source]
    given: Mapping[str, Tensor]
    extra: list[Tensor] = field(default_factory=list)
    _nodes: dict[str, fx.Node] = field(default_factory=dict)

    def nodes(self, names: Iterable[str]) -> dict[str, fx.Node]:
        """The node behind each of the policy's tables."""
        return {name: self._node(name) for name in names if name in self.sources}

    def _node(self, name: str) -> fx.Node:
        if name not in self._nodes:
            source = self.sources[name]
            self._nodes[name] = self._input(source.name) if source.origin == "input" else self._added(name, source)
        return self._nodes[name]

    def _added(self, name: str, source: Source) -> fx.Node:
        tensor = torch.from_numpy(source.array) if source.array is not None else self.given.get(source.name)
        if tensor is None:
            known = did_you_mean(source.name, self.given) if self.given else '; none were given: options={"tables": {…}}'
            raise TableError(f'the policy reads a table "{source.name}" that is not in the option "tables"{known}')
        device = next((x.device for x in self._placeholders().values() if isinstance(x, Tensor)), tensor.device)
        tensor = tensor.to(device)
        self.extra.append(tensor)
        return private.add_input(self.graph, f"attn_table_{len(self.extra)}", tensor)

    def _input(self, name: str) -> fx.Node:
        inputs: dict[str, fx.Node] = {private.argument_name(node): node for node in self.graph.graph.find_nodes(op="placeholder")}
        inputs.pop("", None)
        if name not in inputs:
            raise TableError(
                f'the policy reads the input "{name}", which the compiled graph does not{did_you_mean(name, inputs)}'
            )
        return inputs[name]

    def _placeholders(self) -> dict[fx.Node, object]:
        return {node: private.known_value(node) for node in self.graph.graph.find_nodes(op="placeholder")}
